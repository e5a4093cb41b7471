"""TUNA and ACMap, real checkouts or stand-ins: whole runs with and without the patch, from the same random numbers.

Each in a process of its own, since their modules have the names of LAMDA-PILOT's, on the tiny data of `pilot_host`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

START = """
import copy, logging, sys, types
from functools import partial
from types import SimpleNamespace
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
sys.path[:0] = [FOLDER, TESTS]
import pilot_host as host
from plora_ext.integrations import _pilot_vit, pilot
pilot._old_timm_names()
def loader(*args, num_workers=0, **kwargs):
    return DataLoader(*args, **kwargs)
def close(b, a):
    torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * max(1.0, float(a.abs().max())))
def count_passes():
    seen, original = [], _pilot_vit.adapter_features
    def counted(vit, images, adapters, *args):
        seen.append(len(images) * len(adapters))
        return original(vit, images, adapters, *args)
    import plora_ext.integrations._pilot_family as family
    _pilot_vit.adapter_features = family.adapter_features = counted
    return seen
"""

TUNA = """
import backbone.vit_tuna as vit_tuna
import models.tuna
import utils.data_manager
import utils.inc_net
models.tuna.DataLoader = loader
utils.data_manager._get_idata = lambda name, *args: host.Noise(9, 8, 32)
def get_backbone(args, pretrained=False):
    config = SimpleNamespace(
        ffn_adapt=True, ffn_option="parallel", ffn_adapter_layernorm_option="none", ffn_adapter_init_option="lora",
        ffn_adapter_scalar="0.1", ffn_num=16, d_model=768, vpt_on=False, vpt_num=0, _device=args["device"][0],
    )
    vit = vit_tuna.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=0.125, tuning_config=config,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), num_classes=args["nb_classes"],
    )
    nn.init.normal_(vit.patch_embed.proj.weight, std=0.5)
    return vit
utils.inc_net.get_backbone = get_backbone
settings = {
    **host.EASE, "model_name": "tuna", "tuned_epoch": 3, "init_lr": 0.02, "use_orth": True, "reg": 0.1, "m": 0.1,
    "scale": 20.0, "crct_epochs": 3, "ca_lr": 0.05, "ca_storage_efficient_method": "covariance", "decay": False,
}
def learn(**patch):
    state = []
    def after(learner, task):
        vit = learner._network.backbone
        state.append([p.detach().clone() for p in vit.adapter_list.parameters()])
        # (Where the mean of a weight is nearly zero, rounding decides the sign of the merged one.)
        state[-1] += [p.detach().abs() for p in vit.merged_adapter.parameters()]
        state[-1] += [*learner.cls_mean.values()]
        images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(task))
        with torch.no_grad():
            for i in (-1, *range(task + 2 + (task > 0))):
                features = vit(images, adapter_id=i, train=False)["features"]
                state[-1] += [features, learner._network.fc(features)["logits"]]
    return host.learn(settings, after=after), state
theirs, before = learn()
seen = count_passes()
with pilot.patch() as patch:
    ours, after = learn()
    assert len(patch.report.replaced) == 6, patch
for a, b in zip(theirs.predictions, ours.predictions):
    np.testing.assert_array_equal(a, b)
assert ours.curve == theirs.curve and 100 / 9 < ours.curve[-1] < 100, ours.curve
for a, b in zip(before, after):
    assert len(a) == len(b)
    for one, other in zip(a, b):
        close(other, one)
# An evaluation of what was seen takes no pass; without the cache one for each of the three adapters.
for cache, count in ((True, 0), (False, 36 * 3)):
    with pilot.patch(cache=cache):
        if cache:
            ours._eval_cnn(ours.test_loader)
        seen.clear()
        np.testing.assert_array_equal(ours._eval_cnn(ours.test_loader)[0], theirs.predictions[-1])
        assert sum(seen) == count, seen
# "fixed": the general prediction is that of the merged adapter.
vit = ours._network.backbone
shipped, vit.cur_adapter = vit.cur_adapter, vit.merged_adapter
expected = ours._eval_cnn(ours.test_loader)[0]
vit.cur_adapter = shipped
with pilot.patch(tuna="fixed"):
    np.testing.assert_array_equal(ours._eval_cnn(ours.test_loader)[0], expected)
vit.merge()
merged = [p.detach().clone() for p in vit.merged_adapter.parameters()]
with pilot.patch():
    vit.merge()
for one, other in zip(merged, vit.merged_adapter.parameters()):
    close(other, one)
vit.train()
with pilot.patch():  # training is the host's
    torch.manual_seed(0)
    mine = vit(torch.ones(2, 3, 32, 32), adapter_id=2, train=True)["features"]
