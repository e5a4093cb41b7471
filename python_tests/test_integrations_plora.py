"""PLoRA, the module that the hosts drive: its state decides what it computes, and its backbone stays frozen."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from plora_ext.cil import plora
from plora_ext.cil.alignment import align
from plora_ext.cil.plora import PLoRA

SETTINGS: dict[str, Any] = {
    "r": 3, "lora_alpha": 16.0, "alignment": "semantic", "tau": 0.5, "ridge": 0.7, "scale": 4.0, "init": "fresh"
}  # fmt: skip


class Backbone(nn.Module):
    """[B, 6] to 5 features, normalised over the batch in training mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.last, self.num_features = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5), 5

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.norm(self.fc(x))))
        return y


def network(**settings: Any) -> PLoRA:
    return PLoRA(Backbone(), ["fc", "last"], **{"r": 2, "alignment": "none", **settings})


def learn(net: PLoRA, task: int, steps: int = 3) -> None:
    torch.manual_seed(task)
    images, labels = 3 * torch.randn(24, 6), 2 * task + torch.arange(24) % 2
    net.add_task([2 * task, 2 * task + 1])
    net.start([(images, labels)])
    optimizer = torch.optim.SGD(net.parameters_to_train(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    net.end_task([(images, labels)])


def test_evaluation_in_the_midst_of_a_task() -> None:
    """Old classes by the model before, those of the task by what trains; and training goes on as without."""
    nets = network(), network()
    logits = {}
    for net, looks in zip(nets, (True, False)):
        for task in range(2):
            learn(net, task)
        before = net.eval()(images())
        torch.manual_seed(9)
        data = 3 * torch.randn(24, 6), 4 + torch.arange(24) % 2
        net.add_task([4, 5])
        net.start([data])
        optimizer = torch.optim.SGD(net.parameters_to_train(), 0.1)
        for _ in range(3):
            if looks:
                logits["eval"] = net.eval()(images())
                net.train()
            logits["train"] = net(images())
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data[0]), data[1]).backward()
            optimizer.step()
        if looks:
            torch.testing.assert_close(logits["eval"][:, :4], before)
            torch.testing.assert_close(logits["eval"][:, 4:], logits["train"][:, 4:])
            again = network()
            again.load_state_dict(net.state_dict())
            torch.testing.assert_close(again.eval()(images()), net.eval()(images()))
            net.train()
        net.end_task([data])
    assert torch.equal(nets[0](images()), nets[1](images()))


def test_a_state_in_the_midst_of_a_task_is_loaded_after_that_task() -> None:
    net, ended = network(), network()
    learn(net, 0)
    net.add_task([2, 3])
    net.start([(images(), 2 + torch.arange(7) % 2)])
    for task in range(2):
        learn(ended, task)
    ended.load_state_dict(net.state_dict())
    for one in (net, ended):
        assert one.adapters.active == ["task1"] and all(p.requires_grad for p in one.parameters_to_train())
        assert not any(p.requires_grad for p in one.adapters.parameters("task0"))
    assert torch.equal(ended.train()(images()), net.train()(images()))


def images() -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("way", ["in memory", "torch.save", "safetensors"])
def test_a_network_of_other_settings_takes_over_those_of_the_file(way: str) -> None:
    net, fresh = network(**SETTINGS), network()
    for task in range(2):
        learn(net, task)
    state = net.state_dict()
    if way == "torch.save":
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
    elif way == "safetensors":
        state = load(save({key: value.contiguous() for key, value in state.items()}))
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.eval()(images()), net.eval()(images()))
    learn(net, 2)  # and goes on by its rules
    learn(fresh, 2)
    torch.testing.assert_close(fresh.eval()(images()), net.eval()(images()))
    assert fresh.bank.classes == list(range(6))


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_decides_what_comes_next(name: str) -> None:
    """What the test above would not see if it did nothing."""
    one, other = network(**SETTINGS), network(**{k: v for k, v in SETTINGS.items() if k != name})
    for task in range(3):
        learn(one, task)
        learn(other, task)
    assert (one.eval()(images()) - other.eval()(images())).abs().max() > 1e-4


