"""PLoRA in Avalanche: its own strategies and checkpoints, on ten classes of noisy images in five experiences."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

pytest.importorskip("avalanche", reason="needs Avalanche: pip install 'plora_ext[integrations]'")

from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.templates import SupervisedTemplate

from plora_ext.integrations import avalanche as integration


class Backbone(nn.Module):
    """Images [B, 1, 8, 8] to 24 features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.num_features = nn.Linear(64, 40), nn.Linear(40, 24), 24

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return y


def benchmark() -> Any:
    centres = torch.randn(10, 1, 8, 8)

    def draw(n: int) -> TensorDataset:
        labels = torch.arange(10).repeat_interleave(n)
        data = TensorDataset(centres[labels] + torch.randn(len(labels), 1, 8, 8), labels)
        data.targets = labels.tolist()  # type: ignore[attr-defined]
        return data

    return nc_benchmark(draw(24), draw(8), n_experiences=5, task_labels=False, seed=1)


def strategy(model: nn.Module, plugins: list[Any]) -> Any:
    return SupervisedTemplate(
        model=model, optimizer=torch.optim.Adam(model.parameters(), 3e-3), criterion=nn.CrossEntropyLoss(),
        train_mb_size=16, train_epochs=3, eval_mb_size=32, plugins=plugins, evaluator=None,
    )  # fmt: skip


def accuracy(model: nn.Module, experiences: Any) -> float:
    model.eval()
    right = total = 0
    for experience in experiences:
        for image, label, *_ in experience.dataset.eval():
            with torch.no_grad():
                right += int(model(image[None]).argmax() == label)
            total += 1
    return right / total


def plora() -> integration.PLoRAModule:
    return integration.PLoRAModule(Backbone(), target_modules=["fc1", "fc2"], r=4)


def test_it_learns_one_experience_after_another() -> None:
    scenario, model = benchmark(), plora()
    before = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}
    run = strategy(model, [integration.PLoRAPlugin()])
    for i, experience in enumerate(scenario.train_stream):
        run.train(experience)
        run.eval(scenario.test_stream)  # future experiences too: classes that nobody has seen are never predicted
        assert model.net.adapters.names == [f"task{j}" for j in range(i + 1)]
    seen = model.net.bank.classes
    assert seen == list(range(10))
    assert accuracy(model, scenario.test_stream) > 0.6
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())  # frozen stays frozen


def test_evaluation_within_an_experience() -> None:
    """Avalanche's `eval_every` looks before the plugin has the experience's prototypes."""
    scenario, model = benchmark(), plora()
    metric = EvaluationPlugin(accuracy_metrics(experience=True))
    run = SupervisedTemplate(
        model=model, optimizer=torch.optim.Adam(model.parameters(), 3e-3), criterion=nn.CrossEntropyLoss(),
        train_mb_size=16, train_epochs=3, plugins=[integration.PLoRAPlugin()], evaluator=metric, eval_every=1,
    )  # fmt: skip
    for i, experience in enumerate(scenario.train_stream[:2]):
        run.train(experience, eval_streams=[scenario.test_stream[: i + 1]])
        found = metric.get_last_metrics()
        assert len(found) == i + 1 and min(found.values()) > 0.6


def test_logits_of_classes_not_seen() -> None:
    scenario, model = benchmark(), plora()
    run = strategy(model, [integration.PLoRAPlugin()])
    run.train(scenario.train_stream[0])
    run.eval(scenario.test_stream[4:])
    model.eval()
    logits, seen = model(torch.randn(6, 1, 8, 8)), sorted(scenario.train_stream[0].classes_in_this_experience)
    assert logits.shape[1] > max(scenario.test_stream[4].classes_in_this_experience)
    unseen = [c for c in range(logits.shape[1]) if c not in seen]
    assert (logits[:, unseen] == -1000).all() and (logits[:, seen] > -20).all()
    with pytest.raises(ValueError, match="at least one class"):
        model.net.add_task([])


def test_a_fresh_network_takes_over_a_saved_state() -> None:
    scenario, model = benchmark(), plora()
    run = strategy(model, [integration.PLoRAPlugin()])
    for experience in scenario.train_stream[:3]:
        run.train(experience)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = plora()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    images = torch.randn(9, 1, 8, 8)
    torch.testing.assert_close(fresh.eval()(images), model.eval()(images))
    run = strategy(fresh, [integration.PLoRAPlugin()])  # and goes on from there
    run.train(scenario.train_stream[3])
    assert len(fresh.net.adapters.names) == 4 and len(fresh.net.bank.classes) == 8


