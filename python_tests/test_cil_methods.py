"""Every method end to end on a small problem: tiny images of six classes in three tasks, a tiny ViT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from plora_ext.cil import Images, PLoRA, Result, Settings, run, sought, training
from plora_ext.cil.alignment import align, class_means
from plora_ext.cil.build import pick_device
from plora_ext.cil.callbacks import Callback
from plora_ext.cil.fusion import coefficients
from plora_ext.cil.heads import HEADS, RanPAC
from plora_ext.cil.inflora import InputGrams, Subspaces, share_after
from plora_ext.cil.methods import METHODS, Method, PLoRAFused
from plora_ext.cil.speed import Speed
from plora_ext.cil.stream import Task
from plora_ext.cil.training import Trainer
from plora_ext.data import Backbone, View, hold_out, quarter_turns
from plora_ext.nn import MultiLoRALinear, inject

CLASSES = 6


@pytest.fixture(scope="module")
def images() -> Images:
    """A colour pattern for each class, under noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 255, (CLASSES, 4, 4, 3))

    def draw(each: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(CLASSES), each)
        clean = np.kron(patterns[labels], np.ones((1, 4, 4, 1)))
        return (clean + rng.normal(0, 40, clean.shape)).clip(0, 255).astype(np.uint8), labels

    return Images(*draw(20), *draw(10))


def backbone() -> Backbone:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return Backbone(vit.eval(), 16, [0.5] * 3, [0.5] * 3)


def learn(images: Images, callbacks=(), make=None, **settings) -> Result:
    quick = {"increment": 2, "r": 4, "epochs": 4, "batch_size": 16, "lr": 5e-3, "device": "cpu", "augment": False}
    return run(Settings(**{**quick, **settings}), data=images, backbone=backbone(), callbacks=callbacks, make=make)


@pytest.mark.parametrize(("init", "start"), [("first", "task0"), ("newest", "task1"), ("fresh", None)])
def test_where_an_adapter_starts(init: str, start: str | None) -> None:
    net = PLoRA(backbone().model, r=2, init=init)
    for value in (1.0, 2.0):
        name = net.add_adapter()
        for p in net.adapters.parameters(name):
            torch.nn.init.constant_(p, value)
    net.add_adapter()
    made, older = ([p.detach() for p in net.adapters.parameters(name)] for name in ("task2", start or "task0"))
    assert all(map(torch.equal, made, older)) == (start is not None)


def test_cutmix_trains_and_repeats(images: Images) -> None:
    first, again, plain = (learn(images, cutmix=share, scale=4.0) for share in (0.5, 0.5, 0.0))
    assert first.curve == again.curve
    assert first.curve[-1] > 1.5 * 100 / CLASSES
    a, b = (next(iter(r.learner.method.adapters.parameters("task0"))) for r in (first, plain))
    assert not torch.equal(a, b)


