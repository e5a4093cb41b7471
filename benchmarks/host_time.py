"""Host time of adapted layers: forwards and steps so small that launching them is what takes the time.

    python benchmarks/host_time.py [--device cuda] [--rows M ...] [--adapters T ...] [--seconds S] [--no-compile]
                                   [--out FOLDER/NAME]

Wall time of a forward and of a step (forward, then the gradients of x, A and B), of calls in a row up to the end of the
last: on a CPU with one thread and next to no arithmetic, on a GPU at 768→768, bfloat16, r = 16. Short bursts of every
form take turns; ratios are medians over turns, p10 is the tenth percentile, which others on the machine disturb least.
`empty autograd.Function` computes nothing: what autograd itself costs a backward in Python.

Then, on a CPU, the forward of 24 layers 8→8 on one row without gradients, with T adapters of r = 4 active in each, by
the process's own clock: as ever, and inside of `Adapters.merged`. Writes NAME.csv and NAME.md.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import now
from lora_forms import SCALE, peft_model
from torch import Tensor, nn

from plora_ext.bench import OURS, fault, in_turn
from plora_ext.nn import MultiLoRALinear, inject

BURST = 0.002  # seconds
FROZEN, EMPTY, PEFT = "frozen layer", "empty autograd.Function", "PEFT"
COLUMNS = ("case", "form", "forward_us", "step_us", "forward_p10_us", "backward_p10_us", "step_p10_us", "over_frozen",
           "over_ours", "note")  # fmt: skip
Form = tuple[Callable[[Tensor], Tensor], list[Tensor]]  # a forward, and what gets gradients beside x


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def forms(x: Tensor, width: int, r: int, compiled: bool) -> tuple[dict[str, Form], dict[str, str]]:
    """What is measured, and why the rest is not."""
    like = {"device": x.device, "dtype": x.dtype}
    linear = nn.Linear(width, width, **like).requires_grad_(False)
    A, B = torch.randn(r, width, **like) * width**-0.5, torch.randn(width, r, **like) * r**-0.5
    plain_A, plain_B = A.clone().requires_grad_(), B.clone().requires_grad_()

    def plain(x: Tensor) -> Tensor:
        return F.linear(x, linear.weight, linear.bias) + SCALE * F.linear(F.linear(x, plain_A), plain_B)

    def peft() -> Form:
        model = peft_model(nn.Sequential(copy.deepcopy(linear)), "0", {"0": (A[None], B[None])})
        layer: Any = model.get_base_model()[0]
        return layer, [layer.lora_A["t0"].weight, layer.lora_B["t0"].weight]

    def ours(wrap: Callable[[nn.Module], Any] = lambda layer: layer) -> Form:
        layer = MultiLoRALinear(copy.deepcopy(linear), autocast_adapter_dtype=False)  # as `peft_model` has them
        layer.add_adapter("t0", [(A, B)], lora_alpha=SCALE * r)
        layer.set_adapter(["t0"])
        factors: list[Tensor] = [p.requires_grad_() for p in layer.pairs("t0")[0]]
        return wrap(layer), factors

    def graphed(layer: nn.Module) -> Any:
        return torch.cuda.make_graphed_callables(layer, (x.detach().clone().requires_grad_(),))

    makers: dict[str, Callable[[], Form]] = {
        FROZEN: lambda: (linear, []),
        EMPTY: lambda: (lambda x: Empty.apply(x, plain_A, plain_B), [plain_A, plain_B]),
        "plain torch": lambda: (plain, [plain_A, plain_B]),
        PEFT: peft,
        OURS: ours,
    }
    if compiled:
        makers[f"{OURS}, torch.compile"] = lambda: ours(partial(torch.compile, fullgraph=True, dynamic=False))
    if x.is_cuda:
        makers[f"{OURS}, make_graphed_callables"] = lambda: ours(graphed)
    found: dict[str, Form] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            forward, leaves = make()
            actual = forward(x)
            if name not in (FROZEN, EMPTY):
                torch.testing.assert_close(actual, plain(x), rtol=0.05, atol=0.05)
            found[name] = forward, leaves
        except Exception as error:
            missing[name] = fault(error, name)
    return found, missing


def measure(case: str, x: Tensor, width: int, r: int, compiled: bool, seconds: float) -> list[dict[str, Any]]:
    grad = torch.randn_like(x)
    chosen, missing = forms(x, width, r, compiled)

    def step(form: Form) -> None:
        torch.autograd.grad(form[0](x), [x, *form[1]], grad)

    def forward(form: Form) -> None:
        form[0](x)

    def burst(call: Callable[[Form], None], form: Form, count: int) -> float:
        start = now(x.device)
        for _ in range(count):
            call(form)
        return 1e6 * (now(x.device) - start) / count

    runs = [(call, name) for name in chosen for call in (forward, step)]
    counts = {}
    for call, name in runs:
        burst(call, chosen[name], 20)
        counts[call, name] = max(5, int(1e6 * BURST / burst(call, chosen[name], 20)))
    gc.collect()
    turns = {(call, name): partial(burst, call, chosen[name], counts[call, name]) for call, name in runs}
    times = in_turn(turns, 3, seconds, most=10**6)

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[step, name], times[step, other], strict=True))

    lines: list[dict[str, Any]] = []
    for name in chosen:
        forwards, steps = times[forward, name], times[step, name]
        quiet = [statistics.quantiles(ts, n=10)[0] for ts in (forwards, steps)]
        lines.append({
            "case": case, "form": name, "forward_us": statistics.median(forwards), "step_us": statistics.median(steps),
            "forward_p10_us": quiet[0], "backward_p10_us": quiet[1] - quiet[0], "step_p10_us": quiet[1],
            "over_frozen": ratio(name, FROZEN), "over_ours": ratio(name, OURS), "note": f"{len(steps)} turns",
        })  # fmt: skip
    return lines + [{"case": case, "form": name, "note": note} for name, note in missing.items()]


def measure_sets(T: int, seconds: float) -> list[dict[str, Any]]:
    """A forward of 24 layers with T active adapters, without gradients."""
    model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(24)]).eval(), torch.randn(1, 8)
    plain = copy.deepcopy(model)
    adapters = inject(model, [str(i) for i in range(24)], r=4)
    for t in range(T):
        adapters.add_adapter(f"t{t}")
    adapters.set_adapter(adapters.names)

    def burst(module: nn.Module, count: int = 20) -> float:
        module(x)  # what it leaves behind is no longer that of another form
        start = time.process_time()
        for _ in range(count):
            module(x)
        return 1e6 * (time.process_time() - start) / count

    def merged() -> float:
        with adapters.merged():
            return burst(model)

    with torch.no_grad():
        calls = {FROZEN + "s": partial(burst, plain), OURS: partial(burst, model), f"{OURS}, merged": merged}
        times = in_turn(calls, 5, seconds)
    return [
        {
            "case": f"24 layers, T={T}, no_grad", "form": name, "forward_us": statistics.median(forwards),
            "forward_p10_us": statistics.quantiles(forwards, n=10)[0], "note": f"{len(forwards)} turns",
        }
        for name, forwards in times.items()
    ]  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    formats = {name: ".2f" if "_" in name else "" for name in COLUMNS}
    return harness.table(COLUMNS, (harness.cells(formats, line, *COLUMNS) for line in lines), texts=2, notes=1)


def main() -> None:
    parser = harness.options(__doc__, "host_time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="default: 4 on a CPU; 197 and 788 on a GPU")
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 8, 50, 200], help="active in each of 24 layers")
    parser.add_argument("--seconds", type=float, default=20, help="a case (default: 20)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    torch.set_num_threads(1)
    width, r, dtype = (768, 16, torch.bfloat16) if cuda else (64, 8, torch.float32)
    lines: list[dict[str, Any]] = []
    for rows in args.rows or ([197, 788] if cuda else [4]):
        torch.manual_seed(0)
        x = torch.randn(rows, width, device=args.device, dtype=dtype, requires_grad=True)
        case = f"M={rows:,}, {width}→{width}, r={r}"
        lines += measure(case, x, width, r, not args.no_compile, args.seconds)
    for T in [] if cuda else args.adapters:
        lines += measure_sets(T, args.seconds)
    rounded = ({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    harness.write(args.out, COLUMNS, rounded, table(lines), harness.facts(torch.device(args.device), args.commit))
    print(table(lines))


if __name__ == "__main__":
    main()