def test_module_and_plugin_survive_avalanche_s_pickler() -> None:
    """A whole strategy is not pickled here: dill fails on Avalanche's own with recent versions of typing_extensions."""
    dill = pytest.importorskip("dill", reason="Avalanche's checkpoints need dill")
    scenario = benchmark()
    model, plugin = plora(), integration.PLoRAPlugin()
    strategy(model, [plugin]).train(scenario.train_stream[0])
    again = dill.loads(dill.dumps((model, plugin)))
    results = []
    for one, its_plugin in ((model, plugin), again):
        torch.manual_seed(5)
        strategy(one, [its_plugin]).train(scenario.train_stream[1])
        results.append(one.eval()(torch.ones(4, 1, 8, 8)))
    torch.testing.assert_close(*results)


def test_prototype_classifier() -> None:
    scenario, backbone = benchmark(), Backbone()
    classifier = integration.PrototypeClassifier(24)
    model = nn.Sequential(backbone, classifier)
    run = strategy(model, [integration.PrototypePlugin(backbone, classifier)])
    run.model.requires_grad_(False)
    data = scenario.train_stream[0].dataset.eval()
    run.train_epochs = 0
    for experience in scenario.train_stream[:2]:
        run.train(experience)
    label = data[0][1]
    own = torch.stack([image for image, y, *_ in data if y == label])
    torch.testing.assert_close(classifier.bank.prototypes[label], backbone(own).mean(0))
    fresh = integration.PrototypeClassifier(24)
    fresh.load_state_dict(classifier.state_dict())
    features = torch.randn(5, 24)
    known = fresh(features).shape[1]
    torch.testing.assert_close(fresh(features), classifier(features)[:, :known])


def test_frozen_extractors_keep_their_running_statistics() -> None:
    scenario = benchmark()
    for train in (False, True):
        norm = nn.BatchNorm2d(1)
        backbone = nn.Sequential(norm, Backbone()).requires_grad_(train)
        classifier = integration.PrototypeClassifier(24)
        model = nn.Sequential(backbone, classifier)
        model.register_parameter("scale", nn.Parameter(torch.ones(())))  # something for the optimizer
        run = strategy(model, [integration.PrototypePlugin(backbone, classifier)])
        run._criterion = lambda logits, labels, model=model: logits.sum() * model.scale
        run.train(scenario.train_stream[:2])  # as one
        assert norm.num_batches_tracked == (2 * 3 * 3 if train else 0)
        assert bool(norm.running_mean.abs().sum()) is train  # type: ignore[union-attr]
    norm = nn.BatchNorm2d(1)
    module = integration.PLoRAModule(
        nn.Sequential(norm, Backbone()), target_modules=["fc1", "fc2"], r=4, num_features=24
    )
    strategy(module, [integration.PLoRAPlugin()]).train(scenario.train_stream[0])
    assert torch.equal(norm.running_mean, torch.zeros(1))  # type: ignore[arg-type]


def test_an_experience_without_images() -> None:
    empty, model, classifier = (
        SimpleNamespace(classes_in_this_experience=[]),
        plora(),
        integration.PrototypeClassifier(3),
    )
    for module in (model.eval(), classifier):
        module.adaptation(empty)
    assert model.net.num_classes == classifier.num_classes == 0
    with pytest.raises(ValueError, match="classes must hold at least one class to learn"):
        model.train().adaptation(empty)


def test_replayed_images_are_refused() -> None:
    """Their logits are constants, so that they pulled those of the new classes down without a word."""
    scenario, model = benchmark(), plora()
    run = strategy(model, [integration.PLoRAPlugin(), ReplayPlugin(20)])
    run.train(scenario.train_stream[0])
    with pytest.raises(
        ValueError, match=r"classes \[\d, \d\] alone, got \[\d(, \d)?\]: .* leave out plugins that replay"
    ):
        run.train(scenario.train_stream[1])


def test_the_plugin_needs_its_module() -> None:
    run = strategy(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), [integration.PLoRAPlugin()])
    with pytest.raises(TypeError, match="PLoRAModule"):
        run.train(benchmark().train_stream[0])
    with pytest.raises(ValueError, match="num_features"):
        integration.PLoRAModule(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])
