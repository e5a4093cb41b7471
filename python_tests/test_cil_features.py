"""The feature cache: what is computed how often, what invalidates it, and where it is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext.change import fingerprint, row_digests
from plora_ext.cil import Images, Settings, run
from plora_ext.cil.callbacks import Callback
from plora_ext.cil.evaluate import Evaluator
from plora_ext.cil.features import FeatureCache
from plora_ext.cil.methods import METHODS, Method
from plora_ext.cil.spaces import space_fingerprints
from plora_ext.cil.stream import Task, TaskStream
from plora_ext.cil.training import Trainer
from plora_ext.data import Backbone
from plora_ext.nn import Adapters, Ensemble, inject

CPU = torch.device("cpu")


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()


def adapted(T: int) -> Adapters:
    adapters = inject(vit(), ["q", "v"], r=2)
    for _ in range(T):
        add(adapters)
    return adapters


def add(adapters: Adapters) -> None:
    name = f"task{len(adapters.names)}"
    adapters.add_adapter(name)
    for parameter in adapters.parameters(name):
        nn.init.normal_(parameter, std=0.3)


class Compute:
    """Features by an ensemble; notes what it was asked for."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters, self.ensemble = adapters, Ensemble(adapters)
        self.asked: list[tuple[int, list[str]]] = []

    def __call__(self, images: Tensor, names: list[str]) -> Tensor:
        self.asked.append((len(images), names))
        return self.ensemble(images, names).movedim(0, 1)

    def through(self, cache: FeatureCache, images: Tensor) -> Tensor:
        return cache(images, space_fingerprints(self.adapters, self.adapters.names), self)

    def directly(self, images: Tensor) -> Tensor:
        return self.ensemble(images).movedim(0, 1)


# ---------------------------------------------------------------------- content


def test_digests_see_every_bit() -> None:
    for shape in ((3, 5, 7), (16,), (1,)):
        rows = torch.randn(20, *shape)
        digests = row_digests(rows)
        assert digests.shape == (20, 2) and len(digests.unique(dim=0)) == 20
        for start in range(5):  # other offsets in memory, other batches
            assert torch.equal(row_digests(rows[start:]), digests[start:])
        changed = rows.clone()
        changed.view(20, -1)[4, -1] = torch.nextafter(changed.view(20, -1)[4, -1], torch.tensor(torch.inf))
        assert (row_digests(changed) != digests).any(1).tolist() == [i == 4 for i in range(20)]
    assert row_digests(torch.empty(0, 3)).shape == (0, 2)


def test_fingerprints_see_values_places_shapes_dtypes_and_order() -> None:
    long = torch.randn(3 * 2**15 + 5)  # more than a row of digests
    prints = [fingerprint(long), fingerprint(long.view(1, -1)), fingerprint(long.double()), fingerprint(long, "a")]
    prints += [fingerprint("a", long), fingerprint("a"), fingerprint(), fingerprint(long, long), fingerprint("aa")]
    for i in (0, 1, 2**13, 2**15, len(long) - 2):
        one, two = long.clone(), long.clone()
        one[i] += 1
        two[[i, i + 1]] = two[[i + 1, i]]
        prints += [fingerprint(one), fingerprint(two)]
    prints += [fingerprint(torch.zeros(0)), fingerprint(torch.zeros(0, 1)), fingerprint(torch.tensor(1.0))]
    assert len(set(prints)) == len(prints)
    assert fingerprint(long.clone(), "a") == fingerprint(long, "a")
    assert fingerprint(torch.stack([long, long], 1)[:, 0]) == fingerprint(long)  # not contiguous


def test_content_is_the_same_on_every_device(device: torch.device) -> None:
    t, rows = torch.randn(2**16 + 3), torch.randn(7, 3, 5)
    assert fingerprint(t.to(device)) == fingerprint(t)
    assert torch.equal(row_digests(rows.to(device)).cpu(), row_digests(rows))


