"""Captured functions, steps and passes: the same numbers as without, and eager runs where a graph cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext.cil import Images, Result, Settings, run
from plora_ext.cil.callbacks import Callback
from plora_ext.cil.checkpoint import Checkpoint
from plora_ext.data import Backbone
from plora_ext.graphs import Captured, why_not

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Heard(Callback):
    """The losses of a run, and what it said."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.lines: list[str] = []

    def epoch(self, number: int, loss: float) -> None:
        self.losses.append(loss)

    def note(self, line: str) -> None:
        self.lines.append(line)


def images() -> Images:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 50)
    patterns = rng.integers(0, 255, (6, 16, 16, 3))
    noisy = (patterns[labels] + rng.normal(0, 60, (300, 16, 16, 3))).clip(0, 255).astype(np.uint8)
    return Images(noisy, labels, noisy[::2], labels[::2])


def backbone() -> Backbone:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=0)
    return Backbone(vit.eval(), 16, [0.5] * 3, [0.5] * 3)


def learn(model: Backbone | None = None, checkpoint: Checkpoint | None = None, **changes: Any) -> tuple[Result, Heard]:
    quick = {"increment": 2, "r": 4, "epochs": 3, "batch_size": 15, "eval_batch_size": 16, "lr": 5e-3}
    heard = Heard()
    settings = Settings(**{**quick, "device": "cuda", "deterministic": True, **changes})
    return run(settings, data=images(), backbone=model or backbone(), callbacks=[heard], checkpoint=checkpoint), heard


def said(result: Result) -> str | None:
    return result.environment.get("cuda_graph_training")


# ---------------------------------------------------------------------- on any machine


def test_on_a_cpu_the_function_runs_as_it_is() -> None:
    calls: list[int] = []
    captured = Captured(lambda x: calls.append(1) or x + 1)
    for _ in range(6):
        assert captured(torch.ones(2)).tolist() == [2, 2]
    assert len(calls) == 6 and captured.reason == "the tensors are not on a CUDA device"


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "tensor", "all"])
def test_hooks_are_a_reason(kind: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert why_not(model, model.parameters()) is None
    if kind == "tensor":
        handle = model[1].weight.register_hook(lambda grad: grad)
    elif kind == "all":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    else:
        handle = getattr(model[1], f"register_{kind}_hook")(lambda *_: None)
    expected = {"tensor": "a parameter has hooks", "all": "hooks are registered for all modules"}
    assert why_not(model, model.parameters()) == expected.get(kind, "1 has hooks")
    handle.remove()
    assert why_not(model, model.parameters()) is None


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_captured_step_is_the_step(optimizer: str) -> None:
    """Dropout too, with a ragged batch in between and a learning rate that changes."""
    torch.use_deterministic_algorithms(True)
    xs = [torch.randn(4 if i == 5 else 8, 16, device="cuda") for i in range(10)]
    ys = [torch.randint(0, 3, (len(x),), device="cuda") for x in xs]

    def losses(graphs: bool) -> tuple[list[float], list[Tensor], Any]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.3), nn.ReLU(), nn.Linear(64, 3)).cuda()
        lr = torch.zeros((), device="cuda")
        options: dict[str, Any] = {"capturable": True} if optimizer == "adamw" else {"momentum": 0.9}
        kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
        optim = kind(model.parameters(), lr, fused=True, **options)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = F.cross_entropy(model(x), y)
            optim.zero_grad()
            loss.backward()
            optim.step()
            return loss.detach()

        called = Captured(step) if graphs else step
        seen = []
        for i, (x, y) in enumerate(zip(xs, ys)):
            lr.fill_(0.1 / (i + 1))
            seen.append(float(called(x, y)))
        return seen, [p.detach() for p in model.parameters()], called

    (eager, weights, _), (replayed, others, captured) = losses(False), losses(True)
    torch.use_deterministic_algorithms(False)
    assert captured.reason is None and captured.seconds > 0 and captured.bytes >= 0
    assert replayed == eager and all(torch.equal(a, b) for a, b in zip(weights, others))


