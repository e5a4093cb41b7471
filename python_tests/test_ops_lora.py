"""lora_indexed, lora_sum, lora_all, their in-place forms and lora_merge against their plain-torch twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies
from oracle import check, opcheck
from torch import Tensor

from plora_ext import libraries, ops, reference
from plora_ext.ops import AdapterBatch, compiled, fake, lora, rules

FAMILIES = ("lora_indexed", "lora_sum", "lora_all")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
]
native = pytest.mark.skipif(libraries.backend() != "native", reason="about the compiled operators")


def problem(
    family: str,
    *,
    T: int = 3,
    M: int = 5,
    n_in: int = 16,
    out: int = 24,
    r: int = 4,
    lead: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    grad: bool = True,
    options: str = "",
) -> tuple[list[Any], dict[str, Any], Tensor]:
    """Arguments, keyword arguments, a cotangent; `options` names any of base weight bias bias_A bias_B relu ranks."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(device=device, dtype=dtype).requires_grad_(grad)

    x = draw(*lead, M, n_in)
    wide = torch.promote_types(dtype, torch.float32)
    scaling = (torch.rand(T) + 0.5).to(device, wide).requires_grad_(grad)
    args: list[Any] = [x, draw(T, r, n_in), draw(T, out, r), scaling]
    if family == "lora_indexed":
        args.insert(
            1, torch.randint(-1, max(T, 1), (*lead, M)).to(device) if T else torch.full((*lead, M), -1).to(device)
        )
    kwargs: dict[str, Any] = {}
    for name, shape in (
        ("base", (*lead, M, out)), ("weight", (out, n_in)), ("bias", (out,)), ("bias_A", (T, r)), ("bias_B", (T, out)),
    ):  # fmt: skip
        if name in options.split():
            kwargs[name] = draw(*shape)
    if "relu" in options.split():
        kwargs["activation"] = "relu"
    if "ranks" in options.split():
        kwargs["ranks"] = torch.randint(0, r + 1, (T,)).to(device)
    y_shape = (T, *lead, M, out) if family == "lora_all" else (*lead, M, out)
    return args, kwargs, torch.randn(y_shape).to(device=device, dtype=dtype)