def test_turned_classes_are_classes_of_their_own(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a batch is turned, and the classifier of a task has a direction for every class and turn."""
    first, again = (learn(images, rotations=True, cutmix=0.5, scale=4.0) for _ in range(2))
    assert first.curve == again.curve and first.curve[-1] > 1.5 * 100 / CLASSES
    seen: list[Tensor] = []

    def watched(*given: Any) -> tuple[Tensor, Tensor]:
        turned = quarter_turns(*given)
        seen.append(turned[1])
        return turned

    monkeypatch.setattr(training, "quarter_turns", watched)
    learn(images, rotations=True, epochs=1)
    for wanted in seen:
        each = len(wanted) // 6
        assert torch.bincount(wanted // 2, minlength=4).tolist() == [len(wanted) - 3 * each, each, each, each]


def test_distillation_holds_features_near_those_of_before(images: Images) -> None:
    """The stronger, the less an image's feature moves; task 0 has no model before it."""
    moved = []
    for weight in (0.0, 1.0, 100.0):
        result = learn(images, distill=weight, measure_drift=True, alignment="none", scale=4.0)
        moved.append(result.drift[-1]["after"])
    assert moved[0] > moved[1] > 2 * moved[2]
    plain, first = (learn(images, distill=w, tasks=[list(range(6))], epochs=1) for w in (0.0, 9.0))
    assert plain.curve == first.curve
    a, b = (next(iter(r.learner.method.adapters.parameters("task0"))) for r in (plain, first))
    assert torch.equal(a, b)


@pytest.mark.parametrize("head", HEADS)
def test_images_are_sought_for_old_classes(head: str, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as asked for, once for each task after the first; training is the same without them."""
    aims, move = [], sought.move
    monkeypatch.setattr(sought, "move", lambda x, z, model: aims.append(len(z)) or move(x, z, model))
    learned = [learn(images, alignment="local", sought=n, head=head, projections=100, epochs=1) for n in (7, 0)]
    assert aims == [14, 28]
    assert all(r.curve[-1] > 1.5 * 100 / CLASSES for r in learned)
    a, b = ([*r.learner.method.adapters.parameters("task2")] for r in learned)
    assert all(map(torch.equal, a, b))
    p, q = (r.learner.method.prototypes for r in learned)
    assert not torch.equal(p[:4], q[:4]) and torch.equal(p[4:], q[4:])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str, images: Images) -> None:
    result = learn(images, method=method)
    assert len(result.curve) == len(result.classes_seen) == 3
    assert [len(row) for row in result.matrix] == ([3] if method == "joint" else [1, 2, 3])
    assert result.classes_seen[-1] == CLASSES
    for accuracy, row in zip(result.curve[-len(result.matrix) :], result.matrix, strict=True):
        assert accuracy == pytest.approx(np.mean(row))  # tasks of one size
    assert result.curve[-1] > 1.5 * 100 / CLASSES
    assert result.passes == {"plora-ensemble": 3, "aper": 2}.get(method, 1)
    assert {"prototypes", "eval"} <= set(result.seconds) == set(result.peak_mb)


@pytest.mark.parametrize("head", ["cosine", "ranpac"])
def test_joint_is_evaluated_on_the_growing_sets_among_them_alone(head: str, images: Images) -> None:
    told: list[tuple[int, float]] = []

    class Ear(Callback):
        def task(self, task: int, accuracy: float) -> None:
            told.append((task, accuracy))

    result = learn(images, method="joint", epochs=1, head=head, projections=50, callbacks=[Ear()], scale=2.0)
    method, place = result.learner.method, np.argsort(result.class_order)[images.test_labels]
    with torch.no_grad():
        logits = method.predict(View(images.test_images, result.learner.preparation)).numpy()
    every = [100 * (logits[place < n, :n].argmax(1) == place[place < n]).mean() for n in (2, 4, 6)]
    assert (
        result.curve == pytest.approx(every) and result.classes_seen == [2, 4, 6] and told == [*enumerate(result.curve)]
    )
    among_all = 100 * (logits.argmax(1) == place)[place < 2].mean()
    assert result.matrix == [pytest.approx([among_all, *result.matrix[0][1:]])] and every[0] > among_all
    assert result.curve[-1] == pytest.approx(np.mean(result.matrix[0]))


def test_the_test_set_is_not_touched_by_validation(images: Images) -> None:
    """And what is held out is the same for every seed, and evaluated as a test set of its own would be."""
    garbage = Images(images.train_images, images.train_labels, images.test_images[:1], images.test_labels[:1])
    result = learn(garbage, validation=0.25, method="lora-first", epochs=1)
    part = hold_out(images, 0.25)
    assert (result.num_train, result.num_test) == (90, 30) and result.evaluated_on == "25 % of the training images"
    own = Images(part.train_images, part.train_labels, part.test_images, part.test_labels)
    plain = learn(own, method="lora-first", epochs=1)
    assert result.matrix == plain.matrix and plain.evaluated_on == "the test images"
    other = learn(garbage, validation=0.25, method="simplecil", seed=7)
    assert other.inputs["data_digest"] == result.inputs["data_digest"] == part.digest()
    assert other.class_order != result.class_order
    few = Images(images.train_images[::20], images.train_labels[::20], images.test_images, images.test_labels)
    with pytest.raises(ValueError, match="got none for task 0: add one or, with `validation`, which takes them from"):
        learn(few, validation=0.5)


def test_the_class_order_has_a_seed_of_its_own(images: Images) -> None:
    orders = [learn(images, method="simplecil", **s) for s in ({"seed": 5}, {"seed": 6, "order_seed": 5}, {"seed": 6})]
    assert orders[0].class_order == orders[1].class_order == np.random.RandomState(5).permutation(6).tolist()
    assert orders[2].class_order != orders[0].class_order
    first, again = (learn(images, epochs=1, seed=6, **s).learner.method for s in ({}, {"order_seed": 6}))
    assert torch.equal(first.prototypes, again.prototypes)


ADAPTER = 2 * 4 * ((32 + 96) + (32 + 32))  # r = 4, qkv and proj of two blocks
MEANS, FLOAT = 6 * 32, 4 / 2**20


@pytest.mark.parametrize(
    ("settings", "trainable", "stored", "numbers"),
    [
        ({"method": "simplecil"}, 0, 0, MEANS),
        ({"method": "lora-first"}, ADAPTER, ADAPTER, ADAPTER + MEANS),
        ({"method": "joint"}, ADAPTER, ADAPTER, ADAPTER + MEANS),
        ({"method": "plora"}, ADAPTER, 3 * ADAPTER, 3 * ADAPTER + MEANS + 3),  # and the fusion's coefficients
        ({"method": "plora", "head": "gaussian"}, ADAPTER, 3 * ADAPTER, 3 * ADAPTER + MEANS + 3 + 6 * 32 * 32),
        ({"method": "simplecil", "head": "ranpac", "projections": 50}, 0, 0, MEANS + 32 * 50 + 50 * 50 + 2 * 50 * 6),
        ({"method": "plora", "fusion": "learned"}, ADAPTER + 3, 3 * ADAPTER, 3 * ADAPTER + MEANS + 3),
    ],
)
def test_what_is_trained_and_what_is_kept(
    settings: dict, trainable: int, stored: int, numbers: int, images: Images
) -> None:
    found = learn(images, epochs=1, **settings).parameters
    assert (found["trainable"], found["stored"]) == (trainable, stored)
    assert found["stored_mb"] == pytest.approx(numbers * FLOAT, rel=1e-3)


PAIRS = [
    (f, o)
    for f in ("mean", "sum", "newest", "similarity", "learned")
    for o in ("base", "fused")
    if (f, o) != ("learned", "base")
]


@pytest.mark.parametrize(("fusion", "onto"), PAIRS)
def test_fusion_rules(fusion: str, onto: str, images: Images) -> None:
    assert learn(images, fusion=fusion, onto=onto, epochs=1).curve[-1] > 100 / CLASSES


def test_the_newest_adapter_alone_is_one_trained_on_and_on(images: Images) -> None:
    """The last point of the chain, with old prototypes as they were: what `lora-sequential` learns."""
    assert coefficients("newest", 3).tolist() == [0, 0, 1]
    chain = learn(images, fusion="newest", init="newest", alignment="none", distill=0).learner.method
    one = learn(images, method="lora-sequential").learner.method
    assert chain.coefficients.tolist() == [0, 0, 1] and len(chain.adapters.names) == 3
    assert chain.adapters.active == ["task2"]  # what has no part in it takes no time
    for mine, theirs in zip(chain.adapters.parameters("task2"), one.adapters.parameters("task0"), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(chain.prototypes, one.prototypes, atol=1e-4, rtol=1e-4)
    moved = learn(images, fusion="newest", init="newest", alignment="ridge", distill=0).learner.method
    assert (moved.prototypes[:4] - one.prototypes[:4]).abs().max() > 0.01
    assert torch.equal(moved.prototypes[4:], chain.prototypes[4:])


@pytest.mark.parametrize(("later", "rates"), [(None, [5e-3] * 3), (1e-3, [5e-3, 1e-3, 1e-3])])
def test_the_learning_rate_of_later_tasks(later: float | None, rates: list[float], images: Images) -> None:
    begins: list[list[float]] = []

    class Ear(Callback):
        def steps(self, first: int, losses: list[float], rates: list[float]) -> None:
            begins.append(rates)

    learn(images, lr_later=later, epochs=1, callbacks=[Ear()])
    assert [task[0] for task in begins] == rates
    for task in begins:  # along a cosine from there
        assert task == pytest.approx([task[0] * (1 + np.cos(np.pi * step / 3)) / 2 for step in range(3)])


def test_aper_puts_the_frozen_features_before_the_adapted_ones(images: Images) -> None:
    method = learn(images, method="aper", epochs=1).learner.method
    x = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        expected = torch.cat([backbone().model(x), method.trainer.model(x)], 1)
        torch.testing.assert_close(method.features(x), expected, atol=1e-5, rtol=1e-5)
    assert method.prototypes.shape == (CLASSES, 64) and list(method.spaces()) == ["__base__", "task0"]


@pytest.mark.parametrize("method", ["plora", "lora-first", "aper", "joint"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_in_the_loop(head: str, method: str, images: Images) -> None:
    result = learn(images, method=method, head=head, projections=100, replay_epochs=5, epochs=1)
    assert result.curve[-1] > 2 * 100 / CLASSES and ("head" in result.seconds) == (head != "cosine")


@pytest.mark.parametrize(("fusion", "onto"), [*PAIRS[::2], PAIRS[-1]])
@pytest.mark.parametrize("alignment", ["semantic", "sdc"])
def test_old_and_new_features_from_one_look(
    fusion: str, onto: str, alignment: str, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prototypes are those of whole feature matrices, read before and after the task; images are looked at once."""
    looked, split = [0], View.split

    def counted(self: View, batch_size: int):
        looked[0] += len(self)
        return split(self, batch_size)

    class Twice(PLoRAFused):
        def learn(self, task: Task, view: View, labels: torch.Tensor) -> None:
            before, old = self.features(view), self.prototypes
            super().learn(task, view, labels)
            after, new = self.features(view), class_means(self.features(view), labels, 2)
            if old is not None:
                old = align(s.alignment, old, before, after, labels, tau=s.tau, ridge=s.ridge)
                assert (old - self.prototypes[:-2]).abs().max() < 1e-5 * old.abs().max()
                assert (after - before).abs().max() > 1e-3 * old.abs().max()
            assert torch.equal(new, self.prototypes[-2:])

        def train_and_fuse(self, *args) -> None:
            super().train_and_fuse(*args)
            looked[0] = 0

        def _teach(self, *args) -> None:
            assert looked[0] == 40
            super()._teach(*args)

    s = Settings(method="plora", alignment=alignment)
    monkeypatch.setattr(View, "split", counted)
    chosen = {"fusion": fusion, "onto": onto, "alignment": alignment, "head": "ranpac", "projections": 50}
    learn(images, make=Twice, epochs=1, eval_batch_size=7, **chosen)


def adapted(kept: list[Method], images: Images, **settings) -> dict[str, MultiLoRALinear]:
    """The adapted layers after a run of plora."""

    def make(trainer: Trainer, s: Settings) -> Method:
        kept.append(METHODS["plora"](trainer, s))
        return kept[-1]

    learn(images, make=make, **settings)
    return kept[-1].adapters.layers  # type: ignore[attr-defined]


def test_sd_lora_is_its_formula(images: Images) -> None:
    """Delta W = a_t B_t A_t + sum over i < t of a_i B_i A_i / (|B_i| |A_i|), one learned a_i for all layers."""
    kept: list[Method] = []
    layers = adapted(kept, images, fusion="learned", target_modules=["q", "v"], epochs=2)
    magnitudes = kept[0].coefficients.tolist()  # type: ignore[attr-defined]
    assert len(magnitudes) == 3 and all(a != 0.8 for a in magnitudes)
    for layer in layers.values():
        expected = layer.base_layer.weight.clone()
        for i, name in enumerate(layer.adapter_names):
            for (start, stop), (A, B) in zip(layer.slices.values(), layer.pairs(name)):
                norms = 1 if i == 2 else A.norm() * B.norm()
                expected[start:stop] += magnitudes[i] * (B @ A) / norms
        torch.testing.assert_close(layer.weight, expected, atol=1e-6, rtol=1e-5)


def test_input_grams_are_float32_under_autocast() -> None:
    adapters = inject(nn.Sequential(nn.Linear(24, 8)), "all-linear", r=2)
    x = torch.randn(3, 100, 24)
    with torch.no_grad(), InputGrams(adapters) as grams, torch.autocast("cpu", torch.bfloat16):
        for part in x:
            adapters.model(part)
    (gram,) = grams.means().values()
    rows = x.flatten(0, 1)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, rows.T @ rows / 300)


def test_inflora_is_its_formula_and_spares_old_inputs(images: Images) -> None:
    kept: list[Method] = []
    settings = {"fusion": "sum", "onto": "fused", "init": "inflora", "target_modules": ["k", "v"], "subspace": 0.8}
    layers = adapted(kept, images, **settings)
    for key, layer in layers.items():
        basis = kept[0].subspaces.bases[key]  # type: ignore[attr-defined]
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-4, rtol=0)
        expected = layer.base_layer.weight.clone()
        for i, name in enumerate(layer.adapter_names):
            (A, _), (A_v, _) = layer.pairs(name)
            torch.testing.assert_close(A @ A.T, torch.eye(4) / 3, atol=1e-4, rtol=0)
            assert torch.equal(A, A_v)
            if i:  # what M held after the first task, its first columns, the later ones are orthogonal to
                assert (A @ basis[:, :1]).abs().max() < 1e-4
            for (start, stop), (A, B) in zip(layer.slices.values(), layer.pairs(name)):
                assert B.abs().max() > 0
                expected[start:stop] += B @ A
        torch.testing.assert_close(layer.weight, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("spoilt", "where"), [(float("nan"), 0), (float("inf"), 0), (1e30, 0), (float("nan"), 1)])
