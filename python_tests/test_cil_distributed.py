"""Runs over several processes against runs in one: the same curves, prototypes and predictions; one writer; failures.

The processes are gloo's on the CPU, forked from a server that has imported everything once; the command line is started
by torchrun itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_cil_checkpoint import TINY, VARIANTS, Cut, arrays, backbone, settings
from test_cil_frozen import Behind
from test_cil_frozen import backbone as frozen_backbone
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import plora_ext.cil.build
from plora_ext import ops
from plora_ext.cil import Images, Learner, Result, evaluate, run, speed
from plora_ext.cil.callbacks import Callback
from plora_ext.cil.checkpoint import Checkpoint
from plora_ext.cil.distributed import SINGLE, Stopped, World, gradients, launched
from plora_ext.cil.methods import METHODS, Method
from plora_ext.cil.trained import Trained
from plora_ext.cil.training import Trainer
from plora_ext.cli import main
from plora_ext.data import View
from plora_ext.nn import inject
from plora_ext.report.files import load_results

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["plora_ext.report.files", "plora_ext.cil.trained", "pytest", "timm"])


@pytest.fixture(scope="module", autouse=True)
def _server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Starts the server elsewhere: from the source folder it would import the package there, not the installed one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("server"))
        forkserver.ensure_running()


def spawn(size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What `job(world, *args)` returns in each of `size` processes, or the exception that ended it.

    `command_line`, a job that finds the others by itself, gets None.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # here, as in torchrun
    answers = [processes.Pipe(duplex=False) for _ in range(size)]
    started = []
    for rank, (_, answer) in enumerate(answers):
        started.append(
            processes.Process(target=_process, args=(rank, size, store.port, answer, job, args), daemon=True)
        )
        started[-1].start()
        answer.close()
    results = []
    for process, (answer, _) in zip(started, answers):
        assert answer.poll(60), "a process does not answer"
        results.append(pickle.loads(answer.recv_bytes()))
        process.join()
    return results


def _process(rank: int, size: int, port: int, answer: Any, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        with launched() if job is not command_line else nullcontext() as world:
            result = job(world, *args)
    except Exception as error:
        traceback.print_exc()
        result = error
    answer.send_bytes(pickle.dumps(result))  # the tensors themselves: this process will not be there to share them
    answer.close()


# CutMix mixes images of one process, and steps towards what is sought make more of rounding.
WHOLE = {"cutmix": 0.0, "sought": 0}


def data() -> Images:
    """An odd number of images in every task, so that neither batches nor shards are even."""
    odd = {name: value[:-1] for name, value in arrays().items()}
    return Images(**odd, class_names=["ant", "bee", "cat", "dog", "eel", "fox"])


def learn(
    world: World, changes: dict[str, Any], folder: Path | None = None, callbacks: Sequence[Callback] = ()
) -> tuple[Result, Method]:
    made: list[Method] = []

    def make(trainer: Trainer, s: Any) -> Method:
        made.append(METHODS[s.method](trainer, s))
        return made[0]

    checkpoint = folder and Checkpoint(folder, resume=True, world=world)
    frozen = backbone()
    if not world.first:
        nn.init.zeros_(frozen.model.blocks[0].mlp.fc1.weight)  # rank 0's weights count
    result = run(
        settings(**{**WHOLE, **changes}), data=data(), backbone=frozen, make=make, callbacks=callbacks,
        checkpoint=checkpoint, world=world,
    )  # fmt: skip
    return result, made[0]


def figures(result: Result, method: Method) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        logits = method.predict(torch.rand(4, 3, 16, 16))  # type: ignore[arg-type]
    return {"curve": result.curve, "matrix": result.matrix, "prototypes": method.prototypes, "logits": logits}


def agree(one: dict[str, Any], many: dict[str, Any], tolerance: float = 1e-3) -> None:
    assert (one["curve"], one["matrix"]) == (many["curve"], many["matrix"])
    for name in ("prototypes", "logits"):
        scale = float(one[name].abs().max())
        torch.testing.assert_close(many[name], one[name], rtol=0, atol=tolerance * scale)


# ---------------------------------------------------------------------- runs

CASES = [
    *(v for v in VARIANTS if "lora_dropout" not in v),
    {"method": "plora", "alignment": "sdc", "batch_size": 7},  # the last batch of 15 or 16 images is one or two
    {"method": "plora", "optimizer": "sgd", "batch_size": 5, "fusion": "similarity"},
    {"method": "plora", "alignment": "local", "sought": 5, "head": "gaussian", "distill": 0.5},
    {"method": "plora", "transform": "pilot", "transform_on": "device", "measure_drift": True},
]


def learn_all(world: World, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [figures(*learn(world, changes)) for changes in cases]


@pytest.fixture(scope="module")
def ones() -> list[dict[str, Any]]:
    return spawn(1, learn_all, CASES)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_many_are_as_one(size: int, ones: list[dict[str, Any]]) -> None:
    cases = range(0, len(CASES), 1 if size == 2 else 3)
    many = spawn(size, learn_all, [CASES[i] for i in cases])
    for i, one in enumerate(ones[j] for j in cases):
        for rank in range(size):
            agree(one, many[rank][i], 1e-2 if "sought" in CASES[cases[i]] else 1e-3)
            assert torch.equal(many[rank][i]["prototypes"], many[0][i]["prototypes"])  # to the last bit
            assert torch.equal(many[rank][i]["logits"], many[0][i]["logits"])


def learn_normalised(world: World) -> dict[str, Any]:
    made: list[Method] = []

    def make(trainer: Trainer, s: Any) -> Method:
        made.append(METHODS[s.method](trainer, s))
        return made[0]

    frozen = frozen_backbone(lambda: Behind(nn.BatchNorm2d(3)))
    frozen.model.vit.blocks[0].mlp.drop1.p = 0.0  # each process would draw its own
    return figures(run(settings(**WHOLE), data=data(), backbone=frozen, make=make, world=world), made[0])


def test_frozen_batch_normalisation_sees_no_batch() -> None:
    one, many = spawn(1, learn_normalised)[0], spawn(2, learn_normalised)
    for rank in range(2):
        agree(one, many[rank])


def learn_with_dropout(world: World) -> list[tuple[dict[str, Any], Tensor]]:
    changes = {"method": "plora", "lora_dropout": 0.3}
    return [(figures(*learn(world, changes)), torch.rand(3)) for _ in range(2)]


def test_dropout_is_each_rank_s_own_and_repeats() -> None:
    ranks = spawn(2, learn_with_dropout)
    (first, drawn), (again, drawn_again) = ranks[0]
    other, drawn_there = ranks[1][0]
    assert torch.equal(first["prototypes"], other["prototypes"])
    assert torch.equal(first["prototypes"], again["prototypes"])
    assert torch.equal(drawn, drawn_there) and torch.equal(drawn, drawn_again)  # generators are in step


def test_own_random_is_by_rank_and_key() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    drawn = {}
    for key in ((0, 1), (1, 1), (0, 2)):
        torch.manual_seed(3)
        with World(rank=key[0], size=2).own_random(key[1]):
            drawn[key] = torch.rand(2)
        assert torch.equal(torch.rand(2), expected)  # outside nothing was drawn
    assert len({tuple(d.tolist()) for d in drawn.values()}) == 3


# ---------------------------------------------------------------------- parts


def test_every_row_has_one_owner() -> None:
    for number in (0, 1, 2, 3, 7, 8):
        for size in (1, 2, 3, 5):
            worlds = [World(rank, size) for rank in range(size)]
            assert sorted(torch.cat([w.rows(number) for w in worlds]).tolist()) == list(range(number))
            if number:
                own = [list(range(number))[w.own(number)] for w in worlds]
                assert all(own)  # never an empty batch
                means = [sum(part) / len(part) for part in own]
                together = sum(m * w.share(number) for m, w in zip(means, worlds))
                assert together == pytest.approx(sum(range(number)) / number)


def collectives(world: World) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    out: list[Any] = []
    for number in (1, 2, 5, 6):
        x = torch.randn(number, 3, generator=generator)
        calls: list[int] = []

        def twice(part: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(len(part))
            return 2 * part

        assert torch.equal(world.spread(twice, x), 2 * x)
        assert torch.equal(world.spread(lambda part: part.argmax(-1), x), x.argmax(-1))
        out.append(calls)
        own, labels = world.rows(number), torch.arange(number) % 2
        sums, counts = world.sum_(*ops.class_sums(x[own], labels[own], 2))
        whole, all_counts = ops.class_sums(x, labels, 2)
        torch.testing.assert_close(sums, whole)
        assert torch.equal(counts, all_counts)
    values = [torch.full((2,), float(world.rank)), torch.full((3, 2), float(world.rank)).T]
    world.broadcast_(values)
    assert not any(v.any() for v in values)
    assert world.from_first(lambda: {"rank": world.rank}) == {"rank": 0}
    with pytest.raises(ValueError if world.first else Stopped):
        world.from_first(lambda: int("no number"))
    with world.host_first():
        pass
    return out


def test_collectives() -> None:
    assert spawn(2, collectives) == [[[1], [1], [3], [3]], [[1], [1], [2], [3]]]


def summed_gradients(world: World) -> list[Tensor]:
    """Of a linear layer, over batches of sizes that do not divide, with a layer that is never called."""
    torch.manual_seed(world.rank)
    used, idle, beside = nn.Linear(4, 3), nn.Linear(4, 3), nn.Parameter(torch.ones(3, dtype=torch.float64))
    learned = [*used.parameters(), *idle.parameters(), beside]
    world.start_(used, learned)  # from here on rank 0's
    torch.manual_seed(0)
    found = []
    for number in (5, 1, 4):
        x, labels = torch.randn(number, 4), torch.arange(number) % 3
        own = world.own(number)
        loss = nn.functional.cross_entropy(used(x[own]) * beside, labels[own]) * world.share(number)
        for parameter in learned:
            parameter.grad = None
        loss.backward()
        world.sum_gradients_(learned, gradients(learned))
        assert idle.weight.grad is None and idle.bias.grad is None  # weight decay would change them
        found += [p.grad.clone() for p in learned if p.grad is not None]
    return found


def test_gradients_are_the_mean_over_the_whole_batch() -> None:
    one, many = summed_gradients(SINGLE), spawn(2, summed_gradients)
    assert len(one) == 9
    for expected, *got in zip(one, *many):
        assert torch.equal(*got)
        torch.testing.assert_close(got[0], expected)


def rows_captured(world: World) -> list[int]:
    rows: list[int] = []

    def captured(self: speed.Speed, what: str, function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        def step(batch: Tensor, wanted: Tensor) -> Any:
            rows.append(len(batch))
            return function(batch, wanted)

        return step if what == "training" else function

    speed.Speed.captured = captured  # type: ignore[assignment]
    learn(world, {"method": "plora"})
    return rows


def test_a_smaller_batch_is_captured_by_none() -> None:
    """Two epochs of 16, 16 and 15 images in batches of 8: of the last 7, one process has 4, as of a whole batch."""
    assert spawn(2, rows_captured) == [[4] * 10] * 2


def as_ddp(world: World) -> None:
    """DistributedDataParallel, a user's own over layers with adapters, gives the gradients of `sum_gradients_`."""
    torch.manual_seed(0)
    adapters, x = inject(nn.Sequential(nn.Linear(4, 3)), ["0"], r=2), torch.randn(6, 4)[world.own(6)]
    adapters.add_adapter("a")
    learned = adapters.parameters("a")
    nn.init.ones_(learned[1])
    (adapters.model(x).square().mean() * world.share(6)).backward()
    world.sum_gradients_(learned, gradients(learned))
    ours = [parameter.grad.clone() for parameter in learned if parameter.grad is not None]
    adapters.model.zero_grad()
    parallel = nn.parallel.DistributedDataParallel(adapters.model)
    parallel(x).square().mean().backward()
    assert len(ours) == 2
    torch.testing.assert_close([parameter.grad for parameter in learned], ours)


