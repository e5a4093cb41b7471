"""LAMDA-PILOT's EASE out of the checkout that PLORA_PILOT names: its ViT, and its learner with exps/ease.json."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from plora_ext.integrations import pilot


def import_pilot() -> None:
    """Makes the checkout importable, and its log silent."""
    if not (checkout := os.environ.get("PLORA_PILOT")):
        raise SystemExit("PLORA_PILOT must name a checkout of LAMDA-PILOT, it is not set")
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    pilot._old_timm_names()
    logging.disable(logging.INFO)


def ease_vit(device: torch.device, width: int = 768, **size: Any) -> nn.Module:
    """EASE's ViT with heads of 64 and random weights, of which the adapters train."""
    import backbone.vit_ease as vit_ease

    config = SimpleNamespace(
        ffn_adapt=True, ffn_option="parallel", ffn_adapter_layernorm_option="none", ffn_adapter_init_option="lora",
        ffn_adapter_scalar="0.1", ffn_num=64, d_model=width, vpt_on=False, vpt_num=0, _device=device,
    )  # fmt: skip
    with redirect_stdout(io.StringIO()):
        net = vit_ease.VisionTransformer(
            embed_dim=width, num_heads=width // 64, norm_layer=partial(nn.LayerNorm, eps=1e-6), num_classes=0,
            tuning_config=config, **{"patch_size": 16, **size},
        )  # fmt: skip
    net.out_dim = width
    nn.init.normal_(net.patch_embed.proj.weight, std=0.2)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("adapter" in name)
    return net


class PilotData:
    """PILOT's idea of a data set: (images, labels) for training and for tests, and what each goes through."""

    use_path = False

    def __init__(self, train: Any, test: Any, train_trsf: Any = (), test_trsf: Any = (), common_trsf: Any = ()) -> None:
        (self.train_data, self.train_targets), (self.test_data, self.test_targets) = train, test
        self.train_trsf, self.test_trsf, self.common_trsf = map(list, (train_trsf, test_trsf, common_trsf))
        self.class_order = np.unique(self.train_targets).tolist()

    def download_data(self) -> None:
        """There is nothing to download."""


def ease_learner(
    make_vit: Callable[[], nn.Module], make_data: Callable[[dict[str, Any]], Any], *, seed: int, init_cls: int,
    increment: int, epochs: int, workers: int, device: torch.device,
) -> tuple[Any, Any]:  # fmt: skip
    """PILOT's learner and its manager of the tasks: `learner.incremental_train(manager)` learns the next one.

    `make_vit` gives the ViT, of `ease_vit`; `make_data`, from PILOT's arguments, what PILOT takes for a data set.
    """
    import models.ease
    import utils.data_manager
    import utils.inc_net

    arguments = json.loads((Path(os.environ["PLORA_PILOT"]) / "exps" / "ease.json").read_text())
    arguments.update(init_cls=init_cls, increment=increment, init_epochs=epochs, later_epochs=epochs)
    arguments.update(seed=seed, device=[device])
    utils.inc_net.get_backbone = lambda *_: make_vit()
    utils.data_manager._get_idata = lambda *_: make_data(arguments)
    models.ease.num_workers = workers
    manager = utils.data_manager.DataManager("ours", True, seed, init_cls, increment, arguments)
    arguments.update(nb_classes=manager.nb_classes, nb_tasks=manager.nb_tasks)
    with redirect_stdout(io.StringIO()):
        return models.ease.Learner(arguments), manager
