"""What it costs not to merge: forwards of a ViT whose adapters are frozen, merged or not, and training steps.

    python benchmarks/merged.py [--model vit_base_patch16_224] [--images 64] [--device cuda]
    python benchmarks/merged.py --host

r = 16 on qkv and proj, bfloat16 on a GPU. Prints the median time of 30 calls in ms, on a GPU by events and by the
wall clock.

--host: the tenth percentile of 300 forwards without gradients through 24 linear layers of width 64 with T adapters of
rank 8, 4 rows, one thread of a CPU: next to no arithmetic at T = 1. `read` sums up the numbers of all adapters, which
is the least that a check of their content could cost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from harness import options
from torch import nn

from plora_ext.nn import Adapters, Ensemble, inject


def median(call: Callable[[], Any], cuda: bool) -> str:
    times: list[tuple[float, float]] = []
    for number in range(33):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        start = time.perf_counter()
        for event in events[:1]:
            event.record()
        call()
        for event in events[1:]:
            event.record()
            torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - start)
        if number >= 3:  # warm
            times.append((events[0].elapsed_time(events[1]) if cuda else wall, wall))
    return "  ".join(f"{statistics.median(column):9.2f}" for column in zip(*times))


def adapted(model: nn.Module, number: int) -> Adapters:
    adapters = inject(model, ["qkv", "proj"], r=16)
    for i in range(number):
        adapters.add_adapter(f"t{i}")
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.01)
    return adapters


@torch.no_grad()
def host() -> None:
    torch.set_num_threads(1)

    def p10(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(310):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.quantiles(times[10:], n=10)[0]

    def sums(parts: list[torch.Tensor]) -> None:
        for part in parts:
            part.sum()

    x = torch.randn(4, 64)
    print(f"{'T':>4}{'plain':>10}{'adapted':>10}{'merged':>10}{'read':>10}   ms")
    for T in (1, 10, 200):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(24)))
        plain = p10(partial(model, x))
        adapters = inject(model, "all-linear", r=8)
        for t in range(T):
            adapters.add_adapter(f"t{t}")
        adapters.train_adapter(None)
        adapters.set_adapter(adapters.names)
        as_it_is = p10(partial(model, x))
        with adapters.merged():
            merged = p10(partial(model, x))
        numbers = [torch.cat([p.flatten() for p in adapters.parameters()[i::24]]) for i in range(24)]
        read = p10(partial(sums, numbers))
        print(f"{T:4}" + "".join(f"{ms:10.3f}" for ms in (plain, as_it_is, merged, read)), flush=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--host", action="store_true", help="the host's time with 1, 10 and 200 adapters")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a model of timm, with random weights")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.host:
        return host()
    cuda = args.device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32

    model = timm.create_model(args.model, num_classes=0).to(args.device, dtype).eval()
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.randn(args.images, *size, device=args.device, dtype=dtype)
    print(f"{'':44}{'device':>9}{'wall':>11}   ms")

    def show(what: str, call: Callable[[], Any]) -> None:
        print(f"{what:44}{median(call, cuda)}", flush=True)

    with torch.no_grad():
        show("no adapters", lambda: model(images))
    adapters = adapted(model, 10)
    adapters.train_adapter(None)
    with torch.no_grad():
        for names in (["t0"], adapters.names):
            adapters.set_adapter(names)
            show(f"{len(names)} frozen", lambda: model(images))
            show(f"{len(names)} frozen, one image", lambda: model(images[:1]))
            with adapters.merged():
                show(f"{len(names)} frozen, merged", lambda: model(images))
        with adapters.batch([i % 10 for i in range(len(images))]):
            show("batch of 10", lambda: model(images))
        ensemble = Ensemble(adapters)
        show("Ensemble of 10, 16 images", lambda: ensemble(images[:16]))
    adapters.set_adapter("t9")
    adapters.train_adapter("t9")
    model.train()
    optimizer = torch.optim.AdamW(adapters.parameters("t9"), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(images).float().square().mean().backward()
        optimizer.step()

    show(f"training step in {dtype}", step)


if __name__ == "__main__":
    main()
