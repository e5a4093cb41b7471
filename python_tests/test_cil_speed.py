"""What makes a run fast (loading, transforms on the device, precision, compiling) leaves its results what they are."""

from __future__ import annotations

import copy
import io
import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch._dynamo.utils import counters
from torchvision.transforms import InterpolationMode, v2

import plora_ext
from plora_ext.cil import Images, Result, Settings, run
from plora_ext.cil.build import prepare
from plora_ext.cil.checkpoint import Checkpoint
from plora_ext.cil.speed import Speed
from plora_ext.data import Backbone, ImageFiles, Preparation, View, loader
from plora_ext.data import resample as resampling
from plora_ext.data import view as views
from plora_ext.data.decoded import Decoded
from plora_ext.data.resample import center, random_crop, random_numbers, resample, whole
from plora_ext.report.console import ConsoleProgress

SCALE, RATIO = (0.05, 1.0), (3 / 4, 4 / 3)


def pixels(number: int, height: int = 12, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def files(folder: Path, sizes: list[tuple[int, int]]) -> ImageFiles:
    paths = [folder / f"{i}.png" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes)):
        Image.fromarray(pixels(1, *size, seed=i)[0]).save(path)
    return ImageFiles(paths)


def view(images: np.ndarray | ImageFiles, **changes) -> View:
    return View(images, Preparation(**{"image_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3, **changes}))


def batches(v: View, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An epoch, and all images by the test transform."""
    torch.manual_seed(seed)
    order = torch.randperm(len(v))
    trained = torch.cat([batch for _, batch in v.epoch(order, 3)])
    return trained, torch.cat(list(v.split(4)))


# ---------------------------------------------------------------------- transforms on the device


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 56), (90, 131, 56), (131, 90, 24), (7, 9, 24)])
def test_resampling_is_torchvisions(height: int, width: int, size: int, device: torch.device) -> None:
    images = torch.from_numpy(pixels(3, height, width)).to(device)
    sizes = torch.tensor([[height, width]] * 3)
    plain = images.permute(0, 3, 1, 2).float()

    def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # of 255

    stretched = F.interpolate(plain, (size, size), mode="bilinear", antialias=True)
    close(resample(images, whole(sizes, size), size), stretched)
    larger = v2.functional.resize(plain, [256 * size // 224], InterpolationMode.BICUBIC, antialias=True)
    middle = v2.functional.center_crop(larger, [size, size]).clamp(0, 255)
    close(resample(images, center(sizes, 256 * size // 224, size), size, "bicubic"), middle)
    windows, flip = random_crop(sizes, random_numbers(3), size, SCALE, RATIO)
    ours = resample(images, windows, size, "bilinear", torch.tensor([True, False, True]))
    for i, (start, extent) in enumerate(zip(windows[:, 0].T.tolist(), windows[:, 1].T.tolist())):
        crop = v2.functional.resized_crop(plain[i], *start, *extent, [size, size], antialias=True)
        close(ours[i], crop if i == 1 else crop.flip(-1))
    assert flip.dtype == torch.bool


def test_padding_is_never_seen() -> None:
    images = torch.full((2, 20, 20, 3), 255, dtype=torch.uint8)
    images[0, 9:], images[0, :, 15:] = 0, 0  # the padding of an image of 9 x 15
    sizes = torch.tensor([[9, 15], [20, 20]])
    for windows in (
        whole(sizes, 12),
        center(sizes, 13, 12),
        random_crop(sizes, random_numbers(2), 12, SCALE, RATIO)[0],
    ):
        for kernel in ("bilinear", "bicubic"):
            torch.testing.assert_close(resample(images, windows, 12, kernel), torch.full((2, 3, 12, 12), 255.0))


def test_random_crops_are_distributed_as_torchvisions() -> None:
    sizes = torch.tensor([[60, 90]]).expand(4000, 2)
    windows, flip = random_crop(sizes, random_numbers(4000), 24, SCALE, RATIO)
    crop, image = v2.RandomResizedCrop(24, SCALE, RATIO), torch.empty(3, 60, 90)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[d[k] for k in ("top", "left", "height", "width")] for d in drawn])
    ours = torch.cat([windows[:, 0], windows[:, 1]]).T
    assert bool((ours[:, :2] >= 0).all()) and bool((ours[:, :2] + ours[:, 2:] <= sizes).all())
    spread = theirs.double().std(0) * (2 / 4000) ** 0.5
    assert bool(((ours.double().mean(0) - theirs.double().mean(0)).abs() < 5 * spread).all())
    assert abs(float(flip.double().mean()) - 0.5) < 0.05


def test_a_long_image_gets_a_central_crop() -> None:
    sizes = torch.tensor([[4, 400], [400, 4]])
    windows, _ = random_crop(sizes, random_numbers(2), 8, (1.0, 1.0), RATIO)
    assert windows[:, 0].T.tolist() == [[0, 197], [197, 0]]  # of 4 x 5 and 5 x 4
    assert windows[:, 1].T.tolist() == [[4, 5], [5, 4]]


@pytest.mark.parametrize("transform", ["pilot", "resize"])
def test_the_device_prepares_what_workers_do(transform: str, tmp_path: Path) -> None:
    images = files(tmp_path, [(12, 17), (30, 9), (8, 8), (21, 22), (5, 40)])
    slow, fast = (view(images, transform=transform, on_device=on, augment=False) for on in (False, True))
    for ours, theirs in zip(batches(fast), batches(slow)):
        # Pillow rounds and clips between rows and columns: most pixels within a step (1/255 is 4/255 of std), few far.
        assert float(((ours - theirs).abs() > 6 / 255).double().mean()) < 0.01
    assert not torch.equal(fast.digests(), slow.digests())


def test_device_batches_depend_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = files(tmp_path, [(12, 12)] * 7)
    arrays = np.stack([images[i] for i in range(7)])
    first, *others = (
        batches(view(source, transform="pilot", on_device=True, workers=workers, cache=cache * 0.1))
        for source, workers, cache in ((arrays, 0, False), (images, 0, True), (images, 2, False), (images, 1, True))
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))
    again = view(arrays, transform="pilot", on_device=True)
    assert not torch.equal(batches(again, seed=1)[0], first[0])
    assert torch.equal(batches(again)[0], first[0])
    monkeypatch.setattr(views, "READY_BYTES", 0)
    resized = view(arrays, on_device=True)
    torch.testing.assert_close(batches(resized), batches(view(arrays)), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_decoded_once(workers: int, tmp_path: Path) -> None:
    images = files(tmp_path, [(12, 17), (30, 9), (8, 8), (21, 22), (5, 40)])
    plain = batches(view(images, workers=workers))
    kept = view(images, workers=workers, cache=0.1)
    assert all(torch.equal(a, b) for a, b in zip(batches(kept), plain))
    for path in images.paths:
        path.unlink()
    assert all(torch.equal(a, b) for a, b in zip(batches(kept), plain))


def test_decoded_images_keep_to_their_limit(tmp_path: Path) -> None:
    images = files(tmp_path, [(10, 10)] * 3)
    decoded = Decoded(images, 650)  # two of 300 bytes
    pixels_of = [decoded[i].copy() for i in range(3)]
    for path in images.paths:
        path.unlink()
    assert np.array_equal(decoded[0], pixels_of[0]) and np.array_equal(decoded[1], pixels_of[1])
    with pytest.raises(ValueError, match=r"2\.png is no image that can be decoded"):
        decoded[2]


class _Who(ImageFiles):
    """Images whose pixels are the process that decoded them."""

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full((8, 8, 3), list(os.getpid().to_bytes(3, "big")), dtype=np.uint8)


def test_workers_live_on_between_passes() -> None:
    v = view(_Who([Path("a")] * 9), workers=2, mean=[0.0] * 3, std=[1 / 255] * 3, augment=False)
    first, second = batches(v)
    people = [{tuple(image[:, 0, 0].round().int().tolist()) for image in part} for part in (first, second)]
    assert len(people[0]) == 2 and people[0] == people[1]
    half = v[torch.arange(4)]
    assert {tuple(image[:, 0, 0].round().int().tolist()) for b in half.split(2) for image in b} <= people[0]
    next(iter(v.split(2)))  # a pass that is left early
    assert len(torch.cat(list(v.split(2)))) == 9


# ---------------------------------------------------------------------- precision and compiling

CLASSES = 6


def backbone() -> Backbone:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return Backbone(vit.eval(), 16, [0.5] * 3, [0.5] * 3)


def learn(callbacks=(), checkpoint: Checkpoint | None = None, **changes) -> Result:
    rng, labels = np.random.default_rng(0), np.tile(np.arange(CLASSES), 8)
    images = (rng.integers(0, 60, (48, 16, 16, 3)) + 30 * labels[:, None, None, None]).astype(np.uint8)
    quick = {"increment": 2, "r": 2, "epochs": 2, "batch_size": 8, "lr": 5e-3, "device": "cpu", "workers": 0}
    settings = Settings(**{**quick, **changes})
    data = Images(images, labels, images[:24], labels[:24])
    return run(settings, data=data, backbone=backbone(), callbacks=callbacks, checkpoint=checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": "float16"},
        {"amp": "bfloat16", "channels_last": True},
        {"transform": "pilot", "transform_on": "device"},
    ],
    ids=str,
)
def test_a_fast_run_learns_and_resumes(changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_run = learn(**changes)
    assert whole_run.curve[-1] > 100 / CLASSES
    save = Checkpoint._save

    def save_and_cut(self: Checkpoint, *args, **keywords) -> None:
        save(self, *args, **keywords)
        raise InterruptedError

    monkeypatch.setattr(Checkpoint, "_save", save_and_cut)
    with pytest.raises(InterruptedError):  # after an epoch
        learn(checkpoint=Checkpoint(tmp_path), **changes)
    monkeypatch.setattr(Checkpoint, "_save", save)
    resumed = learn(checkpoint=Checkpoint(tmp_path, resume=True), **changes)
    assert (resumed.curve, resumed.matrix) == (whole_run.curve, whole_run.matrix)


TOKEN = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


@pytest.mark.parametrize(
    "changes", [{"init_values": 0.5}, {"reg_tokens": 2, "qk_norm": True}, {"fc_norm": True}], ids=str
)
def test_what_no_feature_is_made_of_is_not_computed(changes: dict) -> None:
    """The MLP of the last block sees class tokens alone; features and gradients are what they were."""
    torch.manual_seed(0)
    plain = VisionTransformer(**TOKEN, **changes).double()
    model, seen = copy.deepcopy(plain), []
    Speed(model, Settings(), torch.device("cpu"))
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    adapted = [plora_ext.inject(vit, ["qkv", "proj", "fc1", "fc2"], r=2) for vit in (plain, model)]
    images, grads = torch.randn(3, 3, 16, 16, dtype=torch.float64), []
    for adapters, vit in zip(adapted, (plain, model)):
        torch.manual_seed(1)
        adapters.add_adapter("a")
        for p in adapters.parameters("a"):
            nn.init.normal_(p, std=0.3)
        features = vit(images)
        grads.append([features.detach(), *torch.autograd.grad(features.square().sum(), adapters.parameters("a"))])
    tokens = 17 + changes.get("reg_tokens", 0)
    assert seen == [(3, tokens, 32), (3, 1, 32)]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs)
    assert list(model.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(model)  # as for data-parallel training, or a user
    torch.testing.assert_close(copied(images), model(images))


@pytest.mark.parametrize(
    "changes, settings",
    [({"global_pool": "avg"}, {}), ({"proj_drop_rate": 0.1}, {}), ({"drop_path_rate": 0.1}, {}),
     ({}, {"init": "inflora", "fusion": "sum", "onto": "fused"})],
    ids=str,
)  # fmt: skip
def test_where_all_tokens_are_asked_for(changes: dict, settings: dict) -> None:
    model = VisionTransformer(**TOKEN, **changes)
    Speed(model, Settings(**settings), torch.device("cpu"))
    assert type(model.blocks[-1]) is Block


def test_images_of_one_size_share_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = torch.from_numpy(pixels(3, 20, 30)), torch.tensor([[20, 30]] * 3)
    asked: list[int] = []
    original = resampling._weights

    def counted(window: torch.Tensor, *rest) -> torch.Tensor:
        asked.append(window.shape[-1])
        return original(window, *rest)

    monkeypatch.setattr(resampling, "_weights", counted)
    together = resample(images, center(sizes, 18, 16), 16, "bicubic")
    assert asked == [1, 1]
    assert torch.equal(
        together, torch.cat([resample(i[None], center(sizes[:1], 18, 16), 16, "bicubic") for i in images])
    )
    asked.clear()
    windows, flip = random_crop(sizes, random_numbers(3), 16, SCALE, RATIO)
    monkeypatch.setattr(resampling, "_BYTES", 2 * 12 * 20 * 30)
    resample(images, windows, 16, flip=flip)
    assert asked == [2, 2, 1, 1]


@pytest.mark.parametrize("device, cores, expected", [("cpu", 2, 0), ("cpu", 16, 2), ("cpu", 128, 8), ("cuda", 2, 2)])
def test_workers_leave_a_cpu_to_the_model(
    device: str, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    look = Backbone(nn.Identity(), 16, [0.5] * 3, [0.5] * 3)
    assert prepare(Settings(), look, torch.device(device)).workers == expected
    assert prepare(Settings(workers=3), look, torch.device(device)).workers == 3


def test_workers_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = files(tmp_path, [(9, 9)] * 6)
    whole = list(view(images, transform="pilot").split(3))

    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    look = view(images, transform="pilot", workers=2)
    with pytest.warns(UserWarning, match="/dev/shm is full: this process loads images, without data workers"):
        first = list(look.split(3))
    for batches in (first, list(look.split(3))):
        assert all(torch.equal(a, b) for a, b in zip(whole, batches, strict=True))


def test_images_do_not_pass_through_files_in_shared_memory(tmp_path: Path) -> None:
    look = view(files(tmp_path, [(20, 30)] * 40), transform="pilot", workers=2, on_device=True)
    batches = look.split(20)
    next(batches)
    assert "/dev/shm/torch_" not in Path("/proc/self/maps").read_text()
    assert len(list(batches)) == 1


@pytest.mark.parametrize("largest", [10**6, 700])  # bytes of an image: a slot, or too little for most pieces
def test_many_batches_over_few_slots(largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PIECE", 2)
    monkeypatch.setattr(loader, "BATCH", 2)
    sizes = [(9 + i % 7, 20 - i % 5) for i in range(50)]
    look = view(files(tmp_path, sizes), transform="pilot", workers=2, on_device=True)
    look._loader._image_bytes = largest
    alone = view(files(tmp_path, sizes), transform="pilot", on_device=True)
    for order, size in ((torch.arange(50), 3), (torch.arange(50).flip(0), 7), (torch.arange(5), 4)):
        next(look.split(3))  # a pass that is left, while workers are ahead
        batches = zip(look[order].split(size), alone[order].split(size), strict=True)
        assert all(torch.equal(a, b) for a, b in batches)


def test_decoded_images_need_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = view(files(tmp_path, [(9, 9)] * 6), transform="pilot", workers=1, on_device=True, cache=0.01)
    first = list(look[torch.arange(5)].split(4))
    started: list[int] = []
    monkeypatch.setattr(loader.Loader, "_start", lambda self, workers, pieces: started.append(workers))
    again = list(look[torch.arange(5)].split(4))
    assert not started and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    list(look.split(4))
    assert started == [1]  # for the sixth


@pytest.mark.parametrize("on_device", [False, True])
def test_a_batch_is_the_same_in_pieces(on_device: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = files(tmp_path, [(9, 9), (12, 7), (5, 14), (9, 9), (30, 8), (6, 6), (11, 11)])

    def batches(piece: int, workers: int) -> list[torch.Tensor]:
        monkeypatch.setattr(loader, "PIECE", piece)
        torch.manual_seed(0)
        of = view(images, transform="pilot", workers=workers, on_device=on_device)
        return [*of.split(4), *(batch for _, batch in of.epoch(torch.randperm(7), 5))]

    whole = batches(7, 0)
    assert [len(batch) for batch in whole] == [4, 3, 5, 2]
    for piece, workers in ((1, 2), (2, 0), (3, 2)):
        assert all(torch.equal(a, b) for a, b in zip(whole, batches(piece, workers), strict=True))


def test_workers_that_bring_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "TIMEOUT", 1)
    images = files(tmp_path, [(9, 9)] * 6)
    monkeypatch.setattr(type(images), "__getitem__", lambda self, row: time.sleep(30))
    with pytest.raises(TimeoutError, match="no images came from data workers within 1 s: the disk may hang"):
        list(view(images, transform="pilot", workers=2).split(3))


def test_auto_is_what_it_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    chosen = view(pixels(4), transform="pilot", on_device=None, device=device).preparation.on_device
    assert chosen is (device.type == "cuda")
    loaded = view(files(tmp_path, [(9, 9)]), transform="pilot", on_device=None, device=device)
    assert loaded.preparation.on_device is False
    if device.type == "cuda":
        return
    whole = learn(transform="pilot", transform_on="cpu")
    assert learn(transform="pilot").curve == whole.curve

    def cut(self: Checkpoint, *args, **keywords) -> None:
        save(self, *args, **keywords)
        raise InterruptedError

    save = Checkpoint._save
    monkeypatch.setattr(Checkpoint, "_save", cut)
    with pytest.raises(InterruptedError):
        learn(checkpoint=Checkpoint(tmp_path / "run"), transform="pilot", transform_on="cpu")
    monkeypatch.setattr(Checkpoint, "_save", save)
    resumed = learn(checkpoint=Checkpoint(tmp_path / "run", resume=True), transform="pilot")
    assert resumed.curve == whole.curve
    with pytest.raises(ValueError, match="transform_on"):
        learn(checkpoint=Checkpoint(tmp_path / "run", resume=True), transform="pilot", transform_on="device")


def test_the_scale_of_float16_is_saved(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 0.1)
    speed = Speed(nn.Identity(), Settings(amp="float16"), torch.device("cpu"))
    scaler = speed.scaler()
    scaler.scale(parameter.sum() * torch.inf).backward()  # gradients overflow: no step, half the scale
    scaler.step(optimizer)
    scaler.update()
    assert bool((parameter == 1).all()) and scaler.get_scale() == 2.0**15
    checkpoint = Checkpoint(tmp_path)
    checkpoint.begin({"settings": {}, "data": "", "backbone": ""}, {})
    checkpoint.save_epoch(0, 0, [parameter], optimizer, scaler)
    other = speed.scaler()
    assert checkpoint.enter_fit(0, [parameter], optimizer, other) == 1 and other.get_scale() == 2.0**15


def test_tf32_is_for_the_time_of_a_pass() -> None:
    before = torch.get_float32_matmul_precision()
    speed = Speed(nn.Identity(), Settings(tf32=True), torch.device("cuda"))
    with speed.passes():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    assert speed.context == ("none", "tf32")


@pytest.mark.parametrize("method", ["plora", "plora-ensemble", "simplecil"])
def test_compiled_graphs_serve_every_task(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, graphs = nn.Module.compile, []

    def traced(self: nn.Module, **keywords) -> None:  # what dynamo makes of it, run by torch
        compile_(self, backend="eager", fullgraph=True, **keywords)

    class Ear(ConsoleProgress):
        def task(self, task: int, accuracy: float) -> None:
            graphs.append(counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", traced)
    compiled = learn([Ear(Console(file=io.StringIO()))], method=method, compile=True, eval_batch_size=8)
    assert graphs[0] > 0 or method == "plora-ensemble"
    assert graphs[1] == graphs[-1] <= 5, graphs  # of the second task on, nothing is left to compile
    assert compiled.curve == pytest.approx(learn(method=method, eval_batch_size=8).curve, abs=10)


def test_compiling_with_several_trained_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **keywords: compile_(self, backend="eager", **keywords))
    changes = {"fusion": "sum", "onto": "fused", "init": "inflora", "increment": 3, "epochs": 1, "eval_batch_size": 8}
    assert learn(compile=True, **changes).curve == pytest.approx(learn(**changes).curve, abs=10)


# ---------------------------------------------------------------------- what one sees


def test_progress_says_images_a_second() -> None:
    text = io.StringIO()
    with ConsoleProgress(Console(file=text, width=80)) as progress:
        learn([progress])
    lines = text.getvalue().splitlines()
    assert len(lines) == 3 and all(line.endswith(" images/s") for line in lines)
    terminal = io.StringIO()
    console = Console(file=terminal, width=80, force_terminal=True)
    with ConsoleProgress(console) as progress:
        progress.begin("plora-ensemble", 10)
        progress.fit(9, 100_000)
        progress.step(128)
        console.print(progress._render())
    bar = next(line for line in terminal.getvalue().splitlines() if "task 10 of 10" in line)
    assert "128/100000" in bar and "left" in bar


def test_settings_of_speed() -> None:
    for bad, message in (
        ({"amp": "fp16"}, "unknown amp 'fp16'; did you mean 'float16'?"),
        ({"transform_on": "gpu"}, "unknown transform_on 'gpu'"),
        ({"compile": 1}, "compile must be true or false, got 1"),
    ):
        with pytest.raises(ValueError) as error:
            Settings(**bad)
        assert str(error.value).startswith(message)


def test_sgd_after_a_first_step_that_the_scaler_skips(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16's scaler begins too high on purpose; the fused kernel then returns without writing what it allocated."""
    fused = partial(torch.optim.SGD, fused=True)
    monkeypatch.setattr(torch.optim, "SGD", lambda groups, lr, momentum, **_: fused(groups, lr, momentum))
    speed = Speed(nn.Identity(), Settings(optimizer="sgd"), device)
    parameter = nn.Parameter(torch.ones(1000, device=device))
    optimizer = speed.optimizer([{"params": [parameter]}])
    speed.set_rate(optimizer, 1.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    try:
        for value in (torch.inf, 0.25, 0.5):  # under scales 1, 0.5 and 0.5: nothing, 0.5 and 1
            parameter.grad = torch.full_like(parameter, value)
            scaler.scale(torch.zeros((), device=device))
            scaler.step(optimizer)
            scaler.update()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 1 - 0.5 - (0.9 * 0.5 + 1)))