@pytest.mark.cuda
@cuda
def test_the_first_replay_draws_the_numbers_that_are_next() -> None:
    """However late the capture's stream is, on which torch sets the random state of the graph to its beginning."""
    begin, x = torch.cuda.CUDAGraph.capture_begin, torch.ones(64, device="cuda")

    def late(self: Any, *args: Any, **options: Any) -> None:
        torch.cuda._sleep(100_000_000)
        begin(self, *args, **options)

    def function(x: Tensor) -> Tensor:
        torch.cuda._sleep(300_000_000)  # between what a replay sets and the kernel that reads it
        return F.dropout(x)

    with mock.patch.object(torch.cuda.CUDAGraph, "capture_begin", late):
        found = []
        for called in (function, Captured(function, warmup=1)):
            torch.manual_seed(1)
            found.append([called(x).tolist() for _ in range(3)])
    assert called._graph is not None and found[0] == found[1]


@pytest.mark.cuda
@cuda
def test_what_waits_for_the_host_runs_as_it_is() -> None:
    model = nn.Linear(4, 4).cuda()

    def function(x: Tensor) -> Tensor:
        y = model(x)
        return y if float(y.sum()) > 0 else y + 1

    heard: list[Captured] = []
    captured = Captured(function, 1, tried=heard.append)
    x = torch.randn(3, 4, device="cuda")
    for _ in range(4):
        torch.testing.assert_close(captured(x), function(x))
    assert heard == [captured] and captured.reason
    torch.cuda.manual_seed(3)  # random numbers come as before
    expected = torch.randn(3, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.randn(3, device="cuda"), expected)
    twice = Captured(lambda t: t * 2, 1)
    assert all(torch.equal(twice(x), x * 2) for _ in range(4)) and twice.reason is None


@pytest.mark.cuda
@cuda
def test_a_failed_capture_gives_the_stream_back() -> None:
    """On torch's own stream of captures nobody who waits for the caller's would wait for what follows."""
    stream, x = torch.cuda.current_stream(), torch.ones(4, device="cuda")
    captured = Captured(lambda t: t + float(t.sum()), 1)
    assert all(captured(x).tolist() == [5] * 4 for _ in range(3)) and captured.reason
    assert torch.cuda.current_stream() == stream


@pytest.mark.cuda
@cuda
def test_a_failed_capture_leaves_other_graphs_their_numbers() -> None:
    x = torch.ones(64, device="cuda")
    dropout, fails = Captured(F.dropout, 1), Captured(lambda t: t + float(t.sum()), 1)
    for captured in (dropout, fails):
        for _ in range(3):
            captured(x)
    assert dropout.reason is None and fails.reason
    found = []
    for called in (F.dropout, dropout, F.dropout):
        torch.manual_seed(1)
        found.append([called(x).tolist() for _ in range(3)])
    assert found[0] == found[1] == found[2]


@pytest.mark.cuda
@cuda
def test_a_failed_capture_does_not_take_the_memory_of_others() -> None:
    """Graphs whose memory it takes share it: a replay of one would write over what another has given."""
    x = torch.ones(64, device="cuda")

    def captured(function: Any) -> Captured:
        made = Captured(function, 1)
        made(x), made(x)
        return made

    fails = [captured(lambda t: t + float(t.sum())) for _ in range(8)]
    assert all(made.reason for made in fails)
    fails.clear()
    graphs = [captured(lambda t: (t + 1) * 2) for _ in range(8)]
    segments = torch.cuda.memory_snapshot()
    for made in graphs:
        at = made._outputs.data_ptr()
        (segment,) = (s for s in segments if s["address"] <= at < s["address"] + s["total_size"])
        assert tuple(segment["segment_pool_id"]) == tuple(made._graph.pool())


@pytest.mark.cuda
@cuda
def test_a_graph_that_is_gone_keeps_its_memory_until_its_last_replay_has_ended() -> None:
    """Of segments that can grow torch waits for the capture's stream alone, and not for that of the replay."""
    script = """if True:
        import torch
        from plora_ext.graphs import Captured

        def late(x):
            t = x + 1
            torch.cuda._sleep(400_000_000)
            return t * 2

        x = torch.ones(4 << 20, device="cuda")
        first, second = Captured(late, 1), Captured(torch.neg, 1)
        first(x), second(x), first(x)
        y = first(x)
        del first
        second(x)
        assert second.reason is None and bool((y == 4).all())
    """
    segments = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **segments}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("waits", [False, True])
