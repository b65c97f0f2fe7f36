"""What the tests of torch.compile share: the same optimizer twice, one of them compiled."""

import copy
from functools import partial

import pytest
import torch
from cases import OURS
from torch._dynamo.utils import counters
from torch.optim.rmsprop import rmsprop

from tritonopt import backend
from tritonopt.device import INTERPRET

skip_interpreted = pytest.mark.skipif(INTERPRET, reason="nothing is compiled")
NAMES = sorted(OURS)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled is known, in memory or on disk."""
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def reporting(function, **kwargs):
    """The function compiled by the backend `tritonopt`, and the texts about its graphs."""
    reports = []
    chosen = partial(backend.tritonopt, report=reports.append)
    return torch.compile(function, backend=chosen, **kwargs), reports


def parameters(shapes=((3, 5), (), (7,), (40, 30)), device="cpu"):
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]


def optimizers(name, params, others=OURS, **kwargs):
    """Our optimizer, and another one of copies of the parameters."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    return OURS[name](params, **kwargs), others[name](copies, **kwargs)


HYPER = {
    "lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "centered": False
}  # fmt: skip
"""Of torch's functional `rmsprop`."""


def lists(dtype=torch.float32):
    """Parameters, gradients, square averages, other state, and counts."""
    torch.manual_seed(0)
    columns = [[torch.randn(4, 2, dtype=dtype) for _ in range(3)] for _ in range(4)]
    columns[2] = [t.square() for t in columns[2]]
    return [*columns, [torch.zeros(()) for _ in range(3)]]


def complex_parameters(p, g, v, s, n):
    columns = [[torch.view_as_complex(t) for t in column] for column in (p, g, v)]
    rmsprop(*columns, [], [], n, foreach=False, has_complex=True, **HYPER)
    return ()


def pairs(ours, theirs):
    for left, right in zip(ours.param_groups, theirs.param_groups, strict=True):
        yield from zip(left["params"], right["params"], strict=True)


def give_gradients(ours, theirs, missing=()):
    for index, (p, q) in enumerate(pairs(ours, theirs)):
        p.grad = None if index in missing else torch.randn_like(p)
        q.grad = None if index in missing else p.grad.clone()


def step_both(ours, theirs, missing=()):
    give_gradients(ours, theirs, missing)
    ours.step()
    theirs.step()


def assert_close(ours, theirs, rtol=0.0):
    close = {"rtol": rtol, "atol": rtol / 10, "check_device": False}  # it moves counts to a GPU
    for p, q in pairs(ours, theirs):
        torch.testing.assert_close(p, q, **close)
        for key, value in theirs.state[q].items():
            torch.testing.assert_close(ours.state[p][key], value, **close)


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def run_both(function, ours, theirs, backend="aot_eager", calls=2):
    """What a function returns and leaves, compiled for our optimizer and not for its twin."""
    compiled = torch.compile(function, backend=backend)
    with torch.no_grad():
        for _ in range(calls):
            give_gradients(ours, theirs)
            result, expected = compiled(ours), function(theirs)
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
            assert_close(ours, theirs)
            for tensor in torch.utils._pytree.tree_leaves((result, expected)):
                if isinstance(tensor, torch.Tensor):
                    tensor.zero_()  # what was returned is nobody's memory
            assert_close(ours, theirs)


KWARGS = {
    "RMSprop": [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True}],
    "Rprop": [{}, {"maximize": True}],
}


SCHEDULERS = {
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "warm-up from 0": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: n / 10),
    "to 1 and 0": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: (50, 0, 100, 7)[n % 4]),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=60, cycle_momentum="momentum" in o.defaults
    ),
}


VARIANTS = [
    ("RMSprop", {"momentum": 0.9, "lr_in_momentum": True, "nesterov": True, "eps_in_sqrt": True}),
    ("RMSprop", {"initial_scale": 1.0, "bias_correction": True}),
    ("RMSprop", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("RMSprop", {"max_grad_norm": 0.5}),
    ("RMSprop", {"foreach": True}),
    ("Rprop", {"variant": "rprop-"}),
    ("Rprop", {"variant": "rprop+"}),
    ("Rprop", {"max_grad_norm": 0.5, "fused_amp": True}),
    ("Rprop", {"foreach": False}),
    ("Rprop", {"variant": "irprop+"}),
]


def move(ours, theirs):
    for p, _ in pairs(ours, theirs):
        p.data = p.data.clone()


def move_state(ours, theirs):
    for p, _ in pairs(ours, theirs):
        ours.state[p] = {key: value.clone() for key, value in ours.state[p].items()}


def add_group(ours, theirs):
    device = params_of(ours)[0].device
    extra = [torch.nn.Parameter(torch.randn(5, device=device)) for _ in range(2)]
    theirs.add_param_group({"params": [torch.nn.Parameter(p.detach().clone()) for p in extra]})
    ours.add_param_group({"params": extra})


def load(ours, theirs):
    saved = copy.deepcopy(theirs.state_dict())
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(saved))


def clear_state(ours, theirs):
    ours.state.clear()
    theirs.state.clear()


def other_options(ours, theirs):
    for optimizer in (ours, theirs):
        group = optimizer.param_groups[0]
        group["maximize"], group["lr"] = not group["maximize"], group["lr"] * 0.5


EVENTS = [move, move_state, add_group, load, clear_state, other_options]


CHANGES = {
    "RMSprop": ["lr", "alpha", "eps", "weight_decay", "momentum", "maximize"],
    "Rprop": ["etas", "step_sizes", "maximize"],
}
"""Options that may change between steps."""


def smaller(value):
    if isinstance(value, tuple):
        return value[0] * 0.9, value[1] * 0.99
    return not value if isinstance(value, bool) else value * 0.8