def verify(family: str, args: list[Any], kwargs: dict[str, Any], cotangent: Tensor) -> None:
    check(getattr(ops, family), getattr(reference, family), args, kwargs, cotangent, sums=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    ["", "base", "weight", "weight bias", "base weight bias", "bias_A bias_B relu base", "ranks bias_A bias_B weight",
     "relu ranks weight bias"],
)  # fmt: skip
def test_matches_twin(family: str, dtype: torch.dtype, options: str, device: torch.device) -> None:
    verify(family, *problem(family, dtype=dtype, device=device, options=options))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("T", "M", "n_in", "out", "r"),
    [
        (1, 1, 8, 8, 1), (1, 197, 64, 64, 16), (2, 33, 7, 13, 3), (100, 65, 12, 20, 2), (3, 0, 8, 8, 4),
        (5, 1, 1, 1, 1), (4, 130, 129, 31, 17), (2, 40, 136, 140, 128), (0, 6, 8, 10, 4),
        (3, 64, 96, 288, 33), (1, 2, 300, 5, 5), (3, 9, 24, 16, 0),
    ],
)  # fmt: skip
def test_sizes(family: str, T: int, M: int, n_in: int, out: int, r: int, device: torch.device) -> None:
    for options in ("", "weight bias base"):
        verify(family, *problem(family, T=T, M=M, n_in=n_in, out=out, r=r, device=device, options=options))


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_of_adapters_without_outputs(family: str) -> None:
    args, kwargs, dy = problem(family, n_in=96, out=24, grad=False, options="bias_A bias_B")
    args[0].fill_(torch.nan).requires_grad_()  # kernels keep their working memory
    args[-3].fill_(torch.nan)
    getattr(ops, family)(*args, **kwargs).backward(dy)
    for _ in range(20):
        verify(family, *problem(family, n_in=96, out=0, options="bias_A bias_B"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=strategies.sampled_from(FAMILIES),
    sizes=strategies.tuples(
        *(strategies.integers(low, high) for low, high in ((0, 12), (0, 70), (1, 80), (1, 80), (0, 40)))
    ),
    options=strategies.sets(strategies.sampled_from("base weight bias_A bias_B relu ranks".split())),
    seed=strategies.integers(0, 2**31),
)
@example(family="lora_indexed", sizes=(11, 1, 58, 1, 11), options=set(), seed=11)
def test_any_sizes(family: str, sizes: tuple[int, ...], options: set[str], seed: int) -> None:
    torch.manual_seed(seed)
    T, M, n_in, out, r = sizes
    verify(family, *problem(family, T=T, M=M, n_in=n_in, out=out, r=r, options=" ".join(options)))


@pytest.mark.parametrize("family", FAMILIES)
def test_leading_dimensions_and_ids_by_sample(family: str, device: torch.device) -> None:
    args, kwargs, cotangent = problem(family, lead=(2, 3), M=5, device=device, options="base weight bias")
    if family == "lora_indexed":
        for shape in ((2,), (2, 3), (2, 3, 5)):
            args[1] = torch.randint(-1, 3, shape, device=device)
            verify(family, args, kwargs, cotangent)
        args[1] = AdapterBatch(torch.tensor([2, -1]), 3, device)
        y = ops.lora_indexed(*args, **kwargs)
        args[1] = args[1].ids
        torch.testing.assert_close(y, ops.lora_indexed(*args, **kwargs))
    else:
        verify(family, args, kwargs, cotangent)


def test_what_no_row_picks_does_not_count() -> None:  # on a CPU; a GPU's kernels multiply it by zero
    x, A, B = torch.randn(4, 6), torch.randn(3, 2, 6), torch.randn(3, 5, 2)
    A[0], B[2] = torch.nan, torch.inf
    ids = torch.tensor([1, -1, 1, -1])
    for function in (ops.lora_indexed, reference.lora_indexed):
        asked = x.clone().requires_grad_()
        y = function(asked, ids, A, B)
        torch.testing.assert_close(y, (asked @ A[1].T @ B[1].T) * (ids >= 0)[:, None])
        torch.testing.assert_close(torch.autograd.grad(y.sum(), asked)[0], (B[1].sum(0) @ A[1]) * (ids >= 0)[:, None])


@pytest.mark.parametrize("family", FAMILIES)
def test_segments(family: str, device: torch.device) -> None:
    """Ids all -1, all the same, in sorted segments with some of them empty, and one row each."""
    if family != "lora_indexed":
        pytest.skip("ids belong to lora_indexed")
    for ids in ([-1] * 9, [4] * 9, [0, 0, 0, 2, 2, 2, 2, 5, 5], [3, 1, 4, 1, 5, 0, 2, -1, 3]):
        args, kwargs, cotangent = problem(family, T=6, M=9, device=device, options="weight bias base")
        args[1] = torch.tensor(ids, device=device)
        verify(family, args, kwargs, cotangent)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous(family: str, dtype: torch.dtype, device: torch.device) -> None:
    args, kwargs, cotangent = problem(family, M=7, dtype=dtype, device=device, options="weight base", grad=False)

    def strided(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() < 2:
            return t
        wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)[..., ::2]
        return wide.copy_(t).requires_grad_()

    verify(family, [strided(a) for a in args], {k: strided(v) for k, v in kwargs.items()}, strided(cotangent).detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_gradient(family: str, device: torch.device) -> None:
    args, kwargs, cotangent = problem(family, device=device, options="weight bias base")
    verify(family, args, kwargs, torch.ones((), device=device).expand_as(cotangent))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_asks_gets_a_gradient(family: str, device: torch.device) -> None:
    """Each argument alone, and the factors of one adapter alone."""
    args, kwargs, cotangent = problem(family, device=device, options="base weight bias bias_A bias_B relu", grad=False)
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
        verify(family, args, kwargs, cotangent)
        leaf.requires_grad_(False)
    for leaf in leaves:
        leaf.requires_grad_()
    for trainable in ([], [1], [0, 2]):
        verify(family, args, {**kwargs, "trainable": trainable}, cotangent)


def test_sum_coefficients(device: torch.device) -> None:
    args, kwargs, cotangent = problem("lora_sum", device=device)
    verify("lora_sum", args, {**kwargs, "coeff": torch.rand(3, device=device).requires_grad_()}, cotangent)
    y = ops.lora_sum(*args, coeff=torch.tensor([1.0, 0.0, 0.0], device=device))
    torch.testing.assert_close(y, ops.lora_sum(args[0], *(a[:1] for a in args[1:])))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place(family: str, dtype: torch.dtype, device: torch.device) -> None:
    """Also into a slice of a wider y, whose other columns stay as they were."""
    args, kwargs, y0 = problem(family, lead=(2,), dtype=dtype, device=device, options="bias_A bias_B relu", grad=False)
    wide = torch.randn(*y0.shape[:-1], 3 * y0.shape[-1], device=device).to(dtype)
    before, target = wide.clone(), wide[..., 24:48]
    returned = getattr(ops, family + "_")(target, *args, **kwargs)
    assert returned is target
    if family == "lora_all":
        expected = before[..., 24:48].double() + getattr(reference, family)(*args, **kwargs).double()
    else:
        expected = getattr(reference, family)(*args, base=before[..., 24:48], **kwargs).double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(target.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(wide[..., :24], before[..., :24]) and torch.equal(wide[..., 48:], before[..., 48:])


@pytest.mark.parametrize("family", FAMILIES)
def test_in_place_keeps_gradients(family: str, device: torch.device) -> None:
    args, kwargs, cotangent = problem(family, device=device)
    start = torch.randn_like(cotangent).requires_grad_()

    def added(start: Tensor, *args: Any) -> Tensor:
        return getattr(ops, family + "_")(start.clone(), *args)

    check(added, lambda start, *args: start + getattr(reference, family)(*args), [start, *args], kwargs, cotangent)


@native
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", ["", "base weight bias bias_A bias_B relu ranks"])
def test_gradcheck(family: str, options: str) -> None:
    args, kwargs, _ = problem(family, T=2, M=4, n_in=5, out=6, r=3, dtype=torch.float64, options=options)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]

    def function(*values: Tensor) -> Tensor:
        new = iter(values)
        swap = lambda v: next(new) if isinstance(v, Tensor) and v.requires_grad else v  # noqa: E731
        return getattr(ops, family)(*[swap(a) for a in args], **{k: swap(v) for k, v in kwargs.items()})

    assert torch.autograd.gradcheck(function, tensors)


def native_args(family: str, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments as the compiled operator takes them, by position."""
    names = ("base", "weight", "bias", "bias_A", "bias_B", "ranks")
    relu, trainable, slices = kwargs.get("activation") == "relu", kwargs.get("trainable"), kwargs.get("slices")
    return [*args, *(kwargs.get(n) for n in names), relu, trainable, slices, kwargs.get("keep", True)]


@native
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", ["", "base weight bias bias_A bias_B relu ranks"])
def test_opcheck(family: str, options: str) -> None:
    args, kwargs, cotangent = problem(family, options=options)
    op = getattr(torch.ops.plora_ext, family).default
    opcheck(op, native_args(family, args, kwargs))
    opcheck(op, native_args(family, args, {**kwargs, "trainable": [1], "slices": [0, 8, 16, 24], "keep": False}))
    with torch.no_grad():
        detached = [a.detach() if isinstance(a, Tensor) else a for a in native_args(family, args, kwargs)]
        i = 5 if family == "lora_indexed" else 4
        factors, (_, weight, _, bias_A, bias_B, ranks, relu, *_) = detached[:i], detached[i:]
        in_place = getattr(torch.ops.plora_ext, family + "_").default
        opcheck(in_place, [cotangent, *factors, bias_A, bias_B, ranks, relu])
        backward = getattr(torch.ops.plora_ext, family + "_backward").default
        opcheck(backward, [cotangent, *factors, weight, bias_A, bias_B, ranks, None, relu, None, 0b001011])


@native
@pytest.mark.parametrize("options", ["", "weight bias", "base weight bias bias_A bias_B relu ranks"])
@pytest.mark.parametrize("r", [4, 24])
def test_weighted_scales(options: str, r: int, device: torch.device) -> None:
    """`lora_weighted` is `lora_sum` of the products; the scales that are not constant get gradients."""
    (x, A, B, s), kwargs, cotangent = problem("lora_sum", r=r, device=device, options=options)
    weights = torch.rand_like(s) + 0.5
    leaves = [x, A, B, weights.requires_grad_()]
    y = ops.lora_sum(x, A, B, s.detach(), coeff=weights, **kwargs)
    assert y.grad_fn is not None and y.grad_fn.name() == "LowRankBackward"
    expected = ops.lora_sum(x, A, B, s.detach() * weights, **kwargs)
    found, wanted = (torch.autograd.grad(t, leaves, cotangent, retain_graph=True) for t in (y, expected))
    for a, b in zip((y, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    again, wanted = (torch.autograd.grad(t, weights, cotangent, create_graph=True)[0] for t in (y, expected))
    torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)
    if options != "base weight bias bias_A bias_B relu ranks":
        second, expected = (torch.autograd.grad(t.square().sum(), [x, A]) for t in (again, wanted))
        torch.testing.assert_close(second, expected, rtol=1e-3, atol=1e-3)


@native
def test_errors_of_weighted_scales_name_what_was_called() -> None:
    (x, A, B, s), kwargs, _ = problem("lora_sum", options="weight", grad=False)
    with pytest.raises(RuntimeError, match=r"^lora_sum: ranks\[0\] must be between 0 and"):
        ops.lora_sum(x, A, B, s, coeff=torch.ones_like(s), ranks=torch.full_like(s, 99, dtype=torch.int64), **kwargs)


@native
def test_weighted_scales_are_watched() -> None:
    (x, A, B, s), kwargs, cotangent = problem("lora_sum", options="weight", grad=False)
    y = ops.lora_sum(x, A, B, s, coeff=torch.rand_like(s).requires_grad_(), **kwargs)
    s.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(cotangent)


@native
@pytest.mark.parametrize("options", ["", "base weight bias bias_A bias_B relu ranks"])
def test_opcheck_of_weighted_scales(options: str) -> None:
    args, kwargs, cotangent = problem("lora_sum", options=options, grad=False)
    given, times = native_args("lora_sum", args, kwargs), torch.rand_like(args[-1])
    opcheck(torch.ops.plora_ext.lora_weighted.default, [*given, times])
    factors, (_, weight, _, bias_A, bias_B, ranks, relu, *_) = given[:4], given[4:]
    backward = torch.ops.plora_ext.lora_weighted_backward.default
    opcheck(backward, [cotangent, *factors, weight, bias_A, bias_B, ranks, None, relu, None, 0b001011, times])
    for wrong, expected in (
        (times[1:], r"times must have the shape \[3\], got \[2\]"),
        (times.double(), "times must be Float"),
    ):
        with pytest.raises(RuntimeError, match=f"lora_sum: {expected}"):
            torch.ops.plora_ext.lora_weighted(*given, wrong)


@native
@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
@pytest.mark.parametrize("needs", [0, 5, 7])
def test_opcheck_of_one_adapter(lead: tuple[int, ...], needs: int) -> None:
    (x, A, B, s), named, grad = problem("lora_sum", T=1, lead=lead, options="weight bias", grad=False)
    args = [x, A[0], B[0], s, named["weight"]]
    opcheck(torch.ops.plora_ext.lora_one.default, [*args, named["bias"], True])
    opcheck(torch.ops.plora_ext.lora_one_backward.default, [grad, *args, None, needs])


@native
def test_one_adapter_refuses_what_does_not_fit() -> None:
    (x, A, B, s), named, grad = problem("lora_sum", T=1, options="weight", grad=False)
    one, backward, W = torch.ops.plora_ext.lora_one, torch.ops.plora_ext.lora_one_backward, named["weight"]
    for args, expected in (
        ((x[0, 0], A[0], B[0], s, W), r"x must be \[\.\.\., n\], got \[\]"),
        ((x, A, B[0], s, W), r"lora_A must be \[r, in\], got \[1, 4, 16\]"),
        ((x, A[0], B, s, W), r"lora_B must be \[out, r\], got \[1, 24, 4\]"),
        ((x, A[0], B[0][:, :3], s, W), r"lora_B must have the shape \[24, 4\], got \[24, 3\]"),
        ((x, A[0], B[0], s[0], W), r"scaling must have the shape \[1\], got \[\]"),
        ((x, A[0].double(), B[0], s, W), "lora_A must be Float, got Double"),
    ):
        with pytest.raises(RuntimeError, match=f"lora_sum: {expected}"):
            one(*args, None, False)
    for wrong in (grad[:, 1:], grad[1:], grad[None, :3]):
        with pytest.raises(RuntimeError, match="lora_sum_backward: grad must have the shape"):
            backward(wrong, x, A[0], B[0], s, W, None, 7)


@native
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("options", ["", "base weight bias bias_A bias_B relu ranks"])
def test_eager_shortcut_agrees_with_the_registered_path(
    family: str, options: str, autocast: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, forward and backward, whatever asks for gradients."""
    args, kwargs, cotangent = problem(family, device=device, options=options, grad=False)
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]

    def bits(asking: list[Tensor], shortcut: bool) -> list[Tensor]:
        for leaf in leaves:
            leaf.requires_grad_(any(leaf is a for a in asking))
        with monkeypatch.context() as patch, torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            if not shortcut:
                patch.setattr(lora, "is_eager", lambda: False)
            y = getattr(ops, family)(*args, **kwargs)
        if not asking:
            return [y]
        assert ("Generated" in y.grad_fn.name()) != shortcut
        return [y, *torch.autograd.grad(y, asking, cotangent.to(y.dtype))]

    for asking in ([], leaves, *([leaf] for leaf in leaves)):
        pairs = zip(bits(asking, True), bits(asking, False), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@native
@pytest.mark.parametrize("family", FAMILIES)
def test_keeps_what_a_gradient_needs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    operator = compiled.eager_op[family]

    def spy(*args: Any) -> Any:
        asked.append(args[-1])
        return operator(*args)

    monkeypatch.setitem(compiled.eager_op, family, spy)

    def keeps(options: str, asking: str, r: int = 4) -> bool:
        args, kwargs, _ = problem(family, r=r, options=options, grad=False)
        x, lora_A, lora_B, scaling = (a for a in args if a.is_floating_point())
        named = {"x": x, "lora_A": lora_A, "lora_B": lora_B, "scaling": scaling, **kwargs}
        for name in asking.split():
            named[name].requires_grad_()
        getattr(ops, family)(*args, **kwargs)
        return asked.pop()

    assert keeps("", "lora_B") and keeps("", "scaling") and keeps("weight bias bias_A", "lora_B x")
    assert not keeps("", "") and not keeps("weight bias base", "x lora_A weight bias base")
    for name in ("x", "lora_A", "bias_A"):
        assert keeps("bias_A relu", name) and not keeps("bias_A", name)
    assert not keeps("bias_B relu base", "bias_B base")
    assert keeps("weight", "x", r=65) == (family == "lora_sum")  # the merged weight, which serves dx alone
    assert keeps("weight", "lora_B", r=65) != (family == "lora_sum")
    with torch.no_grad():
        assert not keeps("", "x lora_A lora_B scaling")


@native
def test_dense_rule_is_that_of_the_kernels() -> None:
    import plora_ext._C as _C

    for family in FAMILIES:
        for T, r in ((1, 16), (4, 16), (5, 16), (1, 192), (1, 193), (0, 8), (65, 1)):
            for options in ("", "weight", "weight relu", "weight bias_A", "weight bias_B", "weight bias base ranks"):
                _, kwargs, _ = problem(family, T=T, r=r, M=1, n_in=1, out=1, options=options, grad=False)
                weight, bias_A, bias_B = (kwargs.get(name) for name in ("weight", "bias_A", "bias_B"))
                relu, bias = "relu" in options, bias_A is not None or bias_B is not None
                plan = _C.lora_plan(
                    family.removeprefix("lora_"), 1, 1, 1, T, r, weight=weight is not None, relu=relu, bias=bias
                )
                linear = rules.is_linear(weight, bias_A, bias_B, relu)
                assert rules.dense(family, T, r, linear) == plan["dense"], (T, r, options)


@native
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_what_cuda_keeps(family: str) -> None:
    """Rank 5 has 8 columns; the sum of many ranks keeps the merged weight."""
    shapes = fake.lora(family)
    for r, options, expected in (
        (5, "weight bias", [7, 8 if family == "lora_indexed" else 24]),
        (80, "weight", [24, 16] if family == "lora_sum" else [7, 80 if family == "lora_indexed" else 240]),
        (80, "weight relu", [7, 80 if family == "lora_indexed" else 240]),
    ):
        for device, shape in (("meta", expected), ("cpu", [0])):
            args, kwargs, y = problem(family, M=7, r=r, options=options, device=device)
            for keep in (True, False):
                result, kept = shapes(*native_args(family, args, {**kwargs, "keep": keep}))
                assert result.shape == y.shape and kept.dtype == args[0].dtype
                assert list(kept.shape) == (shape if keep else [0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_change_nothing(family: str, dtype: torch.dtype, device: torch.device) -> None:
    for slices in ([(0, 8), (16, 24)], [(0, 24)], [(3, 7), (5, 6), (0, 1), (23, 24)]):
        args, kwargs, cotangent = problem(family, M=33, r=8, dtype=dtype, device=device, options="weight bias")
        for lora_B in args[-2].detach():
            for i, block in enumerate(lora_B.chunk(len(slices), dim=1)):
                block[: slices[i][0]] = block[slices[i][1] :] = 0
        verify(family, args, {**kwargs, "slices": slices}, cotangent)


@pytest.mark.parametrize("family", FAMILIES)
def test_compile_fullgraph(family: str, device: torch.device) -> None:
    args, kwargs, cotangent = problem(family, lead=(2,), device=device, options="weight bias base")
    compiled = torch.compile(getattr(ops, family), fullgraph=True)
    check(compiled, getattr(reference, family), args, kwargs, cotangent)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_jit_trace(family: str) -> None:  # which traces once with gradients recorded, and once without
    args, _, _ = problem(family, grad=False)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A, self.lora_B = torch.nn.Parameter(args[-3]), torch.nn.Parameter(args[-2])

        def forward(self, *front: Tensor) -> Tensor:
            y: Tensor = getattr(ops, family)(*front, self.lora_A, self.lora_B, args[-1])
            return y

    front, layer = args[:-3], Layer()
    traced = torch.jit.trace(layer, tuple(front))
    torch.testing.assert_close(traced(2 * front[0], *front[1:]), layer(2 * front[0], *front[1:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str, device: torch.device) -> None:
    """float32 arguments give a bfloat16 y, with float32 gradients, close to the float32 result."""
    args, kwargs, _ = problem(family, device=device, options="weight bias base")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = getattr(ops, family)(*args, **kwargs)
    assert y.dtype == torch.bfloat16
    exact = getattr(reference, family)(*args, **kwargs)
    assert (y - exact).norm() < 0.02 * exact.norm()
    y.float().sum().backward()
    assert args[0].grad.dtype == torch.float32 and args[-1].grad.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_vmap(family: str, device: torch.device) -> None:
    """Over x alone (folded into the rows), over x and A, and over cotangents."""
    args, kwargs, _ = problem(family, device=device, options="weight bias", grad=False)
    function, n = getattr(ops, family), 4
    xs = torch.randn(n, *args[0].shape, device=device)
    mapped = torch.vmap(lambda x: function(x, *args[1:], **kwargs))(xs)
    torch.testing.assert_close(mapped, torch.stack([function(x, *args[1:], **kwargs) for x in xs]))

    As = torch.randn(n, *args[-3].shape, device=device)
    mapped = torch.vmap(lambda x, A: function(x, *args[1:-3], A, *args[-2:], **kwargs))(xs, As)
    single = [function(x, *args[1:-3], A, *args[-2:], **kwargs) for x, A in zip(xs, As, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(single))

    # a vectorised Jacobian maps the backward operator
    args[-2].requires_grad_()
    y = function(*args, **kwargs)
    cotangents = torch.randn(n, *y.shape, device=device)
    (jacobian,) = torch.autograd.grad(y, args[-2], cotangents, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, args[-2], g, retain_graph=True)[0] for g in cotangents]
    torch.testing.assert_close(jacobian, torch.stack(single), rtol=1e-4, atol=1e-4)


@native
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_for_any_number_of_threads(family: str) -> None:
    args, kwargs, cotangent = problem(family, M=150, T=4, options="weight bias bias_A bias_B")

    def bits() -> list[Tensor]:
        leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
        y = getattr(ops, family)(*args, **kwargs)
        # without the frozen layer's own products: those are torch's
        low = getattr(ops, family)(*args, bias_A=kwargs["bias_A"], bias_B=kwargs["bias_B"])
        return [low, *torch.autograd.grad(y, leaves, cotangent)[1:5]]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = bits()
        torch.set_num_threads(2)
        two = bits()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "r", "out", "n_in"),
    [(1, 1, 8, 8), (3, 4, 24, 16), (10, 16, 70, 130), (2, 128, 65, 33), (0, 4, 8, 8), (3, 0, 16, 24)],
)
def test_merge(dtype: torch.dtype, T: int, r: int, out: int, n_in: int, device: torch.device) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(device=device, dtype=dtype).requires_grad_()

    scaling = torch.rand(T).to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
    args = [draw(out, n_in), draw(T, r, n_in), draw(T, out, r), scaling]
    cotangent = torch.randn(out, n_in).to(device=device, dtype=dtype)
    for kwargs in (
        {},
        {"ranks": torch.randint(0, r + 1, (T,)).to(device)},
        {"coeff": torch.rand(T).to(scaling).requires_grad_()},
    ):
        check(ops.lora_merge, reference.lora_merge, args, kwargs, cotangent)


def test_merged_weight_is_the_sum(device: torch.device) -> None:
    (x, A, B, s), kwargs, _ = problem("lora_sum", dtype=torch.float64, device=device, options="weight bias", grad=False)
    merged = ops.lora_merge(kwargs["weight"], A, B, s)
    y = torch.nn.functional.linear(x, merged, kwargs["bias"])
    torch.testing.assert_close(y, ops.lora_sum(x, A, B, s, **kwargs))


def test_merge_gradcheck_opcheck_compile_vmap(device: torch.device) -> None:
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, device=device).requires_grad_()  # noqa: E731
    args = [draw(6, 5), draw(2, 3, 5), draw(2, 6, 3), draw(2)]
    assert torch.autograd.gradcheck(ops.lora_merge, args)
    if libraries.has_kernel("lora_merge", device.type):
        opcheck(torch.ops.plora_ext.lora_merge.default, [*args, None])
        opcheck(torch.ops.plora_ext.lora_merge.default, [*args, torch.tensor([1, 3], device=device)])
    check(
        torch.compile(ops.lora_merge, fullgraph=True), reference.lora_merge, args, {}, torch.randn(6, 5, device=device)
    )
    weights = torch.randn(4, 6, 5, dtype=torch.float64, device=device)
    mapped = torch.vmap(lambda w: ops.lora_merge(w, *args[1:]))(weights)
    torch.testing.assert_close(mapped, torch.stack([ops.lora_merge(w, *args[1:]) for w in weights]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_merge_under_a_graph_and_on_another_stream() -> None:
    (_, A, B, s), kwargs, _ = problem(
        "lora_sum", T=10, r=16, n_in=768, out=768, device="cuda", options="weight", grad=False
    )
    expected = ops.lora_merge(kwargs["weight"], A, B, s)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = ops.lora_merge(kwargs["weight"], A, B, s)
    torch.cuda.synchronize()
    assert torch.equal(other, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.lora_merge(kwargs["weight"], A, B, s)
    captured.fill_(float("nan"))
    A.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, ops.lora_merge(kwargs["weight"], A, B, s))


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_input(family: str) -> None:
    args, kwargs, _ = problem(family, grad=False, options="weight bias")
    function = getattr(ops, family)

    def call(**changes: Any) -> Tensor:
        names = (
            ["x", "ids", "lora_A", "lora_B", "scaling"]
            if family == "lora_indexed"
            else ["x", "lora_A", "lora_B", "scaling"]
        )
        values = {**dict(zip(names, args, strict=True)), **kwargs, **changes}
        return function(**values)

    with pytest.raises(ValueError, match=rf"{family}: lora_A must have the shape \[3, 4, 16\], got \[3, 4, 17\]"):
        call(lora_A=torch.randn(3, 4, 17))
    with pytest.raises(ValueError, match=rf"{family}: lora_B must have the shape \[3, 24, 4\], got \[2, 24, 4\]"):
        call(lora_B=torch.randn(2, 24, 4))
    with pytest.raises(TypeError, match=rf"{family}: lora_A must be torch.float32.*got torch.bfloat16"):
        call(lora_A=args[-3].bfloat16())
    with pytest.raises(ValueError, match=f"{family}: base must have the shape"):
        call(base=torch.randn(5, 23))
    with pytest.raises(ValueError, match="bias belongs to the frozen layer"):
        call(weight=None)
    with pytest.raises(ValueError, match="activation must be one of"):
        call(activation="gelu")
    with pytest.raises(ValueError, match="must be on cpu.*got meta"):
        call(scaling=torch.ones(3, device="meta"))
    with pytest.raises(IndexError, match="trainable must hold adapters between 0 and 2"):
        call(trainable=[3])
    for slices, said in (
        ([(0, 8)] * 3, "slices must be as many as divide the rank 4 into equal blocks, got 3"),
        ([], "slices must be as many as divide the rank 4 into equal blocks, got 0"),
        ([(0, 8), (16, 25)], r"slices must be rows within \[0, 24\), got \(16, 25\)"),
    ):
        with pytest.raises(ValueError, match=f"{family}: {said}"):
            call(slices=slices)
    with pytest.raises(TypeError, match="x must be floating point"):
        call(x=torch.ones(5, 16, dtype=torch.int64))
    for name in ("x", "lora_A", "lora_B", "scaling", "weight", "bias", "ranks", *["ids"] * (family == "lora_indexed")):
        for kind, other in (("float", 0.5), ("list", [1, 1, 1]), ("ndarray", np.ones(3))):
            with pytest.raises(TypeError, match=f"{family}: {name} must be a torch.Tensor, got {kind}"):
                call(**{name: other})
    with pytest.raises(TypeError, match=f"{family}: scaling must be real, got torch.complex64"):
        call(scaling=torch.ones(3, dtype=torch.complex64))
    if family == "lora_indexed":
        with pytest.raises(TypeError, match="ids must be a torch.Tensor, got NoneType"):
            call(ids=None)
        with pytest.raises(ValueError, match="ids must have the shape of the first dimensions of x"):
            call(ids=torch.zeros(4, dtype=torch.int64))
        with pytest.raises(TypeError, match="ids must be integers"):
            call(ids=torch.zeros(5))
        if libraries.backend() == "native":
            for bad in (3, -2):
                with pytest.raises((RuntimeError, IndexError), match=f"ids must be between -1 and 2, got {bad}"):
                    call(ids=torch.tensor([0, 1, bad, 0, 0]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("in_place", [False, True])
def test_trainable_is_numbers_however_they_come(family: str, in_place: bool) -> None:
    """Of an iterator nothing was left for the gradients, and a mask trained adapters 0 and 1."""
    args, _, _ = problem(family)
    function = getattr(ops, f"{family}_" if in_place else family)

    def run(trainable: Any) -> list[Tensor | None]:
        leaves = [a.detach().requires_grad_() for a in args[-3:-1]]
        x, ids = args[0], [torch.tensor([0, 1, 1, 2, -1])] * (family == "lora_indexed")
        shape = (3, 5, 24) if family == "lora_all" else (5, 24)
        front = (torch.zeros(shape), x.detach(), *ids) if in_place else (x.detach(), *ids)
        function(*front, *leaves, trainable=trainable).sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = run([1])
    assert all(grad is not None and grad[1].any() and not grad[0].any() for grad in expected)
    for numbers in (iter([1]), torch.tensor([1]), np.array([1]), range(1, 2)):
        assert all(map(torch.equal, run(numbers), expected))
    for bad in ([False, True, False], torch.tensor([False, True, False]), np.array([False, True]), [0.5], ["1"], 1):
        with pytest.raises(TypeError, match="trainable must hold the numbers of adapters, got"):
            run(bad)


def test_what_ranks_and_batches_must_be() -> None:
    (x, ids, A, B, s), _, _ = problem("lora_indexed", grad=False)
    weight = torch.zeros(B.shape[1], A.shape[2])
    for ranks in (torch.tensor([1.7, 1, 1]), torch.tensor([True, True, False])):
        with pytest.raises(TypeError, match="ranks must be integers"):
            ops.lora_sum(x, A, B, s, ranks=ranks)
        with pytest.raises(TypeError, match="ranks must be integers"):
            ops.lora_merge(weight, A, B, s, ranks=ranks)
    for bad in (-1, 5):
        with pytest.raises(RuntimeError, match=rf"lora_merge: ranks(\[1\])? must be between 0 and 4, got {bad}"):
            ops.lora_merge(weight, A, B, s, ranks=torch.tensor([1, bad, 1]))
    with pytest.raises(TypeError, match="lora_merge: weight must be floating point, got torch.int64"):
        ops.lora_merge(weight.long(), A, B, s)
    with pytest.raises(IndexError, match="ids were checked for 5 adapters, lora_A holds 3"):
        ops.lora_indexed(x, AdapterBatch(ids, 5), A, B, s)
    two = AdapterBatch(ids.clamp(max=1), 2)  # more adapters may come
    torch.testing.assert_close(ops.lora_indexed(x, two, A, B, s), ops.lora_indexed(x, two.ids, A, B, s))


@pytest.mark.parametrize(("lead", "M"), [((40, 15), 1), ((600,), 1), ((600,), 3)])
def test_samples_in_any_order(
    lead: tuple[int, ...], M: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU kernels get many samples of many adapters sorted; a CPU's are made to."""
    if device.type == "cpu":
        monkeypatch.setattr(AdapterBatch, "_pays", lambda batch, x, lora_A: True)
    args, kwargs, cotangent = problem("lora_indexed", lead=lead, M=M, T=30, r=16, device=device, options="weight bias")
    args[1] = torch.randint(-1, 30, lead, device=device)
    batch, seen, run = AdapterBatch(args[1].clone(), 30), [], lora._run

    def spy(op: str, x: Tensor, ids: Any, *rest: Any) -> Tensor:
        seen.append(getattr(ids, "ids", ids))
        return run(op, x, ids, *rest)

    monkeypatch.setattr(lora, "_run", spy)

    def outputs(ids: Tensor | AdapterBatch) -> list[Tensor]:
        y = ops.lora_indexed(args[0], ids, *args[2:], **kwargs)
        asked = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
        return [y, *torch.autograd.grad(y, asked, cotangent)]

    for got, expected in zip(outputs(batch), outputs(args[1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen[0], args[1].flatten().sort().values)
    with pytest.raises(ValueError, match="ids must have the shape of the first dimensions of x"):
        ops.lora_indexed(args[0][:-1], batch, *args[2:], **kwargs)
    with pytest.raises(TypeError, match="lora_A must be a torch.Tensor, got NoneType"):
        ops.lora_indexed(args[0], batch, None, *args[3:], **kwargs)
    with torch.inference_mode():
        unrecorded = ops.lora_indexed(args[0], AdapterBatch(args[1], 30), *args[2:], **kwargs)
    torch.testing.assert_close(unrecorded, outputs(batch)[0])
    batch.ids.fill_(0)
    with pytest.raises(RuntimeError, match="ids of an AdapterBatch were written to after it was made"):
        ops.lora_indexed(args[0], batch, *args[2:], **kwargs)
    with pytest.raises(RuntimeError, match="ids of an AdapterBatch were written to after it was made"):
        ops.lora_indexed(args[0], batch.to(device), *args[2:], **kwargs)  # as Adapters.batch does
    with pytest.raises(RuntimeError, match="ids of an AdapterBatch were written to after it was made"):
        batch.to("meta")


def test_when_samples_are_sorted() -> None:
    pays = rules.sorting_pays
    assert not pays(10, 1, 16) and not pays(16, 1, 16) and pays(17, 1, 16), "adapters that 128 rows meet"
    assert pays(64, 4, 16) and not pays(64, 16, 16) and pays(64, 16, 64) and not pays(64, 197, 64), "rows of a sample"
    assert not pays(4, 1, 64) and pays(5, 1, 64) and pays(2, 1, 272) and pays(20, 0, 8), "ranks"
    descending = list(range(600, 0, -1))
    assert AdapterBatch(descending[:512], 601)._sorted is None, "few samples are not sorted"
    assert AdapterBatch(sorted(descending), 601)._sorted is None, "nor what is"
    batch, samples, places = AdapterBatch(descending, 601).to("cpu")._sorted or pytest.fail()
    assert batch.ids.tolist() == sorted(descending) and batch._sorted is None
    assert samples.tolist() == places.tolist() == list(range(599, -1, -1))


def test_adapter_batch() -> None:
    batch = AdapterBatch([0, 2, -1], 3)
    assert batch.ids.tolist() == [0, 2, -1] and batch.to("cpu").num_adapters == 3
    assert AdapterBatch([], 0).ids.numel() == 0
    with pytest.raises(IndexError, match=r"between -1 \(base only\) and 2, got 3"):
        AdapterBatch(torch.tensor([0, 3]), 3)
    with pytest.raises(IndexError, match="got -2"):
        AdapterBatch([-2], 3)
    with pytest.raises(TypeError, match="ids must be integers, got torch.float32"):
        AdapterBatch([0.5], 3)
    with pytest.raises(TypeError, match=r"ids must be integers, got \['a'\]"):
        AdapterBatch(["a"], 3)  # type: ignore[list-item]