def test_gradients_are_those_of_ddp() -> None:
    assert spawn(2, as_ddp) == [None, None]


def batch_of_sharded(world: World) -> bool:
    """A batch of adapters whose factors are sharded: of an A of one row, nothing is on the second process."""
    adapters, mesh = inject(nn.Sequential(nn.Linear(4, 3)), ["0"], r=1), init_device_mesh("cpu", (world.size,))
    adapters.add_adapter("a")
    adapters.train_adapter(None)
    layer = adapters.layers["0"]
    for table in (layer.lora_A, layer.lora_B):
        table["a"] = nn.Parameter(distribute_tensor(table["a"].detach(), mesh, [Shard(0)]), requires_grad=False)
    with adapters.batch([0, -1]):
        return not adapters._state.unchecked


def test_a_share_of_a_sharded_adapter_may_be_empty() -> None:
    assert spawn(2, batch_of_sharded) == [True, True]


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def steps(self, first: int, losses: Sequence[float], rates: Sequence[float]) -> None:
        self.seen += losses


GRAPHED = [{"lora_dropout": 0.3}, {"amp": "float16", "distill": 0.5, "optimizer": "sgd"}]


def learn_on_gpus(world: World, device: str) -> list[tuple[list[float], Tensor, str]]:
    """Each case without and with graphs; then the last one with them in the process of rank 1 alone."""
    cases = [{**changes, "graphs": graphs} for changes in GRAPHED for graphs in ("off", "auto")]
    out = []
    for changes in (*cases, cases[-1]):
        if len(out) == len(cases) and world.first:
            speed.why_not = lambda *_: "not here"  # type: ignore[attr-defined]
        heard = Losses()
        usual = {"device": device, "deterministic": True, "increment": 3, "epochs": 3}
        result, method = learn(world, {**usual, **changes}, callbacks=[heard])
        assert method.prototypes is not None
        out.append((heard.seen, method.prototypes.cpu(), result.environment.get("cuda_graph_training", "")))
    return out


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_captured_passes_are_the_passes() -> None:
    """Tasks of 24 and 23 images, so that the last batch of the second is smaller for one process alone."""
    ranks = spawn(2, learn_on_gpus, "cuda")
    for rank in ranks:
        for eager, others in ((rank[0], rank[1:2]), (rank[2], rank[3:])):
            for losses, prototypes, _ in others:
                assert len(losses) == 18 and losses == eager[0] and torch.equal(prototypes, eager[1])
    assert ranks[0][0][0] == ranks[1][0][0] and torch.equal(ranks[0][0][1], ranks[1][0][1])
    said = [[line.split(" in ")[0] for _, _, line in rank] for rank in ranks]
    assert said == [["", "captured"] * 2 + ["not captured: not here"], ["", "captured"] * 2 + ["captured"]]


