"""What settings name, made: data, backbone, device, tasks, preparation of images, feature cache, random generators."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from plora_ext.cil.distributed import SINGLE, World
from plora_ext.cil.features import FeatureCache
from plora_ext.cil.packing import rng_state, set_rng_state
from plora_ext.cil.registry import BACKBONES
from plora_ext.cil.settings import Settings
from plora_ext.cil.stream import Task, TaskStream
from plora_ext.cil.training import Trainer
from plora_ext.data import Backbone, Images, Preparation, create_backbone, hold_out, load_images
from plora_ext.data.images import first_line
from plora_ext.data.view import SHARE


def load_data(settings: Settings) -> Images:
    """The data set that the settings name, as much held out as they say; raises what `load_images` does."""
    s = settings
    loaded = load_images(s.data, s.data_root, download=s.download, corrupt=s.corrupt, test=not s.validation)
    return hold_out(replace(loaded, source=s.data), s.validation)


def load_backbone(settings: Settings) -> Backbone:
    """The backbone that the settings name; raises what `plora_ext.data.create_backbone` does."""
    s = settings
    weights = None if s.weights == "random" else s.weights
    if s.backbone in BACKBONES:
        return BACKBONES[s.backbone](s.weights != "random", weights, s.image_size)
    return create_backbone(s.backbone, s.weights != "random", weights=weights, image_size=s.image_size)


def prepare(settings: Settings, backbone: Backbone, device: torch.device, world: World = SINGLE) -> Preparation:
    """How images become the backbone's input under the settings."""
    s, cores = settings, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mean, std = (backbone.mean, backbone.std) if s.normalize == "backbone" else ([0.0] * 3, [1.0] * 3)
    own = cores // world.local_size
    most = own // 8 if device.type == "cpu" else max(own, 1)  # a CPU's cores are the model's
    workers = min(8, most) if s.workers is None else s.workers
    on_device = {"auto": None, "cpu": False, "device": True}[s.transform_on]
    cache = SHARE / world.local_size if s.cache_images else 0.0
    return Preparation(backbone.image_size, mean, std, device, s.transform, s.augment, workers, on_device, cache)


def make_stream(settings: Settings, data: Images) -> TaskStream:
    """The task stream that the settings ask for."""
    s, seed = settings, settings.seed if settings.order_seed is None else settings.order_seed
    return TaskStream(data.train_labels, data.test_labels, s.init_cls, s.increment, seed, s.class_order, s.tasks)


def tasks_of(settings: Settings, stream: TaskStream) -> list[Task]:
    """The tasks that the method learns: for joint one, of all classes."""
    return [stream.joined()] if settings.method == "joint" else stream.tasks


def pick_device(device: str) -> torch.device:
    """The setting `device` as a torch device; "auto" is CUDA where there is a GPU and the CPU elsewhere.

    Raises:
        ValueError: A device that torch does not know or does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if (kind := torch.device(device).type) not in ("cpu", "cuda"):
            raise RuntimeError(f"it must be auto, cpu or cuda, not {kind}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {first_line(error)[:200]}") from error
    return torch.device(device)


def make_cache(settings: Settings, trainer: Trainer) -> FeatureCache | None:
    """What the setting `feature_cache` asks for."""
    if settings.feature_cache == "none":
        return None
    folder = None if settings.feature_cache == "auto" else settings.feature_cache
    return FeatureCache(folder, device=trainer.device, say=trainer.callbacks.note)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds the global generators of Python, numpy and torch.

    With `deterministic`, from here on in the whole process, torch takes algorithms that repeat, also on a GPU, and
    raises a RuntimeError that names an operation which has none.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)


class Generators:
    """The global random generators as one run has them: inside its blocks they are seeded, and go on where one ended.

    Outside they are as if there had been no block; likewise torch's switch of deterministic algorithms. Inside,
    whatever the caller has chosen, gradients can be recorded, numbers are float32 and on the CPU where nothing else is
    said, and there is no autocast but that of the settings. One thread at a time is inside, of whatever run: all of
    this is the process's.
    """

    _lock = threading.RLock()

    def __init__(self, settings: Settings, device: torch.device):
        self.settings, self.device = settings, device
        self.state: dict[str, Any] | None = None  # as the last block left it

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock, self._seeded():
            yield

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.init()  # else its generators have no state yet
        before, deterministic = rng_state(), torch.are_deterministic_algorithms_enabled()
        warn_only, dtype = torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_default_dtype()
        try:
            seed_everything(self.settings.seed, self.settings.deterministic)
            if self.state is not None:
                set_rng_state(self.state)
            torch.set_default_dtype(torch.float32)
            # A mode that every call of torch goes through: not where it would change nothing.
            place = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
            autocast = torch.autocast(self.device.type, enabled=False)
            with torch.inference_mode(False), torch.enable_grad(), place, autocast:
                yield
        finally:
            torch.set_default_dtype(dtype)
            self.state = rng_state()
            set_rng_state(before)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