torch.manual_seed(0)
close(mine, vit(torch.ones(2, 3, 32, 32), adapter_id=2, train=True)["features"])
print("done")
"""

ACMAP = """
for name in ("wandb", "dotenv"):
    sys.modules.setdefault(name, types.ModuleType(name))
sys.modules["dotenv"].load_dotenv = lambda *args: None
import yaml
import acmap.models.acmap as acmap
import acmap.utils.data_manager as data_manager
import acmap.utils.inc_net as inc_net
from acmap.backbone.vit_acmap import VisionTransformer
from acmap.utils.config import Config
from acmap.utils.context import Context
acmap.TOP_K, acmap.DataLoader, data_manager._get_idata = 2, loader, lambda *args: host.Noise(12, 8, 32)
images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
def tiny(config):
    vit = VisionTransformer(config)
    nn.init.normal_(vit.patch_embed.proj.weight, std=0.5)
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_("adapter" in name)
    return vit
inc_net.vit_base_patch16_224_in21k = tiny
settings = yaml.safe_load(open(FOLDER + "/../exps/cifar.yaml"))
settings["transformer"].update(img_size=32, depth=2)
settings["block"]["mlp_ratio"] = 0.25
settings["exp"].update(init_epochs=2, later_epochs=2, num_workers=0, batch_size=10)
settings.update(init_cls=3, increment=3, seed=1, device="cpu", logger="basic", prefix="", debug=True, ckpts_dir="",
                dataset_dir="")
def learn(dropout, frozen_too=False):
    config = copy.deepcopy(settings)
    config["adapter"]["dropout"], config["exp"]["use_init_ptm"] = dropout, frozen_too
    torch.manual_seed(1)
    data = data_manager.DataManager("noise", True, 1, "")
    context = Context(Config(**config), SimpleNamespace(info=lambda text: None), data.class_order)
    learner, found = acmap.Learner(context), []
    for _ in range(3):
        learner.incremental_train(data)
        predicted, targets = learner._eval_cnn(learner.test_loader)
        found.append((predicted, learner.network.fc.weight.detach().clone(), 100 * (predicted[:, 0] == targets).mean()))
        learner.after_task()
    with torch.no_grad():
        torch.manual_seed(2)
        logits = learner.network(images, test=True)["logits"]
    return found, logits, learner
seen = count_passes()
for dropout, frozen_too in ((0.0, False), (0.0, True), (0.1, False)):  # with dropout the host drops in tests, too
    theirs, logits, _ = learn(dropout, frozen_too)
    seen.clear()
    with pilot.patch() as patch:
        assert len(patch.report.replaced) == 4, patch
        ours, same, _ = learn(dropout, frozen_too)
    assert bool(seen) == (dropout == 0)
    close(same, logits)
    assert 100 / 9 < theirs[-1][2] < 100
    for (a, weight, _), (b, other, _) in zip(theirs, ours):
        np.testing.assert_array_equal(a, b)
        close(other, weight)
# "fixed" drops nothing outside training: it is the host's own with its adapters at rest.
with pilot.patch(acmap="fixed"):
    _, logits, learner = learn(0.1)
    weight = learner.network.fc.weight.detach().clone()
    seen.clear()
    del learner.network.protos_list_source[2:]  # as before the last call
    learner.network.replace_fc(learner.train_dataset_for_protonet, learner.train_loader_for_protonet)
    assert sum(seen) == 24 * 3  # one pass over the task's images with three merged adapters
for adapter in (learner.network, *learner.network.merged_adapter_list):
    adapter.eval()
with torch.no_grad():
    close(logits, learner.network(images, test=True)["logits"])
del learner.network.protos_list_source[2:]
learner.network.replace_fc(learner.train_dataset_for_protonet, learner.train_loader_for_protonet)
close(learner.network.fc.weight, weight)
print("done")
"""


@pytest.mark.parametrize("host, code", [("TUNA", TUNA), ("ACMAP", ACMAP)])
def test_whole_runs(host: str, code: str) -> None:
    folder = os.environ.get(f"PLORA_{host}") or str(Path(__file__).parent / "hosts" / host.lower())
    if host == "ACMAP":
        folder = str(Path(folder) / "src")
    names = START.replace("FOLDER", repr(folder)).replace("TESTS", repr(str(Path(__file__).parent)))
    program = names + textwrap.dedent(code).replace("FOLDER", repr(folder))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=280, cwd=folder
    )
    if "No module named" in result.stderr and "plora_ext" not in result.stderr.splitlines()[-1]:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "done"


@pytest.mark.parametrize("name", ["mos", "tuna", "acmap"])
def test_a_value_that_is_neither(name: str) -> None:
    from plora_ext.integrations import pilot

    with pytest.raises(ValueError, match=f'{name} must be "as shipped" or "fixed", got \'broken\''):
        pilot.patch(**{name: "broken"})  # type: ignore[arg-type]