def test_a_space_depends_on_the_weights_the_modules_and_its_own_adapter() -> None:
    adapters = adapted(2)
    names = [*adapters.names, "__base__"]
    before = space_fingerprints(adapters, names)
    assert len(set(before.values())) == 3 and space_fingerprints(adapters, names) == before
    adapters.set_adapter("task0")
    adapters.train_adapter(None)
    adapters.model.train().eval()
    add(adapters)  # nothing of this is in the features of the others
    assert space_fingerprints(adapters, names) == before

    def changed() -> list[bool]:
        now = space_fingerprints(adapters, names)
        return [now[name] != before[name] for name in names]

    adapters.parameters("task1")[-1].data[0, 0] += 1  # a write that torch does not count
    assert changed() == [False, True, False]
    before = space_fingerprints(adapters, names)
    weight = adapters.model.blocks[1].mlp.fc1.weight.data
    kept = weight.clone()
    weight[0, 0] += 1
    assert changed() == [True, True, True]
    weight.copy_(kept)
    adapters.model.blocks[0].attn.scale *= 2
    assert changed() == [True, True, True]
    adapters.model.blocks[0].attn.scale /= 2
    assert changed() == [False] * 3
    assert space_fingerprints(adapters, names, "bfloat16") != before
    block = adapters.model.blocks[0]
    block.table = torch.zeros(2)  # no parameter and no buffer
    block.own = torch.nn.ParameterDict({"bias": torch.zeros(2)})  # what adapters live in, but the model's
    before = space_fingerprints(adapters, names)
    for tensor in (block.table, block.own["bias"].data):
        tensor[0] += 1
        assert changed() == [True, True, True]
        tensor[0] -= 1
    del block.table, block.own
    before = space_fingerprints(adapters, names)
    copy = adapted(0)
    copy.add_adapter("task0", r=2, lora_alpha=4)
    for mine, other in zip(copy.parameters("task0"), adapters.parameters("task0")):
        mine.data.copy_(other)
    assert space_fingerprints(copy, ["__base__"]) == {"__base__": before["__base__"]}
    assert space_fingerprints(copy, ["task0"])["task0"] != before["task0"]  # the scale


# ---------------------------------------------------------------------- what is computed


def test_every_pair_once() -> None:
    adapters, images, cache = adapted(0), torch.randn(12, 3, 16, 16), FeatureCache()
    compute = Compute(adapters)
    for t in range(4):
        add(adapters)
        seen = images[: 3 * (t + 1)]
        torch.testing.assert_close(compute.through(cache, seen), compute.directly(seen))
    assert compute.asked == [
        (3, ["task0"]),
        *((3, ["task1"]), (3, ["task0", "task1"])),
        *((6, ["task2"]), (3, ["task0", "task1", "task2"])),
        *((9, ["task3"]), (3, ["task0", "task1", "task2", "task3"])),
    ]
    assert cache.computed == 12 * 4 and cache.found == 3 * (1 + 4 + 9 + 16) - 12 * 4


def test_images_in_any_order_and_more_than_once() -> None:
    adapters, images, cache = adapted(2), torch.randn(6, 3, 16, 16), FeatureCache()
    compute = Compute(adapters)
    picked = torch.tensor([4, 1, 1, 5, 4])
    torch.testing.assert_close(compute.through(cache, images[picked]), compute.directly(images[picked]))
    assert compute.asked == [(3, ["task0", "task1"])]
    order = torch.tensor([5, 0, 4, 3, 1, 2, 0])
    torch.testing.assert_close(compute.through(cache, images[order]), compute.directly(images[order]))
    assert compute.asked[1:] == [(3, ["task0", "task1"])]
    turned = dict(reversed(space_fingerprints(adapters, adapters.names).items()))
    torch.testing.assert_close(cache(images, turned, compute), compute.directly(images).flip(1))
    assert len(compute.asked) == 2
    assert compute.through(cache, images[:0]).shape == (0, 2, 32)


