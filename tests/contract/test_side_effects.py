"""What a step leaves alone: memory, threads, processes, and what it did not finish."""

import copy
import gc
import sys
import threading
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
from torch import Tensor, nn

from tritonopt import plan, sweep
from tritonopt.device import INTERPRET

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


# State comes with the first step, not before.


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


def test_no_gradient_is_kept(name):
    params = parameters([(5,)] * 3)
    ours = OURS[name](params, lr=0.1, max_grad_norm=1.0)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        ours.step()
    kept = [weakref.ref(param.grad) for param in params]
    ours.zero_grad()
    assert not any(gradient() is not None for gradient in kept)


# Groups and moves do not make work.


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


# Memory.


def _bytes_alive():
    """Of all tensors; a slab and its pieces are the same memory."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors]
    total = end = 0
    for start, stop in sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
        total += max(stop - max(start, end), 0)
        end = max(stop, end)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("how", ["groups", "optimizers"])
def test_scratch_does_not_add_up(name, how):
    def kept(count):
        before = _bytes_alive()
        params = [nn.Parameter(torch.ones(2**15)) for _ in range(count)]
        for param in params:
            param.grad = torch.ones_like(param)
        if how == "groups":
            groups = [{"params": [p], "maximize": i % 2 == 0} for i, p in enumerate(params)]
            optimizers = [OURS[name](groups)]
        else:
            optimizers = [OURS[name]([param]) for param in params]
        for optimizer in optimizers:
            optimizer.step()
        tensors = [t for o in optimizers for e in o.state.values() for t in e.values()]
        own = sum(t.numel() * t.itemsize for t in [*params, *params, *tensors])
        return _bytes_alive() - before - own

    kept(2)  # scratch and constants of the process are there from now on
    assert kept(12) < 2**15 * 4


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("how", ["params replaced", "group removed", "group's list cleared"])
def test_parameters_taken_out_are_freed(name, how, steps):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = OURS[name](model.parameters(), lr=0.1)
    new = parameters([(3,), (5,)])
    optimizer.add_param_group({"params": new, "maximize": True})
    for _ in range(steps):
        for param in [*model.parameters(), *new]:
            param.grad = torch.ones_like(param)
        optimizer.step()
    old = [weakref.ref(param) for param in model.parameters()]
    old += [weakref.ref(t) for e in optimizer.state.values() for t in e.values()]
    optimizer.state.clear()
    if how == "params replaced":
        optimizer.param_groups[0]["params"] = parameters([(2,)])
    elif how == "group removed":
        del optimizer.param_groups[0]
    else:
        optimizer.param_groups[0]["params"].clear()
    del model
    for param in new:
        param.grad = torch.ones_like(param)
    optimizer.step()
    gc.collect()
    assert not [ref for ref in old if ref() is not None]


def test_no_groups_at_all(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, steps=1)
    groups = [list(optimizer.param_groups) for optimizer in (ours, theirs)]
    for optimizer in (ours, theirs):
        optimizer.param_groups.clear()
        optimizer.step()
    for optimizer, some in zip((ours, theirs), groups, strict=True):
        optimizer.param_groups.extend(some)
    follow(ours, theirs, params, copies)


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


def test_a_storage_that_cannot_be_resized_can_be_left(name):
    """What lies in a slab has no memory of its own to give back: another tensor has."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, steps=2)
    for tensor in (params[0], *ours.state[params[0]].values()):
        tensor.data = tensor.data.clone()
        kept, storage = tensor.detach().clone(), tensor.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        with torch.no_grad():
            tensor.copy_(kept)
    follow(ours, theirs, params, copies)


def test_a_lone_parameter_can_be_freed_and_brought_back(name):
    param = nn.Parameter(torch.ones(8))
    ours, theirs, copies = twins(name, [param], lr=0.1)
    for _ in range(3):
        kept, storage = param.detach().clone(), param.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        with torch.no_grad():
            param.copy_(kept)
        follow(ours, theirs, [param], copies, steps=1)