def count_evaluated(world: World) -> tuple[list[list[int]], list[int]]:
    seen: list[list[int]] = []
    own = evaluate._logits

    def logits(method: Method, images: View, rows: Tensor, *rest: Any) -> Iterator[Tensor]:
        seen.append(rows.tolist())
        return own(method, images, rows, *rest)

    evaluate._logits = logits
    _, method = learn(world, {"method": "simplecil"})
    cache = [len(method.prototypes)]  # type: ignore[arg-type]
    return seen, cache


def test_every_test_image_is_evaluated_once() -> None:
    (first, _), (second, _) = spawn(2, count_evaluated)
    for task, (a, b) in enumerate(zip(first, second)):
        assert len({*a, *b}) == len(a) + len(b) == (8, 16, 23)[task]
        assert abs(len(a) - len(b)) <= 1
    for parts in (first, second):
        assert (
            parts[1][: len(parts[0])] == parts[0]
        )  # after the next task the same images again: their features are kept


def fitted(world: World, folder: Path) -> tuple[list[float], list[Any], torch.Tensor]:
    """A learner's accuracies after each of two tasks, and its prototypes; it is saved by one process."""
    all_images = data()
    learner = Learner(settings(head="ranpac", **WHOLE), backbone=backbone(), world=world)
    accuracies = []
    for classes in ([0, 1, 2], [3, 4, 5]):
        mine = np.isin(all_images.train_labels, classes)
        learner.fit((all_images.train_images[mine], all_images.train_labels[mine]))
        mine = np.isin(all_images.test_labels, learner.classes)
        figures = learner.evaluate((all_images.test_images[mine], all_images.test_labels[mine]))
        accuracies.append(figures["accuracy"])
    learner.save_pretrained(folder)
    assert learner.method.prototypes is not None
    return accuracies, learner.classes, learner.method.prototypes


