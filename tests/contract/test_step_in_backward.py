"""Steps taken in backward are those of torch's for-loop after backward."""

import copy

import pytest
import torch
from backward_cases import attached, network
from cases import (
    CONFIGURATIONS,
    OURS,
    TORCH,
    assert_follows,
    is_packed,
    pair,
)
from torch import nn

import tritonopt
from tritonopt import slab
from tritonopt.device import INTERPRET
from tritonopt.group import Group

BUCKETS = [0, 120, 2**30]
"""Bytes: each parameter alone, some together, all."""


def train(ours, theirs, model, twin, steps=4, **forward):
    """Compared after each step."""
    params, copies = [*model.parameters()], [*twin.parameters()]
    for _ in range(steps):
        x = torch.randn(3, 5)
        model(x, **forward).backward()
        assert not [p for p in params if p.grad is not None]
        theirs.zero_grad()
        twin(x, **forward).backward()
        theirs.step()
        assert_follows(ours, theirs, params, copies)
        for param, other in zip(params, copies, strict=True):
            assert bool(ours.state.get(param)) == bool(theirs.state.get(other))


def count_steps(optimizer):
    counted = []
    optimizer.register_step_post_hook(lambda *_: counted.append(None))
    return counted


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("name, options", CONFIGURATIONS)
def test_as_a_step_after_backward(name, options, bucket_bytes):
    model = network()
    ours, theirs, twin = pair(name, model, **options)
    tritonopt.step_in_backward(model, ours, bucket_bytes)
    train(ours, theirs, model, twin)


HALF = [{"master": "split"}, {"stochastic_rounding": True, "rounding_seed": 5}]


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("options", HALF, ids=str)
def test_in_half_precision(name, options, bucket_bytes):
    """Random bits, too, are those of a step after backward: they belong to the parameter."""
    ends = []
    for in_backward in (True, False):
        model = network().bfloat16()
        optimizer = OURS[name](model.parameters(), **options)
        if in_backward:
            tritonopt.step_in_backward(model, optimizer, bucket_bytes)
        for seed in range(4):
            torch.manual_seed(seed)
            model(torch.randn(3, 5).bfloat16()).backward()
            optimizer.step()
            optimizer.zero_grad()
        params = [*model.parameters()]
        entries = [optimizer.state.get(param, {}) for param in params]
        state = [value for entry in entries for value in entry.values()]
        ends.append([tensor.detach() for tensor in (*params, *state)])
    for left, right in zip(*ends, strict=True):
        if left.dtype == torch.bfloat16:
            left, right = left.view(torch.int16), right.view(torch.int16)
        assert torch.equal(left, right)


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize(
    "forward", [{"skip": 1}, {"recomputed": True}], ids=["a layer is skipped", "checkpointed"]
)
def test_other_passes(name, forward, bucket_bytes):
    model = network()
    ours, theirs, twin = pair(name, model, lr=0.01)
    tritonopt.step_in_backward(model, ours, bucket_bytes)
    for _ in range(2):
        train(ours, theirs, model, twin, steps=2, **forward)
        train(ours, theirs, model, twin, steps=2)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"maximize": True}])
def test_groups_schedulers_and_hooks(name, options, recwarn):
    """A scheduler that thinks that there was no step would warn. Hooks may change options."""
    model, twin = network(), network()
    optimizers = []
    for kind, source in ((OURS[name], model), (TORCH[name], twin)):
        groups = [{"params": source.layers.parameters(), **options}, {"params": [source.scale]}]
        optimizers.append(kind(groups, lr=0.02))
    ours, theirs = optimizers
    theirs.param_groups[0]["foreach"] = False
    for optimizer in optimizers:
        optimizer.register_step_pre_hook(lambda o, *_: o.param_groups[1].update(lr=0.3))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
    tritonopt.step_in_backward(model, ours, 120)
    for _ in range(3):
        train(ours, theirs, model, twin, steps=1)
        for scheduler in schedulers:
            scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_buckets_are_few_and_packed(name):
    counts = []
    for bucket_bytes in BUCKETS:
        model, optimizer, _ = attached(name, bucket_bytes)
        counted = count_steps(optimizer)
        model(torch.ones(3, 5)).backward()
        counts.append(len(counted))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(slab.find(param) is not None for param in trained)
    assert counts == [7, 3, 1] and is_packed(optimizer, optimizer.state)


