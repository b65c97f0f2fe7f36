"""Every value of an option that torch takes: step sizes, etas, tensors, groups."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import OURS, TORCH, assert_follows, follow, give_gradients, parameters, twins
from torch import nn

from tritonopt.device import INTERPRET

# lr of Rprop.

LRS = [0.0, 1e-9, 0.01, 49.9, 50.0, 1e4, float("inf"), 1]


@pytest.mark.parametrize("lr", LRS)
def test_lr_outside_step_sizes_is_clamped_at_the_first_step(lr, device):
    params = parameters([(3, 5), (40,)], device=device)
    ours, theirs, copies = twins("Rprop", params, lr=lr)
    follow(ours, theirs, params, copies, 4)
    assert ours.state[params[0]]["step_size"].max() <= 50


def test_lr_is_ignored_after_the_first_step():
    params = parameters([(3, 5), (40,), (7,)])
    ours, theirs, copies = twins("Rprop", params, lr=0.1)
    for step in range(4):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        give_gradients(params, copies, {1} if step < 2 else ())  # its first step is the third
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)
    assert ours.state[params[1]]["step"] == 2


def reload(optimizer):
    params = optimizer.param_groups[0]["params"]
    new = type(optimizer)(params, lr=0.7)
    new.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return new


def in_place(optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    return optimizer


def moved(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.clone()
    return optimizer


BEFORE = {
    "as it is": lambda optimizer: optimizer,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "load_state_dict": reload,
    "load_state_dict of itself": in_place,
    "moved": moved,
    "described": lambda optimizer: (optimizer.describe(), optimizer)[1],
}


ROUNDED = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(INTERPRET, reason="the interpreter truncates")
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, ROUNDED], ids=str)
@pytest.mark.parametrize("prepare", BEFORE.values(), ids=BEFORE)
def test_lr_changed_before_the_first_step(prepare, dtype):
    """A warm-up lowers lr after construction; torch makes the step sizes at the first step."""
    params = parameters([(3, 5), (40,), ()], dtype)
    ours, theirs, copies = twins("Rprop", params, lr=1.0)
    ours = prepare(ours)
    theirs = copy.deepcopy(theirs)
    params, copies = (o.param_groups[0]["params"] for o in (ours, theirs))
    for optimizer in (ours, theirs):
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 10)
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    give_gradients(params, copies)
    ours.step()
    theirs.step()
    assert_follows(ours, theirs, params, copies)
    assert torch.all(ours.state[params[0]]["step_size"] == torch.tensor(0.01, dtype=dtype))


def test_lr_changed_by_a_tensor_in_place():
    params = parameters([(3, 5), (40,)])
    ours, theirs, copies = twins("Rprop", params, lr=torch.tensor(1.0))
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["lr"].fill_(0.25)
    follow(ours, theirs, params, copies)


# Options that torch validates only as defaults.

ETAS = [(1.0, 1.0), (0.5, 1.0), (2.0, 3.0), (-0.5, 1.2), (0.0, 1.2), (1.5, 0.5), (0.5, 1 + 1e-9),
        (1e-50, 1.2), [0.5, 1.2], (0.999999, 1.000001)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("etas", ETAS, ids=str)
def test_etas_of_a_group(etas, dtype):
    params = parameters([(3, 5), (40,)], dtype)
    ours, theirs, copies = twins("Rprop", params)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["etas"] = etas
    follow(ours, theirs, params, copies, 5)


STEP_SIZES = [(50, 1e-6), (-1.0, 1.0), (-2.0, -1.0), (0, 0), (1, 1), (0.0, float("inf")),
              (float("inf"), 1.0), [0.005, 0.02]]  # fmt: skip


STRANGE = {
    "tensor etas": {"etas": (torch.tensor(0.3), torch.tensor(1.7))},
    "numpy etas": {"etas": (np.float64(0.3), np.float64(1.7))},
    "no least step size": {"step_sizes": (None, 0.2)},
    "no greatest step size": {"step_sizes": (0.1, None)},
    "tensor step sizes": {"step_sizes": (torch.tensor(0.05), torch.tensor(0.2))},
}


@pytest.mark.parametrize("kwargs", STRANGE.values(), ids=STRANGE)
def test_rprop_options_of_other_types(kwargs, device):
    params = parameters([(5,), (64,)], device=device)
    kwargs = {  # torch clamps by tensors of the same device
        key: tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in pair)
        for key, pair in kwargs.items()
    }
    ours, theirs, copies = twins("Rprop", params, lr=0.1, **kwargs)
    follow(ours, theirs, params, copies, 5)


def test_zeros_keep_their_sign(name):
    """-x of +0 is -0, also in a kernel, whose minus is 0 - x."""
    param, zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0]), torch.tensor([0.0, 0.0, -0.0, -0.0])
    for maximize in (False, True):
        ours, theirs, copies = twins(name, [torch.nn.Parameter(param.clone())], maximize=maximize)
        for _ in range(2):
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["params"][0].grad = zeros.clone()
                optimizer.step()
        (mine,), (other,) = ours.param_groups[0]["params"], copies
        pairs = [(mine, other)]
        pairs += [(ours.state[mine][k], v) for k, v in theirs.state[other].items()]
        for actual, expected in pairs:
            assert torch.equal(torch.signbit(actual), torch.signbit(expected))


@pytest.mark.parametrize("step_sizes", STEP_SIZES, ids=str)
def test_step_sizes(step_sizes, device):
    params = parameters([(3, 5), (40,)], device=device)
    ours, theirs, copies = twins("Rprop", params, step_sizes=step_sizes)
    follow(ours, theirs, params, copies, 5)


GROUP = [{"momentum": -0.5}, {"eps": -1e-3}, {"weight_decay": -0.1}, {"alpha": 2.0}, {"lr": -0.1},
         {"lr": 1}, {"alpha": 0}, {"lr": 0.0}]  # fmt: skip


@pytest.mark.parametrize("options", GROUP, ids=str)
def test_rmsprop_options_of_a_group(options):
    params = parameters([(3, 5), (40,)])
    ours, theirs, copies = twins("RMSprop", params)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(options)
    follow(ours, theirs, params, copies, 4)


LR_TENSORS = {
    "0-dim": torch.tensor(0.05),
    "1-dim": torch.tensor([0.05]),
    "2-dim": torch.tensor([[0.05]]),
    "double": torch.tensor(0.05, dtype=torch.float64),
    "int": torch.tensor(1),
    "bfloat16": torch.tensor(0.05, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lr", LR_TENSORS.values(), ids=LR_TENSORS)
def test_tensor_lr(name, lr, dtype):
    params = parameters([(3, 5), (40,)], dtype)
    ours, theirs, copies = twins(name, params, lr=lr.clone())
    follow(ours, theirs, params, copies, 2)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["lr"] = lr.clone()
        optimizer.param_groups[0]["lr"].mul_(2)
    follow(ours, theirs, params, copies, 2)


GROUPS = {
    "RMSprop": [
        {}, {"lr": 0.5}, {"momentum": 0.9}, {"centered": True}, {"weight_decay": 0.3},
        {"maximize": True}, {"alpha": 0.5, "eps": 1e-2}, {"foreach": True}, {"foreach": False},
        {"momentum": 0.9, "centered": True, "lr": torch.tensor(0.3)},
    ],
    "Rprop": [
        {}, {"lr": 0.5}, {"etas": (0.3, 2.0)}, {"step_sizes": (0.3, 0.4)}, {"maximize": True},
        {"foreach": True}, {"foreach": False}, {"lr": torch.tensor(0.3)},
    ],
}  # fmt: skip


def test_many_groups(name, device):
    params = [parameters([(7,), (3, 3)], device=device) for _ in GROUPS[name]]
    copies = [[nn.Parameter(p.detach().clone()) for p in some] for some in params]
    both = [
        [{"params": p, **options} for p, options in zip(some, GROUPS[name], strict=True)]
        for some in (params, copies)
    ]
    ours, theirs = OURS[name](both[0]), TORCH[name](both[1])
    follow(ours, theirs, sum(params, []), sum(copies, []), 5)


def test_etas_with_a_dimension_are_torchs():
    """It looks for sign changes in their dtype: 0.3 in float64 is no float32."""
    etas = tuple(torch.tensor([eta], dtype=torch.float64) for eta in (0.3, 1.3))
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    ours = OURS["Rprop"](params[:1], etas=etas)
    theirs = TORCH["Rprop"](params[1:], etas=etas, foreach=False)
    for sign in (1.0, -1.0, 1.0):
        for param in params:
            param.grad = torch.full((1,), sign)
        ours.step()
        theirs.step()
        assert torch.equal(*params)


TWO, HUGE = torch.tensor([0.1, 0.2]), 10**400
WRONG = {
    "RMSprop": {
        "lr": ["0.1", TWO, np.array([0.1]), 1j, HUGE], "alpha": [None, TWO], "eps": ["1e-8", TWO],
        "weight_decay": [[0.1], np.array([0.2])], "momentum": ["0.9", TWO], "initial_scale": ["1"],
        "eps_in_sqrt": ["yes"], "nesterov": [None], "max_grad_norm": [-1], "caution": [True],
    },
    "Rprop": {
        "lr": ["0.1", TWO], "etas": [(0.5,), 5, None], "step_sizes": [(1e-6, 1, 50), 0.1],
        "variant": [3], "fused_amp": [True],
    },
}  # fmt: skip
ROWS = [(name, o, value) for name in WRONG for o, values in WRONG[name].items() for value in values]


@pytest.mark.parametrize("started", [False, True], ids=["first step", "later"])
@pytest.mark.parametrize("name, option, value", ROWS, ids=lambda v: str(v)[:9])
def test_a_wrong_value_in_a_group_is_named_and_changes_nothing(name, option, value, started):
    params = parameters([(3,), (4,)])
    optimizer = OURS[name]([{"params": params[:1]}, {"params": params[1:]}])
    give_gradients(params, params)
    if started:
        optimizer.step()
    optimizer.param_groups[1][option] = value
    before = copy.deepcopy((params, [*optimizer.state.values()]))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"(Invalid )?{option}"):
            optimizer.step()
    assert str(before) == str((params, [*optimizer.state.values()]))


@pytest.mark.parametrize("value", [np.float32(0.25), torch.tensor(0.25), 1])
@pytest.mark.parametrize("option", ["lr", "alpha", "eps", "weight_decay", "momentum"])
def test_a_number_of_any_type_in_a_group_is_torchs(option, value):
    params = parameters([(3,), (4,)])
    ours, theirs, copies = twins("RMSprop", params, momentum=0.5)
    follow(ours, theirs, params, copies, 2)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0][option] = value
    follow(ours, theirs, params, copies, 2)
