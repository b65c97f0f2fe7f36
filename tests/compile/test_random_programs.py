"""Random programs of reads, writes and steps: compiled, they do what they do in eager.

A program is Python text made from a seed, over lists of tensors: parameters p, gradients g, state v
(and a, m), counts n, and tensors b of one's own. It is run twice by itself and twice compiled. What
it returns and what it leaves must be equal up to rounding, and what it returns must not change when
the tensors do later. Where that cannot be, compiling raises.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from compile_cases import fresh, skip_interpreted
from torch._dynamo.exc import UserError
from torch.optim.rmsprop import rmsprop
from torch.optim.rprop import rprop

import tritonopt

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 6e-2, torch.float16: 1e-2}
SHAPES = ((3, 4), (), (5,), (2, 3), (1,))

READS = (
    "{x}.sin()", "{x}.norm()", "{x} * 2", "{x}.sum() + {y}.sum()", "{x} - {b}", "{x} + {n}",
    "{x}.reshape(-1)[0].cos()", "{x}.reshape(-1)[:2] * 3", "{x}.flatten().flip(0)",
    "{x}.abs().max()", "torch.stack([{x}.norm(), {y}.norm()])", "torch._foreach_mul({l}, 1.5)",
    "torch._foreach_norm({l})", "torch._foreach_sub(p, b)", "{n} * 2", "1 - 0.9 ** {n}",
    "torch.as_tensor(lr) * 2",
)  # fmt: skip
COPIES = (
    "{x}.clone()", "{x}.detach().clone()", "{x}.view(-1).clone()", "{x}.neg().neg()", "{x} * 1",
    "{x} + 0", "torch.cat([{x}.view(-1)])", "{n}.clone()", "{x}[...].clone()",
    "{x}.clone().view(-1)", "torch._foreach_mul({l}, 1.0)", "[y.clone() for y in {l}]",
    "{x}.t().clone().t() if {x}.dim() == 2 else {x}.clone()",
    "torch.empty_like({x}).copy_({x})", "{x}.contiguous().clone()",
)  # fmt: skip
WRITES = (
    "{b}.copy_({x})", "{b}.lerp_({x}, 0.5)", "{b}.mul_(0.5).add_({x})", "{b}.sub_({x})",
    "{p}.mul_(0.9)", "{g}.clamp_(-1, 1)", "{g}.mul_(0.5)", "{v}.mul_(0.9)",
    "{p}.view(-1)[:1].mul_(2)", "torch._foreach_copy_(b, p)", "torch._foreach_lerp_(b, p, 0.25)",
    "torch._foreach_mul_(p, 0.9)",
    "torch._foreach_mul_(g, 0.5)", "{p}.copy_({b})", "{p}.lerp_({b}, 0.1)", "{g}.copy_({b})",
    "{b}.fill_(1)", "{b}.copy_({p}.tanh())", "{p}.sub_({g}, alpha=0.1)", "{b}.add_({n})",
)  # fmt: skip
"""`x`, `y` are tensors of any list, `l` is a list; `p`, `g`, `v`, `b` are of `x`'s shape."""


