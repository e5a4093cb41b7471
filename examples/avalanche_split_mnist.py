"""PLoRA in Avalanche on images of MNIST's shape: ten classes in five experiences, an adapter for each."""

import timm
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import InteractiveLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from torch.utils.data import TensorDataset

from plora_ext.integrations.avalanche import PLoRAModule, PLoRAPlugin

torch.manual_seed(0)
centres = torch.randn(10, 1, 28, 28)


def draw(per_class: int) -> TensorDataset:
    """Noisy images; put torchvision's MNIST in their place."""
    labels = torch.arange(10).repeat_interleave(per_class)
    data = TensorDataset(centres[labels] + torch.randn(len(labels), 1, 28, 28), labels)
    data.targets = labels.tolist()
    return data


benchmark = nc_benchmark(draw(40), draw(10), n_experiences=5, task_labels=False, seed=1)
backbone = timm.create_model(
    "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, embed_dim=48, depth=2, num_heads=3, num_classes=0
)
model = PLoRAModule(backbone, r=4)
evaluation = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[InteractiveLogger()])
strategy = SupervisedTemplate(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), 3e-3),
    criterion=torch.nn.CrossEntropyLoss(),
    train_mb_size=20,
    train_epochs=3,
    eval_mb_size=64,
    plugins=[PLoRAPlugin()],
    evaluator=evaluation,
)
for experience in benchmark.train_stream:
    strategy.train(experience)
    strategy.eval(benchmark.test_stream)
