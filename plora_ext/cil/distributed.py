"""Many processes, one run: what `torchrun` starts together learns as a single process would, each on its own images.

Every process holds the same adapters, prototypes and heads; only the work on images is divided. Of the rows 0 ... n - 1
of anything, the process of rank r among R has r, r + R, r + 2R, ...

    training     each batch of the single process, divided; the gradients of mean losses scaled by own rows / all rows
                 are summed, in one vector, which gives the mean over the whole batch also when it is uneven
    class means  `class_sums` of the own rows, summed over the processes: C D numbers travel
    alignment    the sums of the own rows that it follows from, likewise: two of D x D for the linear drift
    features     where a head learns from them: all rows on every process, n D numbers
    evaluation   every process predicts its own test images; the classes are put together, none twice
    random       order and augmentation are drawn by every process for all images, so that they are those of a single
                 process and a checkpoint does not depend on R; dropout and CutMix are drawn by each for its own images
    files        the process of rank 0 reads and writes the checkpoint, the reports and the console

So results are those of one process up to the order of floating-point sums, except for the draws of dropout and CutMix.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["SINGLE", "Stopped", "World", "gradients", "launched"]

T = TypeVar("T")


class Stopped(RuntimeError):
    """This process ends because another one failed, which says why."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them; by default there is only this one.

    Its methods but `own`, `rows`, `share`, `place` and `own_random` must be called by all processes alike.

    Attributes:
        rank, size: This process among all.
        local_rank, local_size: This process among those of its host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    # ------------------------------------------------------------------ who does what

    def own(self, number: int) -> slice:
        """This process's part of a batch of `number` rows; where there is none for it, row 0 stands in."""
        return slice(self.rank, None, self.size) if self.rank < number else slice(0, 1)

    def share(self, number: int) -> float:
        """Own rows / all rows: what makes the sum over processes of their mean losses the mean over the batch."""
        return len(range(self.rank, number, self.size)) / number

    def rows(self, number: int) -> Tensor:
        """This process's rows of `number`, int64; there may be none."""
        return torch.arange(self.rank, max(number, self.rank), self.size)

    def place(self, device: torch.device) -> torch.device:
        """The device of this process, when the run's is `device`: under many processes a GPU for each.

        Raises:
            ValueError: A GPU by its number, fewer GPUs than processes, or neither GPU nor CPU.
        """
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise ValueError(
                f"device must be auto, cuda or cpu under torchrun, which gives every process its GPU, got '{device}'"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{self.local_size} processes on a host need as many GPUs there, got {torch.cuda.device_count()}: "
                "lower --nproc-per-node"
            )
        return torch.device("cuda", self.local_rank)

    # ------------------------------------------------------------------ what they tell each other

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` returns in the process of rank 0, the only one that calls it; what it raises stops all.

        Raises:
            Stopped: In the other processes, where it raises there.
        """
        if self.size == 1:
            return function()
        said: list[Any] = [None, False]
        failure: Exception | None = None
        if self.first:
            try:
                said[0] = function()
            except Exception as error:
                failure, said[1] = error, True
        dist.broadcast_object_list(said)
        if failure is not None:
            raise failure
        if said[1]:
            raise Stopped("the process of rank 0 failed")
        return said[0]

    def sum_(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Makes every tensor, in place, its sum over the processes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
        return tensors

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Gives every tensor, in place, the values that it has in the process of rank 0."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    whole = tensor.contiguous()
                    dist.broadcast(whole, 0)
                    if whole is not tensor:
                        tensor.copy_(whole)

    def gather(self, own: Tensor, number: int) -> Tensor:
        """All `number` rows, in order, in every process; `own` are those of `rows(number)`."""
        if self.size == 1:
            return own
        most = -(-number // self.size)
        sent = own.new_zeros(most, *own.shape[1:])  # one row more than `own` at most: all must send as many
        sent[: len(own)] = own
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent)
        return torch.stack(parts, 1).flatten(0, 1)[:number]

    def spread(self, compute: Callable[[Any], Tensor], items: Any) -> Tensor:
        """`compute(items)`, a row for each item, where every process computes only its own; all rows in every process.

        Items are a tensor or a view of images. `compute` must not look at the others, and is never called without one.
        """
        if self.size == 1:
            return compute(items)
        rows = self.rows(len(items))
        own = compute(items[rows if len(rows) else torch.zeros(1, dtype=torch.int64)])[: len(rows)]
        return self.gather(own, len(items))

    @contextmanager
    def host_first(self) -> Iterator[None]:
        """Lets one process of each host do something before the others do it: fetch what they then find."""
        if self.size > 1 and self.local_rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.local_rank:
            dist.barrier()

    # ------------------------------------------------------------------ training

    def start_(self, model: nn.Module, learned: Sequence[Tensor]) -> None:
        """Before training: the tensors that train, `learned`, get rank 0's values.

        Raises:
            ValueError: Batch normalisation is in training mode: it would see the rows of one process only.
        """
        if self.size == 1:
            return
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"{name} normalises over the batch, of which each of {self.size} processes sees a part: use one "
                    "process, or a backbone with layer normalisation"
                )
        self.broadcast_(learned)

    def sum_gradients_(self, learned: Sequence[Tensor], own: Tensor) -> None:
        """Gives the tensors that train the sums over the processes of their gradients.

        Args:
            own: This process's, `gradients(learned)`: a few MB, so that all at once take no longer than piece by piece.
        """
        self.sum_(own)
        trained = [tensor for tensor in learned if tensor.grad is not None]
        for tensor, gradient in zip(trained, own.split([tensor.numel() for tensor in trained])):
            tensor.grad = gradient.view_as(tensor).to(tensor.dtype)

    @contextmanager
    def own_random(self, *key: int) -> Iterator[None]:
        """Inside, torch's generators are this rank's own, set by `key`; outside, all processes have the same ones."""
        if self.size == 1:
            yield
            return
        digest = hashlib.sha256(repr((self.rank, *key)).encode()).digest()
        seed, gpu = int.from_bytes(digest[:7], "little"), torch.cuda.is_initialized()
        with torch.random.fork_rng([torch.cuda.current_device()] if gpu else []):
            torch.default_generator.manual_seed(seed)
            if gpu:
                torch.cuda.manual_seed(seed)
            yield


def gradients(learned: Sequence[Tensor]) -> Tensor:
    """The gradients in one vector; a layer that matches target_modules and is never called has an adapter without."""
    return torch.cat([tensor.grad.flatten() for tensor in learned if tensor.grad is not None])


SINGLE = World()


@contextmanager
def launched() -> Iterator[World]:
    """The processes that torchrun started together with this one; without torchrun, this one alone.

    NCCL speaks for GPUs, gloo for the CPU. Where several processes fail, for the same reason or because the others are
    gone, the first one's error stays what it is and the others raise `Stopped`.

    Raises:
        ConnectionError: The other processes cannot be reached, and none of them has said that it failed.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in needed) or os.environ["WORLD_SIZE"] == "1":
        yield SINGLE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if world.local_rank < gpus:
        torch.cuda.set_device(world.local_rank)
    store, _, _ = next(dist.rendezvous("env://", rank, size))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size)
    world.sum_(torch.zeros(1))  # all have met: one that fails right away would leave others without its connection
    try:
        yield world
    except Stopped:
        raise
    except Exception as error:
        # The group is left as it is, for closing it could wait for processes that wait for this one.
        failed = own = str(rank).encode()
        with suppress(RuntimeError):  # torchrun, which holds the store, is gone
            failed = store.compare_set("failed", "", str(rank))
        if failed != own:
            raise Stopped(f"the process of rank {failed.decode()} failed") from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError(f"rank {rank} has lost the other processes: {str(error).splitlines()[0]}") from error
        raise
    else:
        dist.destroy_process_group()