def test_autocast_s_casts_are_a_graph_s_own(waits: bool) -> None:
    """What a call before has cast is freed with its block; what a failed capture has cast was never written."""
    model, x = nn.Linear(64, 64).cuda(), torch.randn(64, 64, device="cuda")

    def function(x: Tensor) -> Tensor:
        y = model(x)
        return y + float(y.sum() > 1e9) if waits else y

    for blocks in ((2, 1, 1), (1, 1, 1)):
        captured = Captured(function, 1)
        for calls in blocks:
            with torch.no_grad():
                model.weight.add_(1)
                with torch.autocast("cuda", torch.bfloat16):
                    found = [captured(x).clone() for _ in range(calls)][-1]
                with torch.autocast("cuda", torch.bfloat16):
                    torch.testing.assert_close(found, model(x))
        assert bool(captured.reason) == waits


@pytest.mark.cuda
@cuda
def test_a_number_of_the_host_is_a_reason() -> None:
    """A graph would go on with the one that it was captured with."""
    captured, x = Captured(lambda t, factor: t * factor, 1), torch.ones(3, device="cuda")
    assert all(captured(x, torch.tensor(float(i))).tolist() == [i] * 3 for i in range(4)) and captured.reason


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    """Captured on a stream of another device, a graph would be empty."""
    captured = Captured(lambda t: F.dropout(t + 1), 1)
    assert torch.cuda.current_device() == 0
    for i in range(1, 5):
        found = captured(torch.full((64,), float(i), device="cuda:1"))
        assert set(found.tolist()) == {0.0, 2.0 * (i + 1)}
    assert captured._graph is not None and torch.cuda.current_device() == 0


METHODS = ["plora", "plora-ensemble", "lora-first", "aper", "lora-sequential", "joint"]
INFLORA, SD_LORA = {"init": "inflora", "fusion": "sum", "onto": "fused"}, {"fusion": "learned"}


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize(
    "changes", [*({"method": m} for m in METHODS), INFLORA, SD_LORA, {"amp": "bfloat16"}, {"amp": "float16"},
                {"lora_dropout": 0.3}, {"optimizer": "sgd"}, {"transform": "pilot", "transform_on": "device"},
                {"head": "gaussian"}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)  # fmt: skip
def test_runs_are_equal(changes: dict[str, Any]) -> None:
    (eager, told), (captured, heard) = learn(graphs="off", **changes), learn(**changes)
    fits = 1 if changes.get("method") in ("joint", "lora-first", "aper") else 3
    assert heard.losses == told.losses and len(told.losses) == 3 * fits
    assert captured.curve == eager.curve and captured.matrix == eager.matrix
    assert str(said(captured)).startswith("captured in ") and said(eager) is None and not heard.lines, heard.lines


@pytest.mark.cuda
@cuda
def test_a_resumed_run_is_equal(tmp_path: Any) -> None:
    whole, heard = learn()

    class Stop(Exception):
        pass

    class Stops(Heard):
        def epoch(self, number: int, loss: float) -> None:
            if number == 5:
                raise Stop

    settings = {"increment": 2, "r": 4, "epochs": 3, "batch_size": 15, "eval_batch_size": 16, "lr": 5e-3}
    with pytest.raises(Stop):
        run(Settings(**settings, device="cuda", deterministic=True), data=images(), backbone=backbone(),
            callbacks=[Stops()], checkpoint=Checkpoint(tmp_path))  # fmt: skip
    resumed, rest = learn(checkpoint=Checkpoint(tmp_path, resume=True))
    assert resumed.curve == whole.curve and rest.losses == heard.losses[-len(rest.losses) :]


@pytest.mark.cuda
@cuda
def test_a_hooked_model_runs_as_it_is_and_says_so_once() -> None:
    model = backbone()
    seen: list[int] = []
    model.model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    result, heard = learn(model)
    assert result.curve == learn(graphs="off")[0].curve
    assert [line for line in heard.lines if "training" in line] == [
        "CUDA graph of training: not captured: blocks.0 has hooks"
    ]
    assert len(seen) > 3 * 3 * 7
