"""How a model's passes are computed: autocast, TF32, channels-last memory, torch.compile. Not what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from plora_ext.cil.settings import Settings
from plora_ext.graphs import Captured, why_not
from plora_ext.nn import Adapters, MultiLoRALinear

T = TypeVar("T")

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class LastBlock(Block):  # type: ignore[misc, unused-ignore]
    """The last block of a ViT whose feature is the class token's: its MLP computes nothing else."""

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """[B, 1, D] of [B, N, D]."""
        x = (x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **keywords))))[:, :1]
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def skip_unused_tokens(model: nn.Module) -> None:
    """Makes the last block of a timm ViT a `LastBlock`, where its class token alone is asked for.

    A model of another class, and one that drops activations there, stays as it is.
    """
    if type(model) is not VisionTransformer or model.global_pool != "token" or model.attn_pool is not None:
        return
    last = model.blocks[-1]
    drops = [m for m in last.mlp.modules() if isinstance(m, nn.Dropout) and m.p]
    if type(last) is Block and type(last.drop_path2) is nn.Identity and not drops:
        last.__class__ = LastBlock


class Speed:
    """The settings amp, tf32, channels_last and compile, applied in place to one model on `device`.

    torch.compile is applied to the blocks of the model where it has `blocks`: they are alike, so one of them is
    compiled and serves all. Batches smaller than others before, the last of a pass, run uncompiled instead of having a
    graph each.
    """

    def __init__(self, model: nn.Module, settings: Settings, device: torch.device):
        self.model, self.settings, self.device = model, settings, device
        self.dtype = _DTYPES.get(settings.amp)
        self.say: Callable[[str], None] = lambda line: None  # told of what is captured
        self.graphs: dict[str, str] = {}  # what is captured, or why not
        self._rate: Tensor | None = None
        self._largest = {True: 0, False: 0}  # batch so far, with and without gradients
        if settings.init != "inflora":  # which looks at the inputs of layers, of all tokens
            skip_unused_tokens(model)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        if settings.compile:
            for block in getattr(model, "blocks", [model]):
                block.compile(dynamic=False)

    @property
    def context(self) -> tuple[str, ...]:
        """What the bits of a feature depend on beside model and image."""
        s = self.settings
        switches = {"tf32": s.tf32, "channels_last": s.channels_last, "compile": s.compile}
        return s.amp, *(name for name, on in switches.items() if on)

    def forward(self, images: Tensor, model: Callable[[Tensor], Tensor], compiled: bool = True) -> Tensor:
        """`model(images)` in float32; not `compiled`: whatever the settings say. TypeError if it is no tensor."""
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        gradients = torch.is_grad_enabled()
        self._largest[gradients] = max(self._largest[gradients], len(images))
        with self._eager(not compiled or len(images) < self._largest[gradients]), self.autocast():
            features = model(images)
            if not isinstance(features, Tensor):
                raise TypeError(f"the backbone must give one tensor of features, got {type(features).__name__}")
            return features.float()

    def autocast(self) -> torch.autocast:
        """The context of a pass: amp."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @contextmanager
    def passes(self, alone: bool = True) -> Iterator[None]:
        """Around passes through the model, with gradients or without: TF32, merged weights, graphs for every task.

        Args:
            alone: These are passes of the model itself, whose frozen adapters are merged for the while. Otherwise
                something else calls it, an ensemble say: it stays as it is and runs uncompiled.
        """
        graphs = self._eager(not alone)
        if alone and any(isinstance(m, MultiLoRALinear) for m in self.model.modules()):
            adapters = Adapters(self.model)
            graphs = adapters.compilable() if self.settings.compile else adapters.merged()
            if self.settings.compile and torch.is_grad_enabled() and len(adapters.active) > 1:
                torch._dynamo.reset()  # every task has graphs of its own here: those of the last one only add up
        before = torch.get_float32_matmul_precision()
        tf32 = self.settings.tf32 and self.device.type == "cuda"
        try:
            if tf32:
                torch.set_float32_matmul_precision("high")
            with graphs:
                yield
        finally:
            if tf32:
                torch.set_float32_matmul_precision(before)

    def _eager(self, wanted: bool) -> AbstractContextManager[None]:
        return torch.compiler.set_stance("force_eager") if self.settings.compile and wanted else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """The scaler of a loss: of use in float16, where small gradients would vanish, and idle elsewhere."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """The optimizer of the settings; on CUDA with all of its state on the device, for which no step waits."""
        s, cuda = self.settings, self.device.type == "cuda"
        if s.optimizer == "adamw":
            return torch.optim.AdamW(groups, s.lr, fused=cuda or None, capturable=cuda)
        sgd = torch.optim.SGD(groups, s.lr, 0.9, fused=cuda or None)
        for parameter in (p for group in sgd.param_groups for p in group["params"]):
            # A first step that float16's scaler skips would leave the fused kernel's own unwritten.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd

    def set_rate(self, optimizer: torch.optim.Optimizer, value: float) -> None:
        """Set the learning rate, which on CUDA is one number on the device, where a graph reads it."""
        if self.device.type == "cuda":
            if self._rate is None:
                self._rate = torch.zeros((), device=self.device)
            self._rate.fill_(value)
        for group in optimizer.param_groups:
            group["lr"] = value if self._rate is None else self._rate

    def captured(
        self, what: str, function: Callable[..., T], parameters: Iterable[Tensor] = (), batches: int | None = None
    ) -> Callable[..., T]:
        """`function`, replayed as a CUDA graph where the settings and the model allow it.

        Args:
            what: names it in what the run is told, once.
            function: of a batch, and what belongs to it.
            parameters: those that it trains.
            batches: how many will come, where they are few.
        """
        if self.device.type != "cuda" or self.settings.graphs == "off" or (batches is not None and batches < 4):
            return function
        reason = "torch.compile has its own" if self.settings.compile else why_not(self.model, parameters)
        if reason:
            self._record(what, f"not captured: {reason}", True)
            return function
        training = batches is None
        return Captured(
            function, 3 if training else 2, training, lambda made: self._record(what, made.report(), bool(made.reason))
        )

    def _record(self, what: str, line: str, missing: bool) -> None:
        if missing and what == "training" and what not in self.graphs:
            self.say(f"CUDA graph of {what}: {line}")
        self.graphs[what] = line