def test_images_are_sought_for_old_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, moved, move = [network(alignment="local", sought=n) for n in (3, 0)], [], plora.move
    monkeypatch.setattr(plora, "move", lambda x, z, model: moved.append(len(x)) or move(x, z, model))
    for net in nets:
        for task in range(3):
            learn(net, task)
    assert moved == [6, 12]  # three for each class of before
    a, b = (net.bank.prototypes for net in nets)
    assert (a[:4] - b[:4]).abs().max() > 1e-4 and torch.equal(a[4:], b[4:])
    fresh = network(sought=9)
    fresh.load_state_dict(nets[0].state_dict())
    assert (fresh.sought, fresh.alignment) == (3, "local")


def test_files_without_settings_stay_readable() -> None:
    net, fresh = network(), network()
    learn(net, 0)
    old = {key: value for key, value in net.state_dict().items() if key != "_extra_state"}
    assert len(old) == len(net.state_dict()) - 1
    assert str(fresh.load_state_dict(old)) == "<All keys matched successfully>"
    torch.testing.assert_close(fresh.eval()(images()), net.eval()(images()))
    del old["bank.sums"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bank.sums"'):
        network().load_state_dict(old)


def test_copies_and_moving_averages_keep_the_settings() -> None:
    net = network(**SETTINGS)
    learn(net, 0)
    twin = copy.deepcopy(net)
    ema = ModelEmaV3(net, decay=0.5)
    ema.update(net)
    for other in (twin, ema.module):
        torch.testing.assert_close(other.eval()(images()), net.eval()(images()))
        assert torch.equal(other.get_extra_state(), net.get_extra_state())


def test_running_statistics_stay_those_of_the_backbone() -> None:
    net = network()
    before = {name: buffer.clone() for name, buffer in net.backbone.named_buffers()}
    assert "norm.running_mean" in before
    learn(net, 0)
    features = net.eval().backbone(images())
    net.train()
    assert net.training and net.backbone.training
    torch.testing.assert_close(net.backbone(images()), features)  # nor do features depend on the rest of the batch
    learn(net, 1)
    for name, buffer in net.backbone.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_what_would_teach_something_else_is_refused() -> None:
    """A word that is no init started from nothing, labels of other tasks counted as the task's first class."""
    with pytest.raises(ValueError, match="init must be newest, first or fresh, got 'newst'"):
        network(init="newst")
    with pytest.raises(ValueError, match="alignment must be one of none, .*, got 'rigde'"):
        network(alignment="rigde")
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        network(tau=0)
    net = network()
    learn(net, 0)
    with pytest.raises(ValueError, match=r"of ids from 0, got \[-1, 2\]"):
        net.add_task([2, -1])
    with pytest.raises(ValueError, match=r"of ids from 0, got \[2, 3\.5\]"):
        net.add_task([3.5, 2])  # type: ignore[list-item]
    net.add_task([2, 3])
    with pytest.raises(RuntimeError, match=r"of classes \[2, 3\] has not ended"):
        net.add_task([4, 5])
    assert net.adapters.names == ["task0", "task1"]
    x = images()
    for labels in ([0, 2, 2, 2, 3, 3, 3], [2, 2, 2, 3, 3, 3, 4]):  # replayed images, say
        for call in (net.start, net.end_task):
            with pytest.raises(ValueError, match=rf"the task's classes \[2, 3\], got {labels[0] and labels[-1]}"):
                call([(x, torch.tensor(labels))])
    with pytest.raises(ValueError, match=r"an image of each class of the task, got none of \[2, 3\]"):
        net.end_task(iter([]))  # an iterator that `start` has used up
    for short, missing in (([], r"\[2, 3\]"), ([(x, torch.full((7,), 3))], r"\[2\]")):
        with pytest.raises(ValueError, match=f"an image of each class of the task, got none of {missing}"):
            net.start(short)
    with pytest.raises(ValueError, match=r"labels must be integers, got torch\.float32"):
        net.start([(x, torch.full((7,), 2.0))])
    net.end_task([(x, torch.tensor([2, 2, 2, 3, 3, 3, 3], dtype=torch.uint16))])
    assert net.bank.counts.tolist() == [12, 12, 3, 4]
    with pytest.raises(RuntimeError, match="no task to end: call add_task first"):
        net.end_task([])
    with pytest.raises(RuntimeError, match="no task to train for yet: call add_task first"):
        network().parameters_to_train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_learns_the_same_whatever_torchs_default_dtype_is(dtype: torch.dtype) -> None:
    """`end_task` ended in an error of torch's, and thirds were those of 16 bits."""
    x, labels = images(), torch.arange(7) % 2
    nets = [network(alignment="local", sought=2) for _ in range(2)]
    for net, default in zip(nets, (torch.float32, dtype)):
        torch.set_default_dtype(default)
        try:
            for task in range(3):
                net.add_task([2 * task, 2 * task + 1])
                net.directions.data.fill_(0.5)  # whose draws are of the default
                for i, parameter in enumerate(net.adapters.parameters(f"task{task}")):
                    parameter.data.copy_(
                        torch.linspace(-1, 1, parameter.numel(), dtype=torch.float32).view_as(parameter) / (i + 2)
                    )
                net.start([(x, labels + 2 * task)])
                net.end_task([(x, labels + 2 * task)])
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(nets[0].coefficients, nets[1].coefficients) and nets[1].coefficients.dtype == torch.float32
    assert torch.equal(nets[0].eval()(x), nets[1].eval()(x))


def test_tasks_begin_and_end_under_inference_mode() -> None:
    """Adapters could never train, and images were sought in vain."""
    net = network(alignment="local", sought=2)
    for task in range(3):
        with torch.inference_mode():
            batches = [(images(), 2 * task + torch.arange(7) % 2)]
            net.add_task([2 * task, 2 * task + 1])
            net.start(batches)
        x, labels = (part.clone() for part in batches[0])
        nn.functional.cross_entropy(net(x), labels).backward()
        torch.optim.SGD(net.parameters_to_train(), 0.1).step()
        with torch.inference_mode():
            net.end_task(batches)
    assert net.bank.counts.tolist() == [4, 3] * 3 and not net.bank.prototypes.is_inference()


def test_images_of_integers_cannot_be_sought() -> None:
    """A backbone may normalise its pixels itself."""

    class Normalising(Backbone):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 255 - 0.5)

    x, labels = torch.randint(0, 256, (7, 6), dtype=torch.uint8), torch.arange(7) % 2
    for sought in (10, 0):
        net = PLoRA(Normalising(), ["fc", "last"], r=2, sought=sought)
        net.add_task([0, 1])
        net.end_task([(x, labels)])
        net.add_task([2, 3])
        if sought:
            with pytest.raises(ValueError, match="must give its images a gradient, or else sought be 0"):
                net.end_task([(x, labels + 2)])
        else:
            net.end_task([(x, labels + 2)])
            assert net.eval()(x).shape == (7, 4)


