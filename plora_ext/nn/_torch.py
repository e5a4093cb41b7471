"""Questions that only private names of torch answer, guarded: where one is gone, the answer is the careful one."""

from __future__ import annotations

import torch
from torch.nn.modules import module as _module


def in_backward() -> bool:
    """Whether this thread is inside of a backward pass."""
    ask = getattr(torch._C, "_current_graph_task_id", None)
    return ask is not None and ask() != -1


def has_saved_tensor_hooks() -> bool:
    """Whether something keeps an eye on saved tensors, as activation checkpointing does."""
    ask = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
    return ask is None or ask(True) is not None


def has_global_module_hooks() -> bool:
    """Whether hooks are registered for every module."""
    ask = getattr(_module, "_has_any_global_hook", None)
    return ask is None or bool(ask())