def test_a_changed_adapter_image_or_model_is_computed_anew() -> None:
    adapters, images, cache = adapted(3), torch.randn(5, 3, 16, 16), FeatureCache()
    compute = Compute(adapters)

    def asks() -> list[tuple[int, list[str]]]:
        compute.asked.clear()
        features = compute.through(cache, images)
        adapters.model.eval()
        torch.testing.assert_close(features, compute.directly(images))
        return list(compute.asked)

    assert asks() == [(5, ["task0", "task1", "task2"])] and asks() == []
    with torch.no_grad():
        adapters.parameters("task1")[0].mul_(2)
    assert asks() == [(5, ["task1"])]
    images[2, 0, 0, 0] += 1
    assert asks() == [(1, ["task0", "task1", "task2"])]
    with torch.no_grad():
        adapters.model.norm.weight.mul_(1.5)
    assert asks() == [(5, ["task0", "task1", "task2"])]
    assert len(cache._spaces) == 3  # nothing is kept of what has changed
    # The same bits in another shape are another image.
    for shape in ((3, 16, 16), (3, 32, 8), (3, 16, 16)):
        x = images.view(5, *shape)
        assert torch.equal(cache(x, {"task0": "other"}, lambda x, names: x[:, None]), x[:, None])


def test_two_adapters_of_one_content_share_their_features() -> None:
    adapters, images, cache = adapted(1), torch.randn(4, 3, 16, 16), FeatureCache()
    adapters.add_adapter("twin", init_from="task0")
    compute = Compute(adapters)
    cache(images, space_fingerprints(adapters, ["task0"]), compute)
    cache(images, space_fingerprints(adapters, ["twin"]), compute)
    assert compute.asked == [(4, ["task0"])]
    with torch.no_grad():
        adapters.parameters("twin")[0].add_(1)
    torch.testing.assert_close(compute.through(cache, images), compute.directly(images))
    assert compute.asked[1:] == [(4, ["twin"])]


def test_bad_input() -> None:
    cache = FeatureCache()
    with pytest.raises(ValueError, match="spaces must hold at least one adapter"):
        cache(torch.randn(2, 3), {}, lambda images, names: images)
    with pytest.raises(ValueError, match=r"compute must return \[2, 1, \.\.\.\], got \[2, 3\]"):
        cache(torch.randn(2, 3), {"a": "f"}, lambda images, names: images)


class Files:
    """Images by name, loaded when they are asked for."""

    def __init__(self, names: list[int], loaded: list[int]) -> None:
        self.names, self.loaded = names, loaded

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Tensor) -> Files:
        return Files([self.names[i] for i in rows], self.loaded)

    def digests(self) -> Tensor:
        return torch.tensor([[name, -name] for name in self.names])

    def load(self) -> Tensor:
        self.loaded.extend(self.names)
        return torch.tensor(self.names, dtype=torch.float32)


def test_images_that_are_not_in_memory_are_loaded_once() -> None:
    loaded: list[int] = []
    cache = FeatureCache()
    for names in ([3, 1], [1, 2, 3], [2, 2]):
        features = cache(Files(names, loaded), {"a": "f", "b": "g"}, lambda x, n: torch.stack([x.load()] * len(n), 1))
        assert features[:, 0].tolist() == features[:, 1].tolist() == names
    assert loaded == [3, 1, 2]


# ---------------------------------------------------------------------- where it is kept


