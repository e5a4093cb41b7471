"""The one place for names of torch that are not public; where one is missing, what would need it goes another way.

Without them nothing is eager enough for the short ways (`is_eager`), and the operators are called as torch's dispatcher
does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def _found(module: Any, *names: str) -> Any:
    """The attribute at the end of a path of names, or None."""
    for name in names:
        module = getattr(module, name, None)
    return module


_count_dispatch_modes = _found(torch._C, "_len_torch_dispatch_stack")
_count_function_modes = _found(torch._C, "_len_torch_function_stack")
_tracing_state = _found(torch._C, "_get_tracing_state")
_set_tracing_state = _found(torch._C, "_set_tracing_state")
_top_transform = _found(torch._C, "_functorch", "peek_interpreter_stack")
_all_transforms = _found(torch._C, "_functorch", "get_interpreter_stack")
_transform_type = _found(torch._C, "_functorch", "TransformType")
_is_wrapped = _found(torch._C, "_functorch", "is_functorch_wrapped_tensor")
_unwrap = _found(torch._C, "_functorch", "get_unwrapped")
any_requires_grad = _found(torch._C, "_any_requires_grad")
"""Whether one of these is a tensor that requires a gradient. Only where `is_eager`."""
any_autocast = _found(torch._C, "_is_any_autocast_enabled") or (lambda: True)
"""() → whether autocast is on for some type of device; True where torch does not say."""
_exclude = _found(torch._C, "_ExcludeDispatchKeyGuard")
_key_set, _keys = _found(torch._C, "DispatchKeySet"), _found(torch._C, "DispatchKey")
_softmax_backward = _found(torch, "_softmax_backward_data")
_names_with_kernels = _found(torch._C, "_dispatch_get_registrations_for_dispatch_key")
_own_dispatch = _found(Tensor, "__torch_dispatch__")
_graph_task = _found(torch._C, "_current_graph_task_id")
_saved_tensor_hooks = _found(torch._C, "_autograd", "_top_saved_tensors_default_hooks")
_global_hooks = _found(nn, "modules", "module", "_has_any_global_hook")
tree_leaves = _found(torch.utils, "_pytree", "tree_leaves")
"""The leaves of nested tuples, lists and dictionaries; None where torch does not say."""
tree_map_only = _found(torch.utils, "_pytree", "tree_map_only") or (
    lambda kind, function, value: function(value) if isinstance(value, kind) else value
)
"""(kind, function, tree) → the tree with its leaves of a kind replaced; without torch's, a leaf alone."""
DispatchMode: Any = _found(torch.utils, "_python_dispatch", "TorchDispatchMode")
"""Sees every operator that runs in its `with` block; sees nothing where torch has none."""
if DispatchMode is None or tree_leaves is None:
    DispatchMode, tree_leaves = nullcontext, None
_LEVELS = hasattr(forward_ad, "_current_level")

# Tensors of torch's own tracers: they know compiled operators by their fake implementations.
_TRACED = tuple(
    found
    for file, name in (("fake_tensor", "FakeTensor"), ("functional_tensor", "FunctionalTensor"))
    if (found := _found(torch, "_subclasses", file, name)) is not None
)


def _keys_above() -> Any:
    """The dispatch keys that come before a kernel's: autograd's and autocast's; None where they have other names."""
    names = ["AutogradFunctionality", "ADInplaceOrView", "AutogradOther", "AutogradNestedTensor"]
    keys = [getattr(_keys, name, None) for name in (*names, "AutocastCPU", "AutocastCUDA")]
    if _exclude is None or _key_set is None or None in keys:
        return None
    above = _key_set(keys[0])
    for key in keys[1:]:
        above |= _key_set(key)
    return above


_above = _keys_above()
_EAGER = _LEVELS and not any(
    name is None
    for name in (
        _above, _count_dispatch_modes, _count_function_modes, _tracing_state, _top_transform, any_requires_grad,
    )
)  # fmt: skip
PLAIN = {Tensor, nn.Parameter, type(None), bool, int, float, list}
"""Types of arguments of the operators that behave as torch's own."""