def test_a_learner_of_many_processes(tmp_path: Path) -> None:
    one, many = fitted(SINGLE, tmp_path / "one"), spawn(2, fitted, tmp_path / "two")
    for two in many:
        assert two[0] == pytest.approx(one[0], abs=5) and two[1] == one[1]  # one image of 23 may lie on the border
        torch.testing.assert_close(two[2], one[2], rtol=1e-3, atol=1e-4)
    assert torch.equal(many[0][2], many[1][2])
    back = Learner.from_pretrained(tmp_path / "two", backbone=backbone())
    assert torch.equal(back.method.prototypes.cpu(), many[0][2])  # type: ignore[union-attr]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def seeking_once(world: World) -> Tensor:
    made = run(settings(increment=1, sought=1, cutmix=0.0, epochs=1), data=Images(**arrays()), backbone=backbone(),
               world=world)  # fmt: skip
    prototypes: Tensor = made.learner.method.prototypes
    return prototypes


def test_fewer_images_are_sought_than_there_are_processes() -> None:
    one, (first, second) = seeking_once(SINGLE), spawn(2, seeking_once)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, one, rtol=1e-2, atol=1e-2)


def batch_norm(world: World) -> None:
    world.start_(nn.Sequential(nn.BatchNorm1d(3)), [])