def test_by_size_on_the_device_the_host_or_in_files(device: torch.device, tmp_path: Path) -> None:
    adapters, images = adapted(4), torch.randn(6, 3, 16, 16).to(device)
    adapters.model.to(device)
    compute, one = Compute(adapters), 6 * 32 * 4  # bytes of a space
    cache = FeatureCache(device_memory=one, host_memory=2 * one)
    torch.testing.assert_close(compute.through(cache, images), compute.directly(images))
    blocks = [block for space in cache._spaces.values() for block in space.blocks]
    kinds = [block.features.device.type if block.path is None else "file" for block in blocks]
    assert kinds == (["cuda", "cpu", "cpu", "file"] if device.type == "cuda" else ["cpu", "cpu", "file", "file"])
    again = compute.through(cache, images)
    assert again.device.type == device.type and torch.equal(again, compute.through(cache, images))
    assert len(compute.asked) == 1
    folder = next(block.path for block in blocks if block.path).parent
    del cache, blocks
    assert not folder.exists()
    assert not list(tmp_path.iterdir())


def test_a_folder_serves_a_later_run(tmp_path: Path) -> None:
    adapters, images, said = adapted(3), torch.randn(6, 3, 16, 16), []
    first = Compute(adapters)
    features = first.through(FeatureCache(tmp_path / "new" / "folder"), images)
    later = Compute(adapters)
    assert torch.equal(later.through(FeatureCache(tmp_path / "new" / "folder", say=said.append), images), features)
    assert later.asked == [] and said == []
    more = torch.cat([images, torch.randn(2, 3, 16, 16)])
    torch.testing.assert_close(later.through(FeatureCache(tmp_path / "new" / "folder"), more), later.directly(more))
    assert later.asked == [(2, ["task0", "task1", "task2"])]
    assert all(path.name.startswith("features-") for path in (tmp_path / "new" / "folder").iterdir())


def test_files_of_another_model_are_rebuilt_with_a_line(tmp_path: Path) -> None:
    adapters, images, said = adapted(2), torch.randn(6, 3, 16, 16), []
    Compute(adapters).through(FeatureCache(tmp_path), images)
    (tmp_path / "weights.safetensors").write_bytes(b"not ours")
    with torch.no_grad():
        adapters.parameters("task1")[0].add_(1)
    compute = Compute(adapters)
    cache = FeatureCache(tmp_path, say=said.append)
    torch.testing.assert_close(compute.through(cache, images), compute.directly(images))
    compute.through(cache, images)
    assert compute.asked == [(6, ["task1"])]
    assert said == [f"feature cache: what {tmp_path} holds of task1 is of another model, it is computed anew"]
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "weights.safetensors").read_bytes() == b"not ours"


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit", "no metadata"])
def test_damaged_files_are_rebuilt_with_a_line(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters, images = adapted(1), torch.randn(6, 3, 16, 16)
    Compute(adapters).through(FeatureCache(tmp_path), images)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    plain = content.replace(b'"name"', b'"nope"')
    path.write_bytes({"truncated": content[:-100], "empty": b"", "a bit": flipped, "no metadata": plain}[damage])
    compute = Compute(adapters)
    torch.testing.assert_close(compute.through(FeatureCache(tmp_path), images), compute.directly(images))
    assert compute.asked == [(6, ["task0"])]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"feature cache: {path} is damaged (") and line.endswith("), it is computed anew")
    assert torch.equal(Compute(adapters).through(FeatureCache(tmp_path), images), compute.directly(images))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        FeatureCache(tmp_path / "file")


# ---------------------------------------------------------------------- in the loop


class Stub(METHODS["plora-ensemble"]):  # type: ignore[misc,name-defined]
    """An ensemble whose adapters are random: the evaluation of one, without training."""

    def learn(self, task: Task, images: Tensor, labels: Tensor) -> None:
        add(self.adapters)
        self.add_prototypes(task, images, labels)


