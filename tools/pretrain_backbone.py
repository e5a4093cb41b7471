"""Pretrains the embedded backbone: a small ViT, by masked autoencoding of logos, flags and emoji (never Icon-100).

    python tools/pretrain_backbone.py pretraining.npz --out plora_ext/data

The set (tools/build_pretraining_set.py makes it) lives on the device as uint8, and whole batches are augmented there:
at this model size a data loader would be the bottleneck. Labels are only used to measure. Autoencoding is a choice made
with Icon-100 in view: classifying the same drawings gives features that know most of its concepts already (73 to 78 %
by frozen class means, a few minutes on a GPU), which leaves little for any method to learn.
Writes backbone.safetensors, backbone.json, backbone_metrics.json and MODEL_CARD.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from plora_ext.data import load_icon100, random_affine, to_tensor

MEAN = STD = (0.5, 0.5, 0.5)


class MaskedAutoencoder(nn.Module):
    """Masked autoencoding (He et al., CVPR 2022): the backbone sees 40 % of the patches, a decoder draws the rest.

    The loss is the squared error over the hidden patches, each normalised by its own mean and deviation.
    """

    def __init__(self, backbone: VisionTransformer, patch_size: int, width: int = 96, visible: float = 0.4) -> None:
        super().__init__()
        self.backbone, self.patch_size = backbone, patch_size
        patches = backbone.patch_embed.num_patches
        self.num_visible = max(1, int(patches * visible))
        self.embed = nn.Linear(backbone.embed_dim, width)
        self.hidden = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, patches, width) * 0.02)
        self.blocks = nn.Sequential(Block(width, 3), Block(width, 3), nn.LayerNorm(width))
        self.draw = nn.Linear(width, 3 * patch_size**2)

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        tokens = self.backbone.patch_embed(images) + self.backbone.pos_embed
        n, patches, dim = tokens.shape
        order = torch.rand(n, patches, generator=generator, device=images.device).argsort(1)
        seen = order[:, : self.num_visible, None]
        encoded = self.embed(self.backbone.blocks(tokens.gather(1, seen.expand(-1, -1, dim))))
        width = encoded.shape[2]
        rest = self.hidden.to(encoded.dtype).expand(n, patches - self.num_visible, width)
        restore = order.argsort(1)[..., None].expand(-1, -1, width)
        drawn = self.draw(self.blocks(torch.cat([encoded, rest], 1).gather(1, restore) + self.position)).float()

        side, p = images.shape[-1] // self.patch_size, self.patch_size
        target = images.view(n, 3, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(n, patches, -1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-2).sqrt()
        mask = torch.ones(n, patches, device=images.device).scatter_(1, order[:, : self.num_visible], 0)
        return ((drawn - target).square().mean(-1) * mask).sum() / mask.sum()


def augment(images: Tensor, image_size: int, generator: torch.Generator) -> Tensor:
    """Geometry, colour, erasing; uint8 [N, 64, 64, 3] -> float32 [N, 3, image_size, image_size] in [-1, 1]."""
    number = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(number, *shape, generator=generator, device=images.device) * (high - low) + low

    def chosen(share: float) -> Tensor:
        return uniform(0, 1, 1, 1, 1) < share

    x = images.permute(0, 3, 1, 2).float() / 255
    x = random_affine(x, generator, zoom=(0.75, 1.35), stretch=1.25, shift=0.1, rotate=15)
    if x.shape[-1] != image_size:
        x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", antialias=True)
    grey = x.mean(dim=1, keepdim=True).expand_as(x)
    x = torch.where(chosen(0.5), grey, x)  # colour tells a logo, not an icon
    ink = ((0.5 + uniform(-0.2, 0.2, 1, 1, 1) - grey) * -20).sigmoid()  # a drawing in black and white
    x = torch.where(chosen(0.25), ink, x)
    x = torch.where(chosen(0.1), 1 - x, x)
    x = 1 - (1 - x) * uniform(0.6, 1.2, 3, 1, 1)  # paler or darker and tinted, still on white

    # Erase one rectangle of up to half the side from some pictures, with a grey of its own.
    axis = torch.arange(image_size, device=x.device).view(1, -1) / image_size
    centre, half = uniform(0, 1, 2, 1), uniform(0.05, 0.25, 2, 1)
    rows, columns = ((axis - centre[:, i]).abs() < half[:, i] for i in (0, 1))
    hole = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1) & chosen(0.4)
    x = torch.where(hole, uniform(0, 1, 1, 1, 1), x)
    return x.clamp(0, 1) * 2 - 1


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part).float() for part in images.split(1024)])


def nearest_mean_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Share of test features whose most similar class mean (cosine) is their own class's, in percent."""
    sums = torch.zeros(int(train_labels.max()) + 1, train.shape[1], device=train.device)
    means = sums.index_add_(0, train_labels, train)
    prediction = (F.normalize(test, dim=-1) @ F.normalize(means, dim=-1).T).argmax(dim=1)
    return 100 * (prediction == test_labels).float().mean().item()