def test_a_backbone_without_gradients_is_refused() -> None:
    """The classifier alone trained, without a word."""

    class Detached(Backbone):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    net, x = PLoRA(Detached(), ["fc", "last"], r=2), images()
    net.add_task([0, 1])
    net.start([(x, torch.arange(7) % 2)])
    with pytest.raises(ValueError, match="the backbone gives its adapters no gradient"):
        net(x)
    with torch.no_grad():
        net(x)
    net.adapters.train_adapter(None)
    net(x)


def test_cosines_are_float32_under_autocast() -> None:
    """In 16 bits at a scale of 32 they were multiples of an eighth."""
    net, x = network(), images()
    net.add_task([0, 1])
    net.start([(x, torch.arange(7) % 2)])
    with torch.autocast("cpu", torch.bfloat16):
        logits, features = net(x), net.backbone(x).float()
    expected = net.head.scale * nn.functional.cosine_similarity(features[:, None], net.directions, dim=-1)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("end", ["no images", "another label", "not finite", "interrupted"])
def test_a_task_goes_on_where_it_could_not_end(end: str) -> None:
    """The mean of all adapters stayed active, and what trained on was another model without a word."""
    net, x, labels = network(alignment="local", sought=0), images(), 2 + torch.arange(7) % 2
    learn(net, 0)
    net.add_task([2, 3])
    net.start([(x, labels)])
    for parameter in net.adapters.parameters("task1"):
        nn.init.normal_(parameter.data, std=0.3)
    other, before = copy.deepcopy(net), net(x)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        if end != "no images":
            yield x, labels
        if end == "interrupted":
            raise KeyboardInterrupt
        if end != "no images":
            yield (x * torch.inf if end == "not finite" else x), labels + (end == "another label")

    with pytest.raises(KeyboardInterrupt if end == "interrupted" else ValueError):
        net.end_task(batches())
    assert net.training and net.adapters.active == ["task1"] and torch.equal(net(x), before)
    assert torch.equal(net.coefficients, other.coefficients)
    for one in (net, other):
        one.end_task([(x, labels)])
    assert torch.equal(net.eval()(x), other.eval()(x))