@dataclass
class Program:
    seed: int
    has_optimizer: bool = False

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.name = self.random.choice(("RMSprop", "Rprop"))
        self.dtype = self.random.choice(DTYPES)
        self.centered, self.has_momentum, self.tensor_lr, self.is_flat, self.requires_grad = (
            self.random.random() < 0.4 for _ in range(5)
        )
        # torch.compile takes a float64 scalar for a Python float: what torch writes there is lost.
        shapes = [s for s in SHAPES if s != () or self.dtype != torch.float64]
        self.shapes = self.random.sample(shapes, self.random.randint(1, 3))
        self.lines = self._lines()
        self.lr_changes = self.tensor_lr or self.seed % 50 < 10  # floats: compiled again

    def _state(self):
        if self.name == "Rprop":
            return ["v", "a"]
        return ["v", *(["a"] * self.centered), *(["m"] * self.has_momentum)]

    def _fill(self, text):
        i, j = (self.random.randrange(len(self.shapes)) for _ in range(2))
        lists = ["p", "p", "g", *self._state()]
        names = {"x": f"{self.random.choice(lists)}[{i}]", "y": f"p[{j}]"}
        names |= {name: f"{name}[{i}]" for name in ("p", "g", "v", "b", "n")}
        return text.format(**names, l=self.random.choice(["p", "b", *lists]))

    def _lines(self):
        lines, kept = [], []

        def add(count):
            for _ in range(count):
                kind = self.random.choice("RRCCWWWK")
                if kind == "K" and kept:
                    lines.append(f"out.append({self.random.choice(kept)} * 2)")
                elif kind == "W":
                    lines.append(self._fill(self.random.choice(WRITES)))
                else:
                    text = self._fill(self.random.choice(READS if kind == "R" else COPIES))
                    if "foreach" not in text and "[y" not in text and self.random.random() < 0.5:
                        kept.append(f"t{len(kept)}")  # is computed here, and may be used later
                        lines.append(f"{kept[-1]} = {text}")
                    else:
                        lines.append(f"out.append({text})")

        for _ in range(self.random.choice((1, 1, 2))):
            add(self.random.randint(1, 5))
            lines.append(self._step())
            if self.tensor_lr and self.random.random() < 0.3:
                lines.append("lr.mul_(0.5)")
        add(self.random.randint(1, 5))
        return lines + [f"out.append({name})" for name in kept]

    def _step(self):
        if self.has_optimizer:
            return "opt.step()"
        part = self.random.choice(("", "", "[:1]", "[-1:]"))
        names = ["p", "g", "v", "a", *(["m"] if self.name == "RMSprop" else []), "n"]
        return f"step({', '.join(name + part for name in names)}, {self._options()})"

    def _options(self):
        if self.name == "Rprop":
            return "etaplus=1.3"
        options = {"alpha": 0.9, "weight_decay": self.random.choice((0, 0.1))}
        options["momentum"] = 0.9 if self.has_momentum else 0
        return ", ".join(["lr=lr", *(f"{name}={value}" for name, value in options.items())])

    def source(self):
        given = "opt, p, b, lr" if self.has_optimizer else "p, g, v, a, m, n, b, lr"
        lines = ["out = []", "with torch.no_grad():"]
        if self.has_optimizer:
            keys = {"v": "square_avg", "a": "grad_avg", "m": "momentum_buffer"}
            if self.name == "Rprop":
                keys = {"v": "prev", "a": "step_size"}
            lines.append("    g = [x.grad for x in p]")
            for name, key in {**{n: keys[n] for n in self._state()}, "n": "step"}.items():
                lines.append(f"    {name} = [opt.state[x][{key!r}] for x in p]")
        lines += ["    " + line for line in self.lines] + ["return out"]
        return f"def program{self.seed}({given}):\n    " + "\n    ".join(lines)

    def function(self, step=None):
        names = {"torch": torch, "step": step}
        # A file of its own for each: dynamo knows code by its file and line.
        exec(compile(self.source(), f"program{self.seed}", "exec"), names)
        return names[f"program{self.seed}"]

    def tensors(self):
        generator = torch.Generator().manual_seed(self.seed)

        def some():
            return [torch.randn(s, generator=generator).to(self.dtype) for s in self.shapes]

        p, g, v, a, m, b = (some() for _ in range(6))
        if self.is_flat:  # as slabs are: one memory, side by side
            flat = torch.cat([t.reshape(-1) for t in p])
            parts = flat.split([t.numel() for t in p])
            p = [part.view(t.size()) for part, t in zip(parts, p, strict=True)]
        if self.name == "Rprop":
            a = [t.abs() + 0.1 for t in a]
        else:
            v, a = [t.square() + 9 for t in v], [t / 10 for t in a]
            a, m = a if self.centered else [], m if self.has_momentum else []
        n = [torch.zeros(()) for _ in p]
        return [[t.requires_grad_(self.requires_grad) for t in p], g, v, a, m, n, b]

    def lr(self):
        return torch.tensor(0.5) if self.tensor_lr else 0.5


def assert_same(program, ours, theirs, what):
    ours, theirs = (torch.utils._pytree.tree_leaves(x) for x in (ours, theirs))
    tolerance = TOLERANCE[program.dtype]
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            left, right, rtol=tolerance, atol=tolerance, check_stride=False, equal_nan=True,
            msg=lambda text: f"{what} of\n\n{program.source()}\n\n{program}\n{text}",
        )  # fmt: skip


def disturb(tensors):
    with torch.no_grad():
        for tensor in torch.utils._pytree.tree_leaves(tensors):
            tensor.mul_(1.5)  # centered, the variance stays positive


def compare(programs, functions, run):
    """Runs programs with tensors of their own, alone and by `run`, that may compile all as one."""
    states = [[p.tensors() for p in programs] for _ in range(2)]
    rates = [[p.lr() for p in programs] for _ in range(2)]
    for call in range(2):
        results = []
        for state, lrs, go in zip(states, rates, (None, run), strict=True):
            if go is None:
                results.append([f(*s, r) for f, s, r in zip(functions, state, lrs, strict=True)])
            else:
                results.append(go(state, lrs))
        for again in (False, True):
            for program, left, right in zip(programs, *results, strict=True):
                assert_same(program, left, right, f"result{' kept' * again}, call {call},")
            if again:
                break
            for program, left, right in zip(programs, *states, strict=True):
                assert_same(program, left, right, f"tensors after call {call}")
            disturb(states)
        rates = [
            [lr * 0.5 if p.lr_changes else lr for lr, p in zip(lrs, programs, strict=True)]
            for lrs in rates
        ]


