"""What a step leaves alone, and what it makes no work of."""

import copy
import gc
import weakref
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing as mp
from cases import (
    OURS,
    TORCH,
    assert_follows,
    follow,
    give_gradients,
    parameters,
    train_alone,
    twins,
)
from torch import nn

from tritonopt import plan

SHAPES = [(3, 5), (40,), (), (64,), (7,)]


@pytest.fixture
def counted(monkeypatch):
    """How many plans are made and called."""
    counts = {"made": 0, "called": 0}

    def count(method, key):
        original = getattr(plan.Plan, method)

        def watched(self, *args, **kwargs):
            counts[key] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(plan.Plan, method, watched)

    count("__init__", "made")
    count("__call__", "called")
    return counts


def test_nothing_is_made_before_the_first_step(name, counted):
    params = parameters(SHAPES)
    optimizer = OURS[name](params)
    optimizer.add_param_group({"params": parameters([(3,)])})
    optimizer.zero_grad()
    optimizer.step()
    assert not optimizer.state and not optimizer.state_dict()["state"]
    assert counted == {"made": 0, "called": 0}


def test_a_process_makes_state_of_its_own(name):
    """Pickled for another process before the first step, as Hogwild hands it out."""
    param = nn.Parameter(torch.zeros(4))
    param.share_memory_()
    ours = OURS[name]([param], lr=0.1)
    there = ForkingPickler.loads(ForkingPickler.dumps([param, ours]))
    assert not ours.state and there[0].data_ptr() != 0
    there[0].grad = torch.ones(4)
    there[1].step()
    assert not ours.state
    assert float(there[1].state[there[0]]["step"]) == 1


@pytest.mark.slow
def test_a_spawned_process(name):
    param = nn.Parameter(torch.zeros(4))
    param.share_memory_()
    ours = OURS[name]([param], lr=0.1)
    child = mp.get_context("spawn").Process(target=train_alone, args=([param], ours))
    child.start()
    child.join()
    assert child.exitcode == 0 and not ours.state
    assert param.detach().any()  # is shared, as it was asked for
    ours, theirs, copies = twins(name, [param], lr=0.1)
    follow(ours, theirs, [param], copies)


def test_groups_with_the_same_options_are_one_plan(name, counted):
    params = parameters([(5,)] * 20)
    optimizer = OURS[name]([{"params": [param]} for param in params], lr=0.1)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert counted["called"] == 3


def test_groups_with_the_same_options_keep_what_is_their_own(name):
    """As `lr`, which torch's Rprop looks at when it makes state."""
    params = parameters([(5,)] * 4)
    options = [{"lr": 0.1}, {"lr": 0.1, "tag": "b"}, {"lr": 0.003}, {"lr": torch.tensor(0.7)}]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = (
        cls([{"params": [p], **copy.copy(o)} for p, o in zip(some, options, strict=True)], **kwargs)
        for cls, some, kwargs in (
            (OURS[name], params, {}),
            (TORCH[name], copies, {"foreach": False}),
        )
    )
    follow(ours, theirs, params, copies)


@pytest.mark.parametrize("change", ["moved", "missing gradients"])
def test_a_plan_follows(name, change, counted):
    """Parameters that move, or gradients that come and go, make no new plan."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, steps=1)
    made = counted["made"]
    for turn in range(4):
        give_gradients(params, copies, missing=() if change == "moved" else {turn, turn + 1})
        if change == "moved":
            for param in params:
                param.data = param.data.clone()
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)
    assert counted["made"] == made


def test_nothing_calls_back(name):
    """A finalizer runs in the middle of any line: none may change what a step is looking at."""
    params = parameters(SHAPES)
    optimizer = OURS[name](params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    tensors = [*params, *(t for e in optimizer.state.values() for t in e.values())]
    assert not any(map(weakref.getweakrefcount, tensors))


def test_collections_in_the_middle_of_everything(name):
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(5):
            params = parameters(SHAPES)
            ours, theirs, copies = twins(name, params, lr=0.1)
            ours.itself = ours  # only a collection ends it
            follow(ours, theirs, params, copies, steps=2)
    finally:
        gc.set_threshold(*threshold)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 1.0}, {"capturable": True}], ids=str)
def test_cuda_is_never_waited_for(name, kwargs, monkeypatch):
    """Neither by the constructor nor by a step."""
    from tritonopt.kernels.launch import Grid

    def upload(*args):
        torch.cuda.set_sync_debug_mode("default")  # as a GPU that is faked waits for any copy
        uploaded.append(original(*args))
        torch.cuda.set_sync_debug_mode("error")
        return uploaded[-1]

    uploaded, original = [], Grid._upload
    monkeypatch.setattr(Grid, "_upload", upload)
    params = parameters([(3, 5), (40,), (2000,)], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer = OURS[name](params, **kwargs)
        for _ in range(3):
            give_gradients(params, params)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert uploaded
