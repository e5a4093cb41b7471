"""A frozen backbone stays as it is while adapters train beside it: its parameters, and its buffers as well.

`model.train()` alone lets batch normalisation learn the statistics of the newest task: features of old classes then no
longer fit their prototypes, and a checkpoint, which holds no backbone, is another model. So modules that keep such a
state are in eval mode while the rest (dropout, stochastic depth) is in training mode.

    model.train()
    hold_statistics(model)
    with unchanged(model):
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from plora_ext.change import fingerprint
from plora_ext.cil.packing import rng_state, set_rng_state
from plora_ext.nn import MultiLoRALinear

__all__ = [
    "base_modules",
    "check_backbone",
    "hold_statistics",
    "moving",
    "refuse_adapters",
    "require_gradient",
    "unchanged",
]


def check_backbone(model: nn.Module) -> None:
    """Refuses what cannot be frozen.

    Raises:
        ValueError: A lazily initialised tensor, which has no value yet; batch normalisation without running
            statistics, under which the features of an image depend on the other images of its batch; adapters, as a
            method has left them that was given the same model before; or a classifier (of timm's models).
    """
    refuse_adapters(model)
    timms = type(model).__module__.startswith("timm.") and "forward" not in vars(model)  # others may leave it out
    classifier = getattr(model, "get_classifier", lambda: None)() if timms else None
    if isinstance(classifier, nn.Linear):
        raise ValueError(
            f"the backbone has a classifier of {classifier.out_features} classes, and features would be its logits: "
            "create it with num_classes=0, or call its reset_classifier(0)"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"the backbone's {name} is not initialised: call the backbone on an image first")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"the backbone's {name} normalises over the batch and keeps no running statistics, so that features "
                "depend on the other images of a batch: use another backbone, or track_running_stats=True"
            )


def refuse_adapters(model: nn.Module) -> None:
    """Raises ValueError where a model that is to be the frozen one carries adapters."""
    if any(isinstance(module, MultiLoRALinear) for module in model.modules()):
        raise ValueError(
            "the backbone carries adapters already, so that its features are not those of the frozen model: make it "
            "anew for every run and learner, which change its model in place"
        )


def require_gradient(features: Tensor, adapters: Iterable[Tensor]) -> None:
    """Raises ValueError where adapters are to train and no gradient of the features would reach one."""
    if not features.requires_grad and any(parameter.requires_grad for parameter in adapters):
        raise ValueError(
            "the backbone gives its adapters no gradient, so that they would stay as they are: its forward must "
            "neither run under torch.no_grad nor detach what it computes"
        )


def hold_statistics(model: nn.Module, others: Iterable[nn.Module] = ()) -> None:
    """Puts frozen modules with running statistics into eval mode, and `others`; call it after `model.train()`.

    That is every module with a buffer `running_mean`: batch and instance normalisation and what derives from them.
    """
    for module in model.modules():
        if module._buffers.get("running_mean") is not None and _is_frozen(module):
            module.eval()
    for module in others:
        module.eval()


@torch.no_grad()
def moving(model: nn.Module, forward: Callable[[], object]) -> list[nn.Module]:
    """The further modules to hold: those with a buffer that `forward`, a pass in training mode, writes to.

    Power iterations of a spectral norm, moving averages, counters, noise. `forward` is not called where no frozen
    module has a buffer. Buffers, random generators and the mode (eval) are afterwards as they were before.
    """
    model.train()
    hold_statistics(model)
    has = lambda module: any(buffer is not None for buffer in module._buffers.values())  # noqa: E731
    owners = {prefix: module for prefix, module in _frozen(model) if module.training and has(module)}
    if not owners:
        model.eval()
        return []
    state, before = rng_state(), {prefix: dict(module._buffers) for prefix, module in owners.items()}
    copies = {p: {k: b.clone() for k, b in of.items() if b is not None} for p, of in before.items()}
    try:
        forward()
        moved = [p for p, m in owners.items() if _print(m._buffers, copies[p]) != _print(copies[p], copies[p])]
        for prefix in moved:
            for key, buffer in before[prefix].items():
                if buffer is not None:  # in place, and in its place: others may know it
                    buffer.copy_(copies[prefix][key])
                owners[prefix]._buffers[key] = buffer
        return [owners[prefix] for prefix in moved]
    finally:
        set_rng_state(state)
        model.eval()


@contextmanager
def unchanged(model: nn.Module, parameters: bool = True) -> Iterator[None]:
    """Makes sure that what is frozen is afterwards as it was before: buffers and, on request, parameters.

    Adapters and modules that train are left out.

    Raises:
        ValueError: A tensor has changed; it is named.
    """

    def tensors() -> dict[str, Tensor]:
        of = [(prefix, module._buffers) for prefix, module in _frozen(model)]
        if parameters:
            of += [(prefix, module._parameters) for prefix, module in _frozen(model)]  # type: ignore[misc]
        return {f"{prefix}.{key}".strip("."): t for prefix, some in of for key, t in some.items() if t is not None}

    before = {name: fingerprint(tensor) for name, tensor in tensors().items()}
    yield
    now = {name: fingerprint(tensor) for name, tensor in tensors().items()}
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ValueError(
            f"the frozen backbone's {changed[0]}{more} has changed in training: what was learned of old classes would "
            "no longer fit, nor would a checkpoint: use a backbone whose modules do not write to it"
        )


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name, but for adapted layers and what holds their adapters; the `base_layer` of each is one."""
    layers = [module for module in model.modules() if isinstance(module, MultiLoRALinear)]
    children = [child for layer in layers for name, child in layer.named_children() if name != "base_layer"]
    adapters = {id(part) for child in children for part in child.modules()} | set(map(id, layers))
    return ((name, module) for name, module in model.named_modules() if id(module) not in adapters)


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in base_modules(model) if _is_frozen(module))


def _is_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters(recurse=False))


def _print(tensors: Mapping[str, Tensor | None], of: Iterable[str]) -> str:
    """A fingerprint of the tensors named; one may have been taken away."""
    return fingerprint(*("none" if (t := tensors.get(key)) is None else t for key in of))