def too_small(world: World) -> None:
    few = {name: np.concatenate([a[:6], a[:2]]) for name, a in arrays().items()}
    run(settings(increment=1), data=Images(**few), backbone=backbone(), world=world)


def test_what_many_processes_cannot_do() -> None:
    for job, message in ((batch_norm, "0 normalises over the batch"), (too_small, "1 training images for 2 processes")):
        errors = spawn(2, job)
        assert any(isinstance(e, ValueError) and message in str(e) for e in errors)
        assert all(isinstance(e, ValueError | Stopped) for e in errors)
    with pytest.raises(ValueError, match="must be auto, cuda or cpu under torchrun"):
        World(0, 2).place(torch.device("cuda:1"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="2 processes on a host need as many GPUs there, got 0"):
            World(0, 2, 0, 2).place(torch.device("cuda"))


# ---------------------------------------------------------------------- checkpoints


def learn_until(world: World, changes: dict[str, Any], folder: Path, saves: int) -> Any:
    """A run that ends after so many saves."""
    save, done = Checkpoint._save, [0]

    def save_and_cut(self: Checkpoint, *args: Any, **keywords: Any) -> None:
        save(self, *args, **keywords)
        done[0] += 1
        if done[0] == saves:
            raise Cut

    Checkpoint._save = save_and_cut  # type: ignore[method-assign]
    torch.manual_seed(saves)
    try:
        return figures(*learn(world, changes, folder))
    finally:
        Checkpoint._save = save  # type: ignore[method-assign]


RESUMED = [
    {"method": "plora", "fusion": "learned", "head": "ranpac", "lora_dropout": 0.3},
    {"method": "plora-ensemble", "transform": "pilot"},
]


@pytest.mark.parametrize("changes", RESUMED, ids=lambda c: c["method"])
def test_resume(changes: dict[str, Any], tmp_path: Path) -> None:
    """As many processes continue to the same bits; another number of them to the same results."""
    whole = spawn(2, learn_all, [changes])[0][0]
    for saves in (1, 4):  # after an epoch, in the middle of the second task
        assert all(isinstance(e, Cut | Stopped) for e in spawn(2, learn_until, changes, tmp_path, saves))
    for result in spawn(2, learn_until, changes, tmp_path, 99):
        assert (result["curve"], result["matrix"]) == (whole["curve"], whole["matrix"])
        assert torch.equal(result["prototypes"], whole["prototypes"]) and torch.equal(result["logits"], whole["logits"])
    assert not list(tmp_path.rglob(".*"))


def test_resume_with_another_number_of_processes(tmp_path: Path) -> None:
    changes = {"method": "plora", "head": "gaussian", "transform": "pilot"}
    (one,) = spawn(1, learn_until, changes, tmp_path / "whole", 99)
    for size in (3, 1):
        assert all(isinstance(e, Cut | Stopped) for e in spawn(size, learn_until, changes, tmp_path, 3))
    for result in spawn(2, learn_until, changes, tmp_path, 99):
        agree(one, result)


def learn_other(world: World, folder: Path) -> None:
    learn(world, {"lr": 0.1} if world.rank else {}, folder)


def learn_full(world: World, folder: Path) -> None:
    def full(self: Checkpoint, *_: Any) -> None:
        raise OSError("no space left")

    Checkpoint._write = full  # type: ignore[assignment]
    learn(world, {}, folder)


def test_an_error_on_one_rank_stops_all(tmp_path: Path) -> None:
    first, second = spawn(2, learn_other, tmp_path / "a")
    assert isinstance(second, ValueError) and isinstance(first, Stopped)
    assert str(second) == "the process of rank 0 is of another run: lr is 0.005 there and 0.1 here"
    first, second = spawn(2, learn_full, tmp_path / "b")
    assert isinstance(first, OSError) and "cannot write the checkpoint" in str(first) and isinstance(second, Stopped)


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def problem(tmp_path: Path) -> list[str]:
    np.savez(tmp_path / "toy.npz", **{name: value[:-1] for name, value in arrays().items()})
    return ["--data", str(tmp_path / "toy.npz"), "--increment", "2", "--r", "2", "--epochs", "2", "--device", "cpu"]


def command_line(_: None, arguments: list[str], breaks: str = "") -> tuple[int, str, str]:
    """plora-ext; the images are gone for the process of rank `breaks`."""
    made: dict[str, Any] = {}
    exec(TINY, made)
    plora_ext.cil.build.create_backbone = made["create"]
    if os.environ["RANK"] == breaks:
        View.epoch = _gone  # type: ignore[assignment]
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def _gone(*_: Any) -> None:
    raise OSError("the images are gone")


def test_one_process_writes(problem: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train = ["train", *problem, "--out", str(out)]
    assert spawn(2, command_line, train, "1") == [
        (2, first_line(tmp_path), ""),
        (2, "", "error: the images are gone\n"),
    ]
    assert not (out / "metrics.json").exists()

    (code, said, _), (other_code, *other) = spawn(2, command_line, train)
    assert (code, other_code, other) == (0, 0, ["", ""])
    assert said.startswith(first_line(tmp_path)) and "task  3 of 3" in said and "written to" in said
    files = {"accuracy.png", "checkpoint", "metrics.json", "settings.yaml", "task_matrix.png"}
    assert {p.name for p in out.iterdir()} == files
    result = load_results(out)[0]

    (_, said, _), other = spawn(2, command_line, ["eval", str(out), "--out", str(tmp_path / "eval.json")])
    seen = json.loads((tmp_path / "eval.json").read_text())
    assert (seen["accuracy"], seen["task_accuracies"]) == (result.curve[-1], result.matrix[-1])
    assert "after 3 of 3 tasks" in said and other == (0, "", "")
    refused = spawn(2, command_line, ["report", str(out)])
    assert all(code == 2 for code, *_ in refused)
    assert "".join(e for *_, e in refused) == (
        "error: only demo, train, eval and predict are for many processes: leave torchrun out\n"
    )

    made: dict[str, Any] = {}
    exec(TINY, made)
    monkeypatch.setattr(plora_ext.cil.build, "create_backbone", made["create"])
    images, labels = (arrays()[name][:-1] for name in ("test_images", "test_labels"))
    rows = Trained(out).predict(images)  # what several wrote, one reads
    right = np.mean([row["class"] == label for row, label in zip(rows, labels)])
    assert 100 * right == pytest.approx(result.curve[-1])
    assert spawn(2, predict, out) == [rows, rows]


def first_line(folder: Path) -> str:
    return f"{folder}/toy.npz: 47 training and 23 test images, 6 classes in 3 tasks, 2 processes\n"


def predict(world: World, run: Path) -> list[dict[str, Any]]:
    made: dict[str, Any] = {}
    exec(TINY, made)
    plora_ext.cil.build.create_backbone = made["create"]
    return Trained(run, world).predict(arrays()["test_images"][:-1])


def test_torchrun(problem: list[str], tmp_path: Path) -> None:
    script = tmp_path / "plora.py"
    script.write_text(
        f"{TINY}\nimport sys\nimport plora_ext.cil.build as engine\nfrom plora_ext.cli import main\n"
        "engine.create_backbone = create\nif __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "--", str(script), "train", *problem, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 tasks, 2 processes") == done.stdout.count("written to") == 1
    assert len(load_results(tmp_path / "run")[0].curve) == 3
