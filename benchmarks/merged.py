"""What it costs not to merge: forwards of a ViT whose adapters are frozen, merged or not, and training steps.

    python benchmarks/merged.py [--model vit_base_patch16_224] [--images 64] [--device cuda]

r = 16 on qkv and proj, bfloat16 on a GPU. Prints the median time of 30 calls in ms, on a GPU by events and by the wall
clock. `host_time.py` has the host's time with many adapters.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from harness import costs, options
from torch import nn

from plora_ext.nn import Ensemble, inject


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a model of timm, with random weights")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    model = timm.create_model(args.model, num_classes=0).to(device, dtype).eval()
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.randn(args.images, *size, device=device, dtype=dtype)
    print(f"{'':44}{'device':>9}{'wall':>11}   ms")

    def show(what: str, call: Callable[[], Any]) -> None:
        found = [costs(call, device) for _ in range(33)][3:]  # the first three warm up
        gpu, wall, _ = (statistics.median(column) for column in zip(*found))
        print(f"{what:44}{gpu if device.type == 'cuda' else wall:9.2f}  {wall:9.2f}", flush=True)

    with torch.no_grad():
        show("no adapters", lambda: model(images))
    adapters = inject(model, ["qkv", "proj"], r=16)
    for i in range(10):
        adapters.add_adapter(f"t{i}")
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.01)
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