@pytest.mark.parametrize("alignment", ["none", "ridge"])
def test_a_class_that_comes_back_is_aligned_before_its_new_images_join(alignment: str) -> None:
    net = network(alignment=alignment, ridge=0.01)
    learn(net, 0)
    old, before = net.bank.prototypes.clone(), copy.deepcopy(net)
    x, labels = 3 * torch.randn(40, 6), 1 + torch.arange(40) % 2
    net.add_task([1, 2])
    for parameter in net.adapters.parameters("task1"):
        nn.init.normal_(parameter.data, std=0.3)
    with pytest.raises(ValueError, match="got 7"):  # and nothing of it is counted
        net.end_task([(x, labels), (x[:1], torch.tensor([7]))])
    net.end_task([(x[:20], labels[:20]), (x[20:], labels[20:])])
    with torch.no_grad():
        then, now = before.eval().backbone(x), net.eval().backbone(x)
    aligned = align(alignment, old, then, now, labels - 1, ridge=0.01)
    assert alignment == "none" or not torch.allclose(aligned, old, rtol=0.1)
    torch.testing.assert_close(net.bank.prototypes[0], aligned[0])
    torch.testing.assert_close(net.bank.prototypes[1], (12 * aligned[1] + now[labels == 1].sum(0)) / 32)
    torch.testing.assert_close(net.bank.prototypes[2], now[labels == 2].mean(0))
    assert net.bank.counts.tolist() == [12, 32, 20]


def test_a_network_in_16_bits_trains() -> None:
    net = network().bfloat16()
    x, labels = images().bfloat16(), torch.arange(7) % 2
    net.add_task([0, 1])
    net.start([(x, labels)])
    nn.functional.cross_entropy(net(x), labels).backward()
    assert all(p.grad is not None for p in net.parameters_to_train())


def test_features_that_are_not_finite_are_refused() -> None:
    net = network()
    net.add_task([0, 1])
    batch, labels = torch.ones(2, 6), torch.tensor([0, 1])
    with torch.no_grad():
        net.backbone.last.base_layer.bias[0] = torch.nan
    for call in (net.start, net.end_task):
        with pytest.raises(ValueError, match="features must be finite"):
            call([(batch, labels)])
    assert not net.bank.classes and net.directions.isfinite().all()