def test_what_was_replaced_is_left_alone(name):
    """State is replaced by an alias of itself, and what it was before is moved."""
    params = parameters([(n,) for n in range(3, 10)])
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, steps=1)
    for optimizer, some in ((ours, params), (theirs, copies)):
        for param in some:  # apart from its neighbours
            param.data = param.data.clone()
            optimizer.state[param] = {k: v.clone() for k, v in optimizer.state[param].items()}
    follow(ours, theirs, params, copies, steps=1)
    old = []
    for optimizer in (ours, theirs):
        for entry in optimizer.state.values():
            old += entry.values()
            entry.update({key: value.detach() for key, value in entry.items()})
    follow(ours, theirs, params, copies, steps=1)
    for tensor in old:
        tensor.data = torch.zeros_like(tensor)
    follow(ours, theirs, params, copies)
    assert not any(tensor.any() for tensor in old)


def test_a_dict_that_is_there_already_is_filled(name):
    """Somebody has looked into `state`, which makes an empty entry."""
    params = parameters(SHAPES)
    optimizer = OURS[name](params)
    entries = [optimizer.state[param] for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, entry in zip(params, entries, strict=True):
        assert optimizer.state[param] is entry and float(entry["step"]) == 1


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}], ids=str)
def test_keys_have_torchs_order(name, options):
    if name == "Rprop" and options:
        options = {"maximize": True}
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, **options)
    give_gradients(params, copies)
    ours.step()
    theirs.step()
    for param, twin in zip(params, copies, strict=True):
        assert [*ours.state[param]] == [*theirs.state[twin]]


@pytest.mark.parametrize(
    "step",
    [
        torch.tensor(5),
        torch.tensor([5.0]),
        torch.tensor(5.0, dtype=torch.float64),
        torch.tensor(5.0, dtype=torch.float16),
    ],
    ids=["int64", "of one dimension", "float64", "float16"],
)
@pytest.mark.parametrize("count", [1, 5])
def test_counts_of_other_libraries(name, step, count):
    params = parameters([(n,) for n in range(3, 3 + count)])
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, steps=1)
    for optimizer in (ours, theirs):
        state = copy.deepcopy(optimizer.state_dict())
        for entry in state["state"].values():
            entry["step"] = step.clone()
        optimizer.load_state_dict(state)
    follow(ours, theirs, params, copies, steps=2)
    for param, twin in zip(params, copies, strict=True):
        assert ours.state[param]["step"].dtype == theirs.state[twin]["step"].dtype


# Threads.


def test_threads_share_no_scratch():
    places, ready = [], threading.Barrier(3)

    def work():
        scratch = sweep._scratch.of(100, torch.float32)
        places.append({value.data_ptr() for value in scratch if isinstance(value, Tensor)})
        ready.wait()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 3 and all(places)
    assert len(set().union(*places)) == sum(map(len, places))


@pytest.mark.skipif(INTERPRET, reason="triton's interpreter is for one thread")
@pytest.mark.parametrize("shared", [False, True], ids=["own optimizers", "one optimizer"])
def test_threads(name, shared):
    """Of one optimizer without a lock, an update may be lost, but none is of the wrong size."""
    interval, scales = sys.getswitchinterval(), [1e-4, 1e4] * 2
    models = [[nn.Parameter(torch.zeros(60, 60)) for _ in scales] for _ in range(3)]
    if shared:
        models = models[:1] * 3
    for params in models:
        for param, scale in zip(params, scales, strict=True):
            param.grad = torch.full_like(param, scale)
    optimizers = [OURS[name](params, lr=1e-3) for params in models]
    if shared:
        optimizers = optimizers[:1] * 3
        optimizers[0].step()
    errors = []

    def work(optimizer):
        try:
            for _ in range(20):
                optimizer.step()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[optimizer]) for optimizer in optimizers]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    steps = 61 if shared else 20
    if name == "RMSprop":  # the first step is of 10 lr, later ones are smaller
        largest = 1e-2 * steps
    else:  # of the largest step size, as a race may lose an update, and not its growth
        largest = steps * 1e-3 * 1.2 ** (steps - 1)
    for params in models:
        for param in params:
            assert param.isfinite().all() and (param < 0).all() and param.min() >= -1.0001 * largest
    if not shared:
        copies = [nn.Parameter(torch.zeros(60, 60)) for _ in scales]
        for twin, scale in zip(copies, scales, strict=True):
            twin.grad = torch.full_like(twin, scale)
        theirs = TORCH[name](copies, lr=1e-3, foreach=False)
        for _ in range(20):
            theirs.step()
        for params, optimizer in zip(models, optimizers, strict=True):
            assert_follows(optimizer, theirs, params, copies)