def is_eager() -> bool:
    """Whether this is eager code: nothing traces it, transforms it, differentiates it in forward mode or looks on."""
    return not torch.compiler.is_compiling() and is_unwatched()


def is_unwatched() -> bool:
    """The same of code that is not being compiled."""
    return (
        _EAGER
        and _top_transform() is None
        and forward_ad._current_level < 0
        and not _count_dispatch_modes()
        and not _count_function_modes()
        and _tracing_state() is None
    )


def is_plain(*args: Any) -> bool:
    """Whether this is eager code on plain tensors."""
    return is_eager() and PLAIN.issuperset(map(type, args))


below: Callable[[], AbstractContextManager[Any]] = partial(_exclude or nullcontext, _above)
"""() → a context in which calls go to the kernels themselves, past autograd and autocast. Only where `is_eager`."""


def in_c(overload: Any) -> Any:
    """An operator's overload without the Python around it; for eager code alone."""
    return getattr(overload, "_op", overload)


def forward_mode(*args: Any) -> bool:
    """Whether derivatives are computed in forward mode; by the tensors among these where torch does not say so."""
    if _LEVELS:
        return forward_ad._current_level >= 0
    return any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args)


def _transforms_derive() -> bool:
    """Whether one of torch.func's derivatives, or forward mode, is at work; `vmap` is neither."""
    if _LEVELS and forward_ad._current_level >= 0:
        return True
    if _all_transforms is None or _transform_type is None:
        return False
    derivatives = (_transform_type.Grad, _transform_type.Jvp)
    return any(transform.key() in derivatives for transform in _all_transforms() or ())


# Compiled code belongs to the transforms that it was traced under: what torch.compiler.assume_constant_result says,
# which would import all of the compiler.
_transforms_derive._dynamo_marked_constant = True  # type: ignore[attr-defined]


def needs_twin(*args: Any) -> bool:
    """Whether only torch's own operators serve these: what looks on cannot look into compiled ones.

    That is so for forward mode and torch.func's derivatives, and for tensors whose class says itself what operators do.
    """
    if _transforms_derive():
        return True
    if torch.compiler.is_compiling():
        return False
    own = any(
        isinstance(a, Tensor) and type(a).__torch_dispatch__ != _own_dispatch and not isinstance(a, _TRACED)
        for a in args
    )
    return own or forward_mode(*args)


def unwrapped(t: Tensor) -> Tensor:
    """The tensor that torch.func's transforms look at as others: its values, in another shape under `vmap`."""
    while _is_wrapped is not None and _unwrap is not None and _is_wrapped(t):
        t = _unwrap(t)
    return t


@contextmanager
def untraced() -> Iterator[bool]:
    """What is done within leaves no trace in what `torch.jit.trace` makes; gives whether that is so."""
    state = None if _tracing_state is None else _tracing_state()
    if state is None or _set_tracing_state is None:
        yield state is None
        return
    _set_tracing_state(None)
    try:
        yield True
    finally:
        _set_tracing_state(state)


def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """The gradient of what the softmax p was taken of, from that of p: p (dp - sum p dp), in one kernel if there is."""
    if _softmax_backward is None:
        return p * (dp - (p * dp).sum(-1, keepdim=True))
    return _softmax_backward(dp, p, -1, p.dtype)


def in_backward() -> bool:
    """Whether this thread is inside of a backward pass; False where torch does not say."""
    return _graph_task is not None and _graph_task() != -1


has_saved_tensor_hooks: Callable[[], Any] = partial(_saved_tensor_hooks, True) if _saved_tensor_hooks else lambda: True
"""() → what keeps an eye on saved tensors, as checkpointing does; True where torch does not say."""


has_global_module_hooks: Callable[[], Any] = _global_hooks or (lambda: True)
"""() → whether hooks are registered for every module; True where torch does not say."""


def kernels(key: str) -> list[str]:
    """The operators that have a kernel under a dispatch key, with their overloads; none where torch does not say."""
    return [] if _names_with_kernels is None else list(_names_with_kernels(key))