def evaluate(T: int, cache: FeatureCache | None) -> tuple[int, list[float]]:
    """Samples through the last block in the evaluations after T tasks of 2 classes, and the accuracies."""
    settings = Settings(method="plora-ensemble", increment=2, r=2, device="cpu", target_modules=["q", "v"])
    model = vit()
    passed: list[int] = []
    model.blocks[-1].register_forward_hook(lambda module, args, y: passed.append(len(y)))
    method = Stub(Trainer(model, settings, CPU), settings)
    labels = np.repeat(np.arange(2 * T), 2)
    stream = TaskStream(labels, labels, increment=2)
    images = torch.randn(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    evaluator = Evaluator(method, stream.tasks, images, stream.task_of_class(), cache)
    total, curve = 0, []
    for task in stream:
        method.learn(task, images[torch.from_numpy(task.train)], torch.from_numpy(task.train_labels) % 2)
        passed.clear()
        curve.append(evaluator.after(task.index)[0])
        total += sum(passed)
    return total, curve


def test_an_evaluation_of_20_tasks_takes_seven_times_fewer_forwards() -> None:
    T, n = 20, 4  # images of a task
    without, expected = evaluate(T, None)
    cache = FeatureCache()
    with_cache, curve = evaluate(T, cache)
    trial = without - n * sum(t * t for t in range(1, T + 1))  # where to repeat the batch, tried once
    assert 0 <= trial <= 30
    assert with_cache == cache.computed == T * T * n
    assert (without - trial) / with_cache == pytest.approx((T + 1) * (2 * T + 1) / (6 * T)) == pytest.approx(7.175)
    assert curve == expected


@pytest.fixture(scope="module")
def images() -> Images:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(6), 6)
    pixels = rng.integers(0, 200, (len(labels), 16, 16, 3)) + 9 * labels[:, None, None, None]
    return Images(pixels.astype(np.uint8), labels, pixels[:12].astype(np.uint8), labels[:12])


QUICK = {"increment": 2, "r": 2, "epochs": 1, "batch_size": 16, "device": "cpu", "augment": False}


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_gives_the_same_with_and_without(method: str, images: Images, tmp_path: Path) -> None:
    counts: dict[str, int] = {}

    def learn(cache: str) -> list[list[float]]:
        model, passed = vit(), []
        model.blocks[-1].register_forward_hook(lambda module, args, y: passed.append(len(y)))
        settings = Settings(method=method, feature_cache=cache, **QUICK)  # type: ignore[arg-type]
        matrix = run(settings, data=images, backbone=Backbone(model, 16, [0.5] * 3, [0.5] * 3)).matrix
        counts[cache] = sum(passed)
        return matrix

    folder = str(tmp_path / "features")
    assert learn("auto") == learn("none") == learn(folder) == learn(folder)
    kept = method in ("plora-ensemble", "simplecil", "lora-first", "aper", "joint")
    assert (tmp_path / "features").is_dir() and bool(list((tmp_path / "features").iterdir())) == kept
    # The second run with the folder finds all test images under all adapters there.
    passes = {"plora-ensemble": 12 * 3, "simplecil": 12, "lora-first": 12, "aper": 24, "joint": 12}.get(method, 0)
    if method in ("plora-ensemble", "simplecil", "lora-first", "aper"):
        assert counts["auto"] < counts["none"]
    assert counts["auto"] - counts[folder] == passes


def test_a_method_that_says_nothing_of_its_spaces_is_not_cached(images: Images) -> None:
    assert Method.spaces(object.__new__(METHODS["plora"])) is None  # type: ignore[arg-type]


class NoEpoch(Callback):
    def epoch(self, number: int, loss: float) -> None:
        pytest.fail("an epoch was trained first")


def test_memory_limit_of_the_setting(images: Images) -> None:
    backbone = Backbone(vit(), 16, [0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match=r"ensemble_memory\) must be at least 0\.\d+ MiB, .*got 0.000999 MiB"):
        little = Settings(method="plora-ensemble", ensemble_memory=1e-3, **QUICK)  # type: ignore[arg-type]
        run(little, data=images, backbone=backbone, callbacks=[NoEpoch()])
    with pytest.raises(ValueError, match="ensemble_memory must be above 0 or null, got 0"):
        Settings(ensemble_memory=0)
