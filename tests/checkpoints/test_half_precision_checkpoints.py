"""Checkpoints of half precision: they resume to the last bit, and torch's go both ways."""

import io
from copy import deepcopy

import pytest
import torch
from cases import OURS, TORCH

from tritonopt.precision import joined

OPTIONS = [
    {"state_dtype": torch.float32},
    {"master": "split"},
    {"stochastic_rounding": True, "rounding_seed": 9},
]
SHAPES = [(3, 5), (40,), (), (64,)]


def network():
    return [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in SHAPES]


def train(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16()
        optimizer.step()


def everything(params, optimizer):
    states = [optimizer.state[p] for p in params]
    return [*params, *(value for state in states for value in state.values())]


def through_a_file(saved, weights_only=True):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def assert_equal(some, others):
    for left, right in zip(some, others, strict=True):
        assert left.dtype == right.dtype
        left, right = (t.view(torch.int16) if t.itemsize == 2 else t for t in (left, right))
        assert torch.equal(left.detach(), right.detach())


def by_state_dict(name, params, optimizer, options):
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = OURS[name](copies, **options)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return copies, other


def by_pickle(name, params, optimizer, options):
    return through_a_file((params, optimizer), weights_only=False)


def by_deepcopy(name, params, optimizer, options):
    return deepcopy((params, optimizer))


def without_options(name, params, optimizer, options):
    """Those of the checkpoint come with it."""
    return by_state_dict(name, params, optimizer, {})


@pytest.mark.parametrize("way", [by_state_dict, by_pickle, by_deepcopy, without_options])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resumed(name, options, way):
    params = network()
    optimizer = OURS[name](params, **options)
    train(params, optimizer, range(3))
    copies, other = way(name, params, optimizer, options)
    assert_equal(everything(params, optimizer), everything(copies, other))
    train(params, optimizer, range(3, 6))
    train(copies, other, range(3, 6))
    assert_equal(everything(params, optimizer), everything(copies, other))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_from_torch_and_to_it(name, options):
    params = network()
    theirs = TORCH[name](params, foreach=False)
    train(params, theirs, range(3))
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    ours = OURS[name](copies, **options)
    checkpoint = theirs.state_dict()
    for group in checkpoint["param_groups"]:
        group["foreach"] = None
    ours.load_state_dict(checkpoint)
    train(copies, ours, range(3, 5))
    assert all(float(ours.state[copy]["step"]) == 5 for copy in copies)
    assert all(options.items() <= group.items() for group in ours.param_groups)
    params = [torch.nn.Parameter(copy.detach().clone()) for copy in copies]
    theirs = TORCH[name](params, foreach=False)
    theirs.load_state_dict(
        {**ours.state_dict(), "param_groups": theirs.state_dict()["param_groups"]}
    )
    train(params, theirs, range(5, 6))
    for param, copy in zip(params, copies, strict=True):
        key = "square_avg" if name == "RMSprop" else "step_size"
        assert theirs.state[param][key].dtype == torch.bfloat16
        assert float(theirs.state[param]["step"]) == 6
        assert param.shape == copy.shape


def test_hooks_see_what_is_loaded():
    """The user's see state in its dtypes; one before the loading may replace what is loaded."""
    params = network()
    optimizer = OURS["RMSprop"](params, master="split")
    train(params, optimizer, range(2))
    saved = optimizer.state_dict()
    doubled = deepcopy(saved)
    for entry in doubled["state"].values():
        entry["square_avg"].mul_(2)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: doubled)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.extend(o.state[p]["square_avg"] for p in params)
    )
    optimizer.load_state_dict(saved)
    wanted = [entry["square_avg"] for entry in doubled["state"].values()]
    assert len(seen) == len(SHAPES) and all(map(torch.equal, seen, wanted))


def test_a_remainder_that_somebody_converted():
    """Torch's optimizers hand on its bits. What is no longer what it was is refused."""
    params = network()
    optimizer = OURS["RMSprop"](params, master="split")
    train(params, optimizer, range(2))
    theirs, saved = TORCH["RMSprop"](params, foreach=False), optimizer.state_dict()
    groups = theirs.state_dict()["param_groups"]
    theirs.load_state_dict({**saved, "param_groups": groups})
    other = OURS["RMSprop"](params, master="split")
    other.load_state_dict({**theirs.state_dict(), "param_groups": saved["param_groups"]})
    for param in params:
        bits = (o.state[param]["remainder"].view(torch.int16) for o in (optimizer, other))
        assert torch.equal(*bits)
    for entry in other.state.values():
        entry["remainder"] = entry["remainder"].float()
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="converted to torch.float32.*delete it"):
        train(params, other, range(1))
    assert all(map(torch.equal, before, params))
    for entry in other.state.values():
        del entry["remainder"]
    train(params, other, range(1))
    assert all(joined(p.detach(), other.state[p]["remainder"]).isfinite().all() for p in params)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_options_that_come_later(name, options):
    """Set in a group between two steps: state goes on from what it was."""
    params = network()
    optimizer = OURS[name](params)
    train(params, optimizer, range(2))
    before = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
    optimizer.param_groups[0].update(options)
    for param in params:
        param.grad = None
    optimizer.step()  # nothing has a gradient: nothing happens
    assert all(torch.equal(optimizer.state[params[0]][key], before[key]) for key in before)
    train(params, optimizer, range(2, 3))
    key = "square_avg" if name == "RMSprop" else "step_size"
    assert optimizer.state[params[0]][key].dtype == torch.float32
