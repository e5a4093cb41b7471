"""A function of tensors as a CUDA graph: one launch in place of the hundreds that a training step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from plora_ext.torch_private import has_global_module_hooks

__all__ = ["Captured", "why_not"]


def why_not(model: nn.Module, parameters: Any = ()) -> str | None:
    """What a graph of `model` would leave out, if anything: Python that is to run in every pass."""
    if has_global_module_hooks():
        return "hooks are registered for all modules"
    for name, module in model.named_modules():
        own = module.__dict__
        if any(own[f"_{kind}_hooks"] for kind in ("forward", "forward_pre", "backward", "backward_pre")):
            return f"{name or 'the model'} has hooks"
    for parameter in parameters:
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return "a parameter has hooks"
    return None


class Captured:
    """`function(*tensors)`, on CUDA replayed as a graph after its first calls.

    The first `warmup` calls run as they are, which lets libraries and optimizers allocate what they keep; the next is
    captured and replayed; from then on a call copies its tensors to where the graph reads them and replays it. Tensors
    of another shape, dtype or device, such as a last batch of fewer images, run as they are. Random numbers on the
    device are those of uncaptured calls.

    What a graph holds is what the device did: the function may not wait for the device or copy from the host, and
    nothing of it that is Python (hooks, counters, choices by a value) happens again. Parameters and buffers are read
    where they were at the capture; replace them, and the graph has to be made anew. Where the capture fails, the
    function runs as it is and `reason` says why; it must not add to what it left then, such as gradients that it does
    not clear before its backward pass: nothing of that was computed.

    A training step, with an optimizer that keeps its state on the device:

        lr = torch.tensor(1e-3, device="cuda")
        optimizer = torch.optim.AdamW(parameters, lr, fused=True, capturable=True)

        def step(images, labels):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = Captured(step)
        for images, labels in batches:
            loss = step(images, labels)

    Args:
        function: of tensors; returns a tensor, or tuples, lists or dicts of tensors.
        warmup: calls before the capture, one or more.
        always: capture even where the last call before took the device longer than the host, so that nothing is gained
            but on a busy host. That call is then not waited for.
        tried: called with this object once a capture has been made, or has failed.

    Attributes:
        reason: why nothing is captured; `None` where it is, or is still to be.
        seconds, bytes: what the capture took, once it has been made.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        warmup: int = 3,
        always: bool = True,
        tried: Callable[[Captured], None] | None = None,
    ):
        self.function, self.warmup, self.always, self.tried = function, warmup, always, tried
        self.reason: str | None = None
        self.seconds, self.bytes = 0.0, 0
        self._like: list[tuple[Any, ...]] | None = None
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: Any = None

    def __call__(self, *tensors: Tensor) -> Any:
        """The function's result; of a graph its own memory, which the next call writes to."""
        like = [(t.shape, t.dtype, t.device) for t in tensors]
        if self._like is None:
            self._like = like
            if len({t.device for t in tensors}) != 1 or tensors[0].device.type != "cuda":
                self.reason = "the tensors are not on a CUDA device"
        if self.reason is not None or like != self._like:
            return self.function(*tensors)
        if self._graph is None:
            self._calls += 1
            if self._calls < self.warmup or (self._calls == self.warmup and self.always):
                return self.function(*tensors)
            if self._calls == self.warmup:
                return self._timed(tensors)
            self._capture(tensors)
            if self.tried:
                self.tried(self)
            if self._graph is None:
                return self.function(*tensors)
        for held, given in zip(self._inputs, tensors, strict=True):
            held.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _timed(self, tensors: tuple[Tensor, ...]) -> Any:
        torch.cuda.synchronize(tensors[0].device)
        start = time.perf_counter()
        outputs = self.function(*tensors)
        host = time.perf_counter()
        torch.cuda.synchronize(tensors[0].device)
        if time.perf_counter() - host > (host - start) / 2:
            self.reason = "the device is what it waits for"
        return outputs

    def report(self) -> str:
        """A few words about the capture."""
        if self.reason is not None:
            return f"not captured: {self.reason}"
        return f"captured in {self.seconds:.2f} s, {self.bytes / 2**20:.0f} MiB"

    def _capture(self, tensors: tuple[Tensor, ...]) -> None:
        device = tensors[0].device
        start = time.perf_counter()
        torch.cuda.synchronize(device)  # a graph that is gone may still read the memory that is given back here
        torch.cuda.empty_cache()  # what the calls before used is not the graph's to use
        before = torch.cuda.memory_reserved(device)
        self._inputs = tuple(t.clone() for t in tensors)
        try:
            with _capturing(device) as graph:
                self._outputs = self.function(*self._inputs)
            torch.cuda.synchronize(device)  # torch has reset the graph's random state on another stream than a replay's
        except RuntimeError as error:
            first: BaseException = error  # those after it say that the capture has ended
            while first.__context__ is not None:
                first = first.__context__
            with _capturing(device):  # and ended, for which torch's generator may still wait
                self._inputs[0].zero_()
            self._inputs, self._outputs, self.reason = (), None, str(first).splitlines()[0]
            return
        self._graph = graph
        self.seconds, self.bytes = time.perf_counter() - start, torch.cuda.memory_reserved(device) - before


_failed: list[torch.cuda.CUDAGraph] = []


@contextmanager
def _capturing(device: torch.device) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what is launched on `device`, on a stream of it, whatever device is the current one."""
    graph, stream = torch.cuda.CUDAGraph(), _side_stream(device)
    torch.clear_autocast_cache()  # a graph would go on with casts of weights that are gone by then
    try:
        # The outer one gives the caller's stream back where the capture fails, as torch then does not.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            yield graph
    except RuntimeError:
        graph.reset()
        _failed.append(graph)  # torch goes on asking it which memory is for it: no other may lie in its place
        raise
    finally:
        torch.clear_autocast_cache()  # nothing is in the graph's own before it is replayed


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