# What was not finished.


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_an_interrupted_step(name, first, monkeypatch):
    """Control-C in the second group: the next step is as if it had not been asked for."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params[:3], lr=0.1)
    copies += [nn.Parameter(p.detach().clone()) for p in params[3:]]
    ours.add_param_group({"params": params[3:], "maximize": True})
    theirs.add_param_group({"params": copies[3:], "maximize": True})
    if not first:
        follow(ours, theirs, params, copies)
    give_gradients(params, copies)
    update, calls = plan.Plan.__call__, []

    def interrupted(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(plan.Plan, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ours.step()
    assert torch.is_grad_enabled()
    for param in copies[3:]:
        param.grad = None
    theirs.step()
    follow(ours, theirs, params, copies)


def test_a_sparse_gradient_changes_nothing(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    give_gradients(params, copies)
    params[3].grad = None
    params[3].grad = torch.ones(64).to_sparse()
    before = [param.detach().clone() for param in params]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sparse gradients"):
            ours.step()
        assert not ours.state and all(map(torch.equal, params, before))
    follow(ours, theirs, params, copies)


def test_state_that_lacks_a_key_changes_nothing(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    give_gradients(params, copies, missing={2})
    ours.step()
    theirs.step()
    for optimizer, some in ((ours, params), (theirs, copies)):
        optimizer.state[some[1]].pop({"RMSprop": "square_avg", "Rprop": "prev"}[name])
    give_gradients(params, copies)
    for optimizer in (ours, theirs):
        with pytest.raises(KeyError):
            optimizer.step()
    assert params[2] not in ours.state
    assert float(ours.state[params[0]]["step"]) == float(theirs.state[copies[0]]["step"])


def test_a_missing_loss_changes_nothing():
    params = parameters(SHAPES)
    optimizer = OURS["Rprop"](params, variant="irprop+")
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="needs the loss"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("skipped", [{0}, {1, 2}, {0, 3}], ids=str)
def test_a_skipped_step_leaves_no_trace(name, options, skipped):
    params = parameters(SHAPES)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours = OURS[name](params, lr=0.1, fused_amp=True, **options)
    theirs = TORCH[name](copies, lr=0.1, **{**options, "foreach": False})
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for turn in range(5):
        for scaler, optimizer, some in zip(scalers, (ours, theirs), (params, copies), strict=True):
            generator = torch.Generator().manual_seed(turn)
            scaler.scale(torch.ones(()))
            for index, param in enumerate(some):
                param.grad = 8 * torch.randn(param.shape, generator=generator)
                if turn in skipped and index == 1:
                    param.grad[0] = torch.inf
            if turn in skipped and optimizer is ours:
                before = copy.deepcopy((params, ours.state_dict()))
            scaler.step(optimizer)
            scaler.update(8.0)
        if turn in skipped:
            after = ours.state_dict()
            assert after["state"].keys() == before[1]["state"].keys()
            assert (turn > 0) == bool(after["state"]) or turn - 1 in skipped
            for index, entry in before[1]["state"].items():
                for key, value in entry.items():
                    assert torch.equal(after["state"][index][key], value)
            assert all(map(torch.equal, params, before[0]))
        assert len(ours.state) == len(theirs.state)
        assert_follows(ours, theirs, params, copies)