def schedule(progress: float, warm_up: float = 0.05) -> float:
    """Learning-rate factor: linear warm-up, then a half cosine to zero; progress in [0, 1]."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up))))


def pretrain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, evaluates and writes everything; returns the metrics."""
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    generator = torch.Generator(device).manual_seed(arguments.seed)

    with np.load(arguments.data, allow_pickle=False) as file:
        info = json.loads(file["info"].tobytes())
        images = torch.from_numpy(file["images"]).to(device)
        labels = torch.from_numpy(file["labels"].astype(np.int64)).to(device)
        held_out = torch.from_numpy(file["held_out"]).to(device)
    train_images, train_labels = images[~held_out], labels[~held_out]
    num_classes = len(info["class_names"])

    architecture = {
        "img_size": arguments.img_size, "patch_size": arguments.patch_size, "embed_dim": arguments.dim,
        "depth": arguments.depth, "num_heads": arguments.heads, "num_classes": 0,
        "global_pool": "avg", "class_token": False,
    }  # fmt: skip
    model = VisionTransformer(**architecture, drop_path_rate=arguments.drop_path).to(device)
    autoencoder = MaskedAutoencoder(model, arguments.patch_size).to(device)
    parameters = list(autoencoder.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, fused=device.type == "cuda")

    batch_size = min(arguments.batch_size, len(train_images))
    steps_per_epoch = len(train_images) // batch_size
    start, epoch, loss_sum, log = time.perf_counter(), 0, torch.zeros((), device=device), []

    def minutes() -> float:
        return (time.perf_counter() - start) / 60

    def progress() -> float:  # whichever limit is nearer, so that the cosine always ends at zero
        return max(epoch / arguments.epochs, minutes() / arguments.minutes if arguments.minutes else 0.0)

    def held_out_accuracy() -> float:
        model.eval()
        views = (to_tensor(part, arguments.img_size, MEAN, STD) for part in (train_images, images[held_out]))
        train, test = (features_of(model, view) for view in views)
        model.train()
        return nearest_mean_accuracy(train, train_labels, test, labels[held_out])

    while progress() < 1:
        order = torch.randperm(len(train_images), generator=generator, device=device)
        rate = schedule(progress() + 0.5 / arguments.epochs) * arguments.lr
        for group in optimizer.param_groups:
            group["lr"] = rate
        for index in order[: steps_per_epoch * batch_size].split(batch_size):
            batch = augment(train_images[index], arguments.img_size, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = autoencoder(batch, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            loss_sum += loss.detach()
        epoch += 1
        if epoch % arguments.log_every == 0:
            mean_loss = loss_sum.item() / (steps_per_epoch * arguments.log_every)
            if not math.isfinite(mean_loss):
                raise SystemExit(f"pretrain: the loss is {mean_loss} at epoch {epoch}; lower --lr (now {arguments.lr})")
            speed = epoch * steps_per_epoch * batch_size / (minutes() * 60)
            log.append({"epoch": epoch, "loss": mean_loss, "held_out": round(held_out_accuracy(), 2)})
            print(f"epoch {epoch:5d}  {minutes():5.1f} min  {speed:9.0f} images/s  loss {mean_loss:.4f}  "
                  f"held-out {log[-1]['held_out']:.2f} %", flush=True)  # fmt: skip
            loss_sum.zero_()

    model.eval()
    icon100 = load_icon100()
    icon_features = [
        features_of(model, to_tensor(part, arguments.img_size, MEAN, STD, device))
        for part in (icon100.train_images, icon100.test_images)
    ]
    icon_labels = [torch.from_numpy(part).to(device) for part in (icon100.train_labels, icon100.test_labels)]
    metrics = {
        "held_out_accuracy": round(held_out_accuracy(), 2),
        "icon100_frozen_accuracy": round(
            nearest_mean_accuracy(icon_features[0], icon_labels[0], icon_features[1], icon_labels[1]), 2
        ),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epoch, "minutes": round(minutes(), 2), "training_images": len(train_images), "classes": num_classes,
        "sets": {name: entry["spdx"] for name, entry in info["sets"].items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__, "command": command_line(arguments), "arguments": plain(arguments), "log": log,
    }  # fmt: skip
    write(arguments.out, model, architecture, metrics)
    shown = ("held_out_accuracy", "icon100_frozen_accuracy", "epochs", "minutes")
    print(json.dumps({key: metrics[key] for key in shown}))
    return metrics


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}


def command_line(arguments: argparse.Namespace) -> str:
    options = (f"--{key.replace('_', '-')} {value}" for key, value in plain(arguments).items() if value is not None)
    return "python tools/pretrain_backbone.py pretraining.npz --out plora_ext/data " + " ".join(options)


def write(out: Path, model: nn.Module, architecture: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Weights, description, metrics and model card; each under a temporary name first, the description last."""
    out.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().float().cpu().contiguous() for key, value in model.state_dict().items()}
    description = {"architecture": architecture, "mean": MEAN, "std": STD}
    (out / "backbone.safetensors.tmp").write_bytes(save(state))
    (out / "backbone_metrics.json.tmp").write_text(json.dumps(metrics, indent=1) + "\n")
    (out / "MODEL_CARD.md.tmp").write_text(model_card(architecture, metrics))
    (out / "backbone.json.tmp").write_text(json.dumps(description, indent=1) + "\n")
    for name in ("backbone.safetensors", "backbone_metrics.json", "MODEL_CARD.md", "backbone.json"):
        os.replace(out / f"{name}.tmp", out / name)


def model_card(architecture: dict[str, Any], metrics: dict[str, Any]) -> str:
    a, m = architecture, metrics
    sets = ", ".join(f"{name} ({licence})" for name, licence in m["sets"].items())
    return f"""# The embedded backbone

A small vision transformer, the frozen starting point of the embedded benchmark. It is made to be cheap on two CPU
cores and to know pictures, but none of the benchmark's concepts, as ImageNet weights do on the usual benchmarks.

| | |
|---|---|
| architecture | timm `VisionTransformer`, {a["img_size"]} px, patch {a["patch_size"]}, width {a["embed_dim"]}, \
depth {a["depth"]}, {a["num_heads"]} heads, pooling `{a["global_pool"]}`, {m["parameters"] / 1e6:.2f} M parameters |
| input | RGB, normalised with mean 0.5 and standard deviation 0.5 |
| data | {m["training_images"]} drawings of {m["classes"]} logos, national flags and emoji, from the npm package \
`@iconify/json` 2.2.535 (`tools/build_pretraining_set.py`) |
| apart from Icon-100 | other icon sets; no concept sharing a word or a near synonym with the 100; \
no (nearly) equal picture |
| task | masked autoencoding (He et al., CVPR 2022), 60 % of the patches hidden; no label is used, \
the decoder is dropped |
| held-out accuracy | {m["held_out_accuracy"]:.1f} % over {m["classes"]} pretraining classes, one unseen drawing \
of each, nearest class mean by cosine of the frozen features |
| frozen on Icon-100 | {m["icon100_frozen_accuracy"]:.1f} %, nearest class mean by cosine |
| training | {m["epochs"]} epochs, {m["minutes"]:.1f} minutes on {m["device"]}, torch {m["torch"]}, \
seed {m["arguments"]["seed"]} |

Command:

```
{m["command"]}
```

The task and the size were chosen with Icon-100 in view: the frozen features are meant to leave something to learn
there, between 35 and 65 % by nearest class mean. Classifying the same drawings instead gave 73 to 78 %.

The weights are licensed like this package. The drawings are under permissive licences: {sets}.
Brand names and logos belong to their owners; the weights hold none of the drawings.
"""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Pretrains the embedded backbone.")
    parser.add_argument("data", type=Path, help="the .npz of tools/build_pretraining_set.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--img-size", type=int, default=48)
    parser.add_argument("--patch-size", type=int, default=12)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--drop-path", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; the schedule adapts")
    parser.add_argument("--log-every", type=int, default=10, help="epochs between two lines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.dim % arguments.heads or arguments.img_size % arguments.patch_size:
        parser.error("--heads must divide --dim, and --patch-size must divide --img-size")
    if arguments.epochs < 1 or arguments.batch_size < 1:
        parser.error("--epochs and --batch-size must be positive")
    return pretrain(arguments)


if __name__ == "__main__":
    main()