def op(program):
    return getattr(torch.ops.tritonopt, "rmsprop_" if program.name == "RMSprop" else "rprop_")


def stock(program):
    def step(*lists, **options):
        if program.name == "RMSprop":
            rmsprop(*lists, centered=bool(program.centered), eps=1e-8, foreach=False, **options)
        else:
            etas = {"etaminus": 0.5, "step_size_min": 1e-6, "step_size_max": 50}
            rprop(*lists, foreach=False, **etas, **options)

    return step


def check_together(programs, backend, step):
    """As one graph; if that fails, one after the other, to know which one is at fault.

    Inductor itself gets some programs wrong. They say nothing about the ops."""
    functions = [program.function(step(program)) for program in programs]

    def all_of_them(states, lrs):
        return [f(*s, lr) for f, s, lr in zip(functions, states, lrs, strict=True)]

    torch._dynamo.reset()
    try:
        compare(programs, functions, torch.compile(all_of_them, backend=backend, fullgraph=True))
    except Exception:
        if len(programs) > 1:
            for program in programs:
                check_together([program], backend, step)
        elif step is not stock or backend != "inductor":
            try:
                check_together(programs, "inductor", stock)
            except (AssertionError, UserError):  # wrong, or not traced: it says nothing
                return
            raise
        else:
            raise


def check_optimizers(program, backend, classes):
    """Inductor itself gets some programs wrong, with torch's optimizers, too."""
    try:
        check_step(program, backend, classes)
    except AssertionError:
        if backend in ("inductor", "tritonopt"):
            try:
                check_step(program, "inductor", torch.optim)
            except AssertionError:
                return
        raise


def check_step(program, backend, classes):
    """The optimizer's step in the midst of the program: torch breaks the graph around it."""
    kwargs = {} if program.name == "Rprop" else {
        "alpha": 0.9, "centered": program.centered, "momentum": 0.9 * program.has_momentum,
    }  # fmt: skip
    if classes is torch.optim:
        kwargs["foreach"] = False
    function = program.function()
    made = []
    for _ in range(2):
        p, g, *_, b = program.tensors()
        p = [torch.nn.Parameter(t.detach()) for t in p]
        optimizer = getattr(classes, program.name)(p, lr=program.lr(), **kwargs)
        for param, grad in zip(p, g, strict=True):
            param.grad = grad
        optimizer.step()
        made.append((optimizer, p, b))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend)
    for call in range(2):
        results = [
            f(*given, given[0].param_groups[0]["lr"])
            for f, given in zip((function, compiled), made, strict=True)
        ]
        tensors = [[p, [x.grad for x in p], [o.state[x] for x in p], b] for o, p, b in made]
        assert_same(program, *results, f"result, call {call},")
        assert_same(program, *tensors, f"tensors after call {call}")
        disturb([tensors[0], tensors[1]])
        assert_same(program, *results, f"result kept, call {call},")
        for optimizer, *_ in made if program.lr_changes else []:
            optimizer.param_groups[0]["lr"] *= 0.5


TOGETHER = 10


def together(start, count, size=TOGETHER):
    return [
        pytest.param([Program(s) for s in range(first, first + size)], id=f"{first}-")
        for first in range(start, start + count, size)
    ]


def single(start, count):
    seeds = range(start, start + count)
    return [pytest.param(Program(s, has_optimizer=True), id=str(s)) for s in seeds]


def slow(params):
    return [pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) for p in params]


# A program costs Inductor seconds, `aot_eager` one second and dynamo alone a third of it.


@pytest.mark.parametrize("programs", [*together(0, 1, 1), *slow(together(1000, 20))])
def test_public_ops_under_inductor(programs):
    check_together(programs, "inductor", op)


@pytest.mark.parametrize("programs", [*together(20, 36, 12), *slow(together(2000, 100))])
def test_public_ops(programs):
    check_together(programs, "aot_eager", op)


@pytest.mark.slow
@pytest.mark.parametrize("programs", together(2500, 290))
def test_public_ops_that_are_not_functionalized(programs):
    check_together(programs, "eager", op)


@pytest.mark.parametrize("programs", [*together(40, 1, 1), *slow(together(3010, 20))])
def test_stock_functions_in_one_graph(programs):
    check_together(programs, "tritonopt", stock)


@pytest.mark.parametrize("program", [*single(60, 1), *slow(single(4000, 10))])
def test_stock_optimizers(program):
    check_optimizers(program, "tritonopt", torch.optim)


@pytest.mark.parametrize("program", [*single(70, 4), *slow(single(5000, 60))])
def test_optimizers(program):
    check_optimizers(program, "aot_eager", tritonopt)


@pytest.mark.slow
@pytest.mark.parametrize("program", single(6000, 5))
def test_optimizers_under_inductor(program):
    check_optimizers(program, "inductor", tritonopt)