def test_inflora_names_the_layer_whose_inputs_are_not_finite(spoilt: float, where: int, images: Images) -> None:
    """Where a decomposition ended in an error of its own; the squares of 1e30 are no float32 numbers."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    adapters = inject(model, "all-linear", r=2)
    x = torch.randn(5, 6)
    if where == 0:
        x[2, 3] = spoilt
    else:
        model[0].base_layer.bias.data[0] = spoilt
    with torch.no_grad(), InputGrams(adapters) as grams:
        model(x)
    said = f"inputs of the layer {where}{' and of 1 layers more' if where == 0 else ''} are not finite"
    with pytest.raises(FloatingPointError, match=said):
        grams.means()


def test_inflora_on_a_backbone_that_is_not_finite(images: Images) -> None:
    model, *rest = backbone()
    model.blocks[0].norm1.bias.data[0] = torch.nan
    settings = Settings(increment=2, device="cpu", epochs=1, fusion="sum", onto="fused", init="inflora")
    with pytest.raises(FloatingPointError, match="inputs of the layer blocks.0.attn.qkv and of 3 layers more are not"):
        run(settings, data=images, backbone=Backbone(model, *rest))


def test_the_subspace_grows_to_its_share() -> None:
    def gram(*values: float) -> torch.Tensor:
        rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
        return rotation @ torch.diag(torch.tensor(values).float()) @ rotation.T

    spaces = Subspaces()
    spaces.grow({"a": gram(3, 2, 1, 0)}, 0.95)  # squares 9, 4, 1: shares 0.64, 0.93, 1; the authors stop before it
    assert spaces.bases["a"].shape == (4, 2)
    spaces.grow({"a": gram(3, 2, 1, 0)}, 0.92)
    assert spaces.bases["a"].shape == (4, 2)  # 0.93 is enough
    spaces.grow({"a": gram(3, 2, 1, 0.5)}, 0.95)
    assert spaces.bases["a"].shape == (4, 3)
    spaces.grow({"a": gram(1, 1, 1, 1)}, 1.0)
    assert spaces.bases["a"].shape == (4, 4)
    assert [share_after(t, 10, 0.9) for t in (0, 5)] == [0.9, 0.95]


@pytest.mark.parametrize("alignment", ["none", "complement", "shift", "sdc", "ridge", "semantic"])
def test_alignments_act_on_old_prototypes_only(alignment: str, images: Images) -> None:
    made: list[Method] = []

    def make(trainer: Trainer, settings: Settings) -> Method:
        made.append(METHODS["plora"](trainer, settings))
        return made[0]

    result = learn(images, alignment=alignment, make=make)
    assert result.curve[0] == learn(images, alignment="none", epochs=4).curve[0]
    assert made[0].prototypes is not None and made[0].prototypes.shape == (CLASSES, 32)


def test_plora_remembers_more_than_training_on_and_on(images: Images) -> None:
    assert learn(images).curve[-1] > learn(images, method="lora-sequential").curve[-1] + 10


def test_same_settings_same_bits(images: Images) -> None:
    settings = {"augment": True, "lora_dropout": 0.1, "target_modules": ["q", "v"], "epochs": 2}
    kept: list[Method] = []

    def make(trainer: Trainer, s: Settings) -> Method:
        kept.append(METHODS["plora"](trainer, s))
        return kept[-1]

    first, second = learn(images, make=make, **settings), learn(images, make=make, **settings)
    assert first.matrix == second.matrix
    a, b = (method.prototypes for method in kept)
    assert a is not None and b is not None and torch.equal(a, b)


def test_evaluation_keeps_features_only_while_they_hold(images: Images) -> None:
    seen: list[int] = []

    class Counting(METHODS["lora-first"]):  # type: ignore[misc,name-defined]
        def features(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return super().features(images)

    learn(images, method="lora-first", make=Counting)
    assert seen == [40, 20] * 3  # a task's training images, then its own test images: never an old one again


def test_ragged_last_task(images: Images) -> None:
    for method in METHODS:
        result = learn(images, method=method, increment=4, epochs=1)
        assert result.classes_seen == [4, 6]
        figures = result.summary()
        assert figures["last_accuracy"] == result.curve[-1]
        assert figures["average_accuracy"] == pytest.approx(np.mean(result.curve))
        assert (figures["forgetting"] is None) == (method == "joint")


def test_one_task_only(images: Images) -> None:
    result = learn(images, increment=6, epochs=1)
    assert result.summary()["forgetting"] is None


def test_a_loss_that_is_not_finite_names_its_place(images: Images) -> None:
    with pytest.raises(
        FloatingPointError, match=r"the loss is (nan|inf) at task 0, epoch \d, step \d; .*the cause may be lr 1e\+30$"
    ):
        learn(images, optimizer="sgd", lr=1e30)
    with pytest.raises(FloatingPointError, match=r"at task 1, .*the cause may be lr 0\.005 or lr_later 1e\+30$"):
        learn(images, optimizer="sgd", lr_later=1e30)


def test_what_is_not_finite_is_said_and_what_can_be_the_cause(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"at task 0, epoch 0, step 1; not finite: blocks\.0.*lora_A\.task0 and \d+ more tensors; "
    with pytest.raises(FloatingPointError, match=message + "the cause may be lr 0.005 or weight_decay 1e.300$"):
        learn(images, weight_decay=1e300)
    monkeypatch.setattr(Speed, "forward", lambda self, batch, model: model(batch) * float("nan"))
    with pytest.raises(FloatingPointError, match=r"at task 0, epoch 0, step 0;"):
        learn(images)


def test_test_images_without_a_score_count_as_wrong_and_are_said(images: Images) -> None:
    """They were of the first class seen."""

    class Spoilt(METHODS["simplecil"]):  # type: ignore[misc]
        def logits(self, features: Tensor) -> Tensor:
            logits: Tensor = super().logits(features)
            logits[:10, -1] = float("nan")  # the images of the first class
            return logits

    class Notes(Callback):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, line: str) -> None:
            self.lines.append(line)

    notes = Notes()
    result = learn(images, [notes], Spoilt, method="simplecil", class_order="sorted")
    plain = learn(images, method="simplecil", class_order="sorted")
    assert result.matrix[0][0] == plain.matrix[0][0] - 50 and result.matrix[2][1:] == plain.matrix[2][1:]
    assert [line for line in notes.lines if "not finite" in line] == [
        f"10 of {number} test images have features that are not finite, and count as wrong" for number in (20, 40, 60)
    ]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 9.\nat"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_exhausted_memory_of_a_head_names_its_size(
    error: Exception, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(RanPAC, "learn", full)
    with pytest.raises(torch.OutOfMemoryError, match="memory.*; lower projections"):
        learn(images, head="ranpac")
    monkeypatch.setattr(RanPAC, "learn", lambda *_: learn(images, head="unknown"))
    with pytest.raises(ValueError, match="unknown head"):  # other errors pass as they are
        learn(images, head="ranpac")


@pytest.mark.parametrize(("training", "setting"), [(True, "batch_size in a new run"), (False, "eval_batch_size")])
def test_exhausted_memory_names_the_setting(
    training: bool, setting: str, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Speed.forward

    def full(self: Speed, *args) -> torch.Tensor:
        if torch.is_grad_enabled() == training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nand more")
        return forward(self, *args)

    monkeypatch.setattr(Speed, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match=rf"allocate 1 GiB.; lower {setting}, or set amp to bfloat16$"):
        learn(images)


def test_progress_hears_every_step(images: Images) -> None:
    heard: list[tuple] = []

    class Ear(Callback):
        def begin(self, method: str, num_tasks: int) -> None:
            heard.append(("begin", method, num_tasks))

        def fit(self, task: int, images: int) -> None:
            heard.append(("fit", task, images))

        def read(self, images: int) -> None:
            heard.append(("read", images))

        def step(self, images: int) -> None:
            heard.append(("step", images))

        def task(self, task: int, accuracy: float) -> None:
            heard.append(("task", task))

    learn(images, callbacks=[Ear()], epochs=2)
    assert heard[0] == ("begin", "plora", 3)
    epoch = [("step", 14), ("step", 14), ("step", 12)]  # three batches of one size, hardly
    assert heard[1:10] == [("read", 40), ("step", 40), ("fit", 0, 80), *epoch, *epoch]
    assert [event for event in heard if event[0] == "task"] == [("task", 0), ("task", 1), ("task", 2)]


def test_bad_layers_ranks_and_devices(images: Images) -> None:
    with pytest.raises(ValueError, match="r must be an integer in"):
        learn(images, r=64)
    with pytest.raises(ValueError, match="target_modules must match linear layers"):
        learn(images, target_modules=["qvk"])
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        pick_device("gpu")
    wrong = Images(images.train_images, images.train_labels, images.test_images, images.test_labels + 1)
    with pytest.raises(ValueError, match=r"test_labels must lie in 0 \.\.\. 5, got unknown class 6"):
        learn(wrong)
    floats = Images(images.train_images / 255, images.train_labels, images.test_images, images.test_labels)
    with pytest.raises(ValueError, match=r"train_images must be uint8 \[N, H, W, 3\], got float64"):
        learn(floats)


@pytest.mark.cuda
def test_on_cuda(images: Images) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for method in METHODS:
        assert learn(images, method=method, device="cuda").curve[-1] > 100 / CLASSES
