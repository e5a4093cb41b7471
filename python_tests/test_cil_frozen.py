"""A frozen backbone is frozen: no fit moves a parameter or a buffer, whatever its modules do in training mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from test_cil_checkpoint import arrays, settings
from timm.layers import BatchNormAct2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext.cil import Images, run
from plora_ext.cil.build import make_stream, prepare
from plora_ext.cil.checkpoint import Checkpoint
from plora_ext.cil.evaluate import Evaluator
from plora_ext.cil.frozen import hold_statistics, unchanged
from plora_ext.cil.methods import METHODS
from plora_ext.cil.training import Trainer
from plora_ext.data import Backbone, View


class Average(nn.Module):
    """Subtracts a moving average that it calls by a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.level.lerp_(x.mean(), 0.1)
        return x - self.level


class Noise(nn.Module):
    """Draws a buffer anew and puts it in the place of the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("noise", torch.zeros(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.register_buffer("noise", torch.randn(3, 1, 1), persistent=False)
        return x + self.noise


class Counter(nn.Module):
    """Counts its calls in either mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Rescaled(nn.Module):
    """Writes to its parameter, as embeddings with a largest norm do."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.gain.data.mul_(0.99)
        return x * self.gain


class Behind(nn.Module):
    """A small ViT behind a module on images."""

    def __init__(self, front: nn.Module) -> None:
        super().__init__()
        self.front = front
        self.vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=0)
        self.vit.blocks[0].mlp.drop1 = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(self.front(x))


def xcit() -> nn.Module:
    sizes = {"img_size": 16, "depth": 1, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 2}
    return timm.create_model("xcit_nano_12_p16_224", num_classes=0, **sizes)


def old_spectral() -> nn.Module:
    return nn.utils.spectral_norm(nn.Conv2d(3, 3, 1))


def new_spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1))


MODELS: list[Callable[[], nn.Module]] = [
    xcit,
    *(
        lambda make=make: Behind(make())
        for make in (
            lambda: nn.BatchNorm2d(3),
            lambda: nn.BatchNorm2d(3, momentum=0.0),  # nothing moves, but features would depend on the batch
            lambda: nn.SyncBatchNorm(3),
            lambda: BatchNormAct2d(3),
            lambda: nn.InstanceNorm2d(3, track_running_stats=True),
            old_spectral,
            new_spectral,
            Average,
            Noise,
        )
    ),
]


def backbone(make: Callable[[], nn.Module]) -> Backbone:
    torch.manual_seed(0)
    return Backbone(make().eval(), 16, [0.5] * 3, [0.5] * 3)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n.replace(".base_layer", ""): t.clone() for n, t in (*model.named_buffers(), *model.named_parameters())}


@pytest.mark.parametrize("make", MODELS)
def test_nothing_moves_and_the_checkpoint_is_the_model_that_was_measured(
    make: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, s, given = Images(**arrays()), settings(target_modules=["qkv"], lora_dropout=0.1), backbone(make)
    modes: list[dict[str, bool]] = []
    epoch = View.epoch

    def watched(self: View, *args, **keywords):
        modes.append({name: module.training for name, module in given.model.named_modules()})
        return epoch(self, *args, **keywords)

    monkeypatch.setattr(View, "epoch", watched)
    before = tensors(given.model)
    result = run(s, data=data, backbone=given, checkpoint=Checkpoint(tmp_path))
    after = tensors(given.model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert modes
    for name, module in given.model.named_modules():  # all else trains: dropout, stochastic depth, adapters
        if isinstance(module, nn.Dropout) or "lora" in name:
            assert all(mode[name] for mode in modes if name in mode)

    fresh = backbone(make)
    trainer = Trainer(fresh.model.requires_grad_(False), s, torch.device("cpu"))
    method = METHODS[s.method](trainer, s)
    method.restore(Checkpoint(tmp_path, resume=True).load()["state"])
    stream = make_stream(s, data)
    images = View(data.test_images, prepare(s, fresh, trainer.device))
    curve, row = Evaluator(method, stream.tasks, images, stream.task_of_class()).after(2)
    assert (curve, row) == (result.curve[-1:], result.matrix[-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Behind(Counter()), "backbone's front.calls has changed in training"),
        (lambda: Behind(Rescaled()), "backbone's front.gain has changed in training"),
        (lambda: Behind(nn.BatchNorm2d(3, track_running_stats=False)), "backbone's front normalises over the batch"),
        (lambda: Behind(nn.LazyConv2d(3, 1)), "backbone's front.weight is not initialised"),
        (lambda: Behind(nn.LazyBatchNorm2d()), "backbone's front.weight is not initialised"),
    ],
)
def test_what_cannot_be_frozen_is_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(settings(), data=Images(**arrays()), backbone=backbone(make))


def test_a_look_at_the_model_draws_no_random_number() -> None:
    """A backbone with a buffer that does not move trains as one without."""

    class Fixed(nn.Identity):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(2))

    s = settings(lora_dropout=0.2)
    fixed = run(s, data=Images(**arrays()), backbone=backbone(lambda: Behind(Fixed())))
    plain = run(s, data=Images(**arrays()), backbone=backbone(lambda: Behind(nn.Identity())))
    assert fixed.curve == plain.curve


def test_what_trains_may_move() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4).requires_grad_(False))
    model.train()
    hold_statistics(model)
    assert model[0].training and not model[1].training
    with unchanged(model):
        model(torch.randn(8, 4))
    assert model[0].running_mean.abs().sum() > 0 and not model[1].running_mean.any()
    model[1].train()
    with pytest.raises(ValueError, match=r"backbone's 1\.running_mean \(and 2 more\) has changed"), unchanged(model):
        model(torch.randn(8, 4))
