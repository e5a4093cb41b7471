"""What must be the same for a run to continue, and what of it may differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import nn

import plora_ext
from plora_ext.cil.settings import Settings, as_before
from plora_ext.cil.stream import Task
from plora_ext.data import ImageFiles, Images, Preparation
from plora_ext.data.images import select

# Settings under which a run may continue that began with others: they say where things are and what is measured, not
# what is computed (what the data and the weights are, their hashes say).
ELSEWHERE = ("out", "plugins", "data", "data_root", "download", "corrupt", "weights", "workers", "cache_images",
             "device", "feature_cache", "ensemble_memory", "measure_drift", "graphs")  # fmt: skip
# Likewise, but results differ by rounding from there on, which is said and recorded.
ROUNDING = ("eval_batch_size", "amp", "tf32", "channels_last", "compile", "deterministic")
TEST_IMAGES = "test images"  # what alone of a learned task may be other when a run goes on


def fingerprint_of(
    settings: Settings, data: Images, tasks: Sequence[Task], backbone: str, preparation: Preparation
) -> dict[str, Any]:
    """What must be the same for a run to continue: settings, data, the backbone's weights (their digest) and input.

    preparation: says where images are in fact cropped, which `transform_on: auto` leaves open.
    """
    kept = {name: value for name, value in settings.as_dict().items() if name not in (*ELSEWHERE, *ROUNDING)}
    kept["transform_on"] = "device" if preparation.on_device else "cpu"
    return {"settings": kept, **data_digests(data, tasks), "backbone": backbone, "input": input_of(preparation)}


def input_of(preparation: Preparation) -> list[Any]:
    """What a backbone takes: the size of its images, mean and std of their colours."""
    return [preparation.image_size, *(list(map(float, of)) for of in (preparation.mean, preparation.std))]


def data_digests(data: Images, tasks: Sequence[Task]) -> dict[str, Any]:
    """Digests of the whole data set, `data`, and of the images and labels of each of the `tasks`.

    `training` holds those of their training images alone, where they are files: pictures are mended and left out.
    """
    parts = [
        Images(select(data.train_images, t.train), t.train_labels, select(data.test_images, t.test), t.test_labels)
        for t in tasks
    ]
    digests = {"data": data.digest(), "tasks": [part.digest() for part in parts]}
    if not isinstance(data.train_images, ImageFiles):
        return digests
    nothing = ImageFiles([]), np.zeros(0, np.int64)
    return {**digests, "training": [Images(p.train_images, p.train_labels, *nothing).digest() for p in parts]}


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits that stand for the weights and buffers of a model."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return weights.hexdigest()[:16]


def refuse_other(
    saved: Mapping[str, Any], here: Mapping[str, Any], what: str, learned: int | None = None
) -> dict[int, str]:
    """Raises ValueError, "`what` of another run", with every difference between two fingerprints, if there is one.

    Args:
        learned: How many tasks the saved run has learned, when the others may have other images, and these, where they
            are files, other test images.

    Returns:
        What each task has that is other.
    """
    names = [name for name in here["settings"] if name not in ELSEWHERE]
    there, chosen = (all_settings(of["settings"], what) for of in (saved, here))
    differences = [
        f"{name} is {there[name]!r} there and {chosen[name]!r} here" for name in names if there[name] != chosen[name]
    ]
    tasks: dict[int, str] = {}
    if not differences and saved["data"] != here["data"]:
        if learned is None or "tasks" not in saved:
            differences.append("the images or labels differ")
        else:
            training, now = (of.get("training") or () for of in (saved, here))
            for task, (before, after) in enumerate(zip_longest(saved["tasks"], here["tasks"])):
                if before != after:
                    same = task < min(len(training), len(now)) and training[task] == now[task]
                    tasks[task] = TEST_IMAGES if same else "images or labels"
            if some := ", ".join(str(t) for t, of in tasks.items() if t < learned and of != TEST_IMAGES):
                differences.append(f"the images or labels differ, those of task {some}, which is learned")
    if not differences and saved["backbone"] != here["backbone"]:
        differences.append("the backbone's weights differ")
    if not differences and "input" in saved and saved["input"] != here["input"]:
        differences.append(f"the backbone's input (size, mean, std) is {saved['input']} there and {here['input']} here")
    if differences:
        raise ValueError(f"{what} of another run: {'; '.join(differences)}")
    return tasks


def all_settings(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All settings, those that `saved` lacks as they were before there was such a setting."""
    unknown = [name for name in saved if name not in {f.name for f in fields(Settings)}]
    if unknown:
        raise ValueError(
            f"{where}: it has settings that this version, {plora_ext.__version__}, does not have: {', '.join(unknown)}"
        )
    given = as_before(saved)
    try:
        made = Settings(**given)
    except ValueError as error:
        try:  # what the plugins have registered may be there by others
            made = Settings(**{**given, "plugins": []})
        except ValueError:
            raise error from None
    return json.loads(json.dumps({**made.as_dict(), "plugins": given.get("plugins", [])}))