def test_what_changes_while_attached(name):
    """A new group, thawed and moved parameters, a loaded state, and a compiled step."""
    model = network()
    ours, theirs, twin = pair(name, model, lr=0.01)
    handle = tritonopt.step_in_backward(model, ours, 120)
    train(ours, theirs, model, twin, steps=2)
    for source, optimizer in ((model, ours), (twin, theirs)):
        source.layers.append(nn.Linear(5, 5))
        with torch.no_grad():
            for param in source.layers[4].parameters():
                param.fill_(0.5)
        optimizer.add_param_group({"params": source.layers[4].parameters(), "lr": 0.02})
        source.layers[0].bias.requires_grad_(True)
    train(ours, theirs, model, twin, steps=2)
    for source, optimizer in ((model, ours), (twin, theirs)):
        for param in source.layers[2].parameters():
            param.data = param.data.clone()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = 0.02
        del optimizer.param_groups[1]
    train(ours, theirs, model, twin, steps=2, skip=4)
    handle.remove()
    model(torch.ones(3, 5)).backward()
    assert all(param.grad is not None for param in model.parameters())


def test_a_closure_and_a_step_afterwards(name):
    model = network()
    ours, theirs, twin = pair(name, model, lr=0.01)
    tritonopt.step_in_backward(model, ours, 120)

    def closure(optimizer, source):
        optimizer.zero_grad()
        loss = source(torch.ones(3, 5))
        loss.backward()
        return loss

    for _ in range(3):
        loss = ours.step(lambda: closure(ours, model))
        torch.testing.assert_close(loss, theirs.step(lambda: closure(theirs, twin)))
        ours.step()
        assert_follows(ours, theirs, [*model.parameters()], [*twin.parameters()])


@pytest.mark.parametrize("how", ["grad", "inputs"])
def test_passes_that_are_not_of_all_parameters(name, how):
    model, optimizer, _ = attached(name)
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(torch.ones(3, 5))
    if how == "grad":
        torch.autograd.grad(loss, [model.scale])
    else:
        loss.backward(inputs=[model.scale])
    changed = [not torch.equal(*both) for both in zip(before, model.parameters(), strict=True)]
    assert changed == [how == "inputs" and p is model.scale for p in model.parameters()]


def test_gradients_are_freed_as_they_come(name):
    """Of 8 equal layers, those of two at most are alive."""
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
    optimizer = OURS[name](model.parameters())
    alive = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    model(torch.ones(1, 32)).sum().backward()
    assert max(alive) == 8
    optimizer.zero_grad()
    alive.clear()
    with tritonopt.step_in_backward(model, optimizer, 2 * 32 * 32 * 4):
        model(torch.ones(1, 32)).sum().backward()
    assert len(alive) == 8 and max(alive) == 2


def test_a_step_is_of_its_bucket_alone(name):
    """A thread of another device may have accumulated a gradient whose hook has not run yet."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = OURS[name](params)
    tritonopt.step_in_backward(nn.ParameterList(params), optimizer)
    grad = torch.ones(3)
    optimizer.register_step_pre_hook(lambda *_: setattr(params[1], "grad", grad))
    params[0].sum().backward()
    assert params[0].grad is None and params[1].grad is grad
    assert [*optimizer.state] == params[:1] and torch.equal(params[1], torch.ones(3))


def test_a_step_compiled_later(name):
    compiled = []
    model, optimizer, _ = attached(name)
    model(torch.ones(3, 5)).backward()
    optimizer.compile(backend=lambda module, inputs: compiled.append(module) or module)
    model(torch.ones(3, 5)).backward()
    assert bool(compiled) != INTERPRET


def test_a_new_parameter_alone(name):
    _, optimizer, _ = attached(name)
    new = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [new]})
    new.sum().backward()
    assert new.grad is None and optimizer.state[new]["step"] == 1


def test_buckets_are_planned_once(name, monkeypatch):
    model, _, _ = attached(name, 120)
    for _ in range(3):
        model(torch.ones(3, 5)).backward()
        monkeypatch.setattr(Group, "sort", lambda *_: pytest.fail("planned again"))
