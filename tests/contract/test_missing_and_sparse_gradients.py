"""A missing gradient is skipped, a sparse one refused; nothing else changes."""

import pytest
import torch
from cases import OURS, TORCH, assert_follows, follow, give_gradients, parameters, twins
from torch import nn

SHAPES = [(3, 5), (40,), (), (64,), (7,)]
OPTIONS = {"RMSprop": {"weight_decay": 0.1, "momentum": 0.9, "centered": True}, "Rprop": {}}


def both(name, device="cpu", shapes=SHAPES, **kwargs):
    params = parameters(shapes, device=device)
    return params, *twins(name, params, lr=0.05, **OPTIONS[name], **kwargs)


def values(optimizer, params):
    """Parameters and state, copied."""
    state = [{k: t.clone() for k, t in optimizer.state[p].items()} for p in params]
    return [p.detach().clone() for p in params], state


def assert_unchanged(optimizer, params, before):
    for mine, then in zip(values(optimizer, params), before, strict=True):
        torch.testing.assert_close(mine, then, rtol=0, atol=0)


# None.

MISSING = {
    "none": [(), (), ()],
    "first": [(0,), (), (0,)],
    "middle": [(2,), (1, 2, 3), (2,)],
    "last": [(4,), (4,), ()],
    "every second": [(0, 2, 4), (1, 3), (0, 2, 4)],
    "one left": [(0, 1, 3, 4), (0, 1, 2, 3), (1, 2, 3, 4)],
    "all, once": [(), range(5), ()],
    "all but the last time": [range(5), range(5), ()],
    "late": [(1, 2), (1, 2), ()],
}


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
def test_missing_gradients_are_skipped(name, missing, device):
    params, ours, theirs, copies = both(name, device)
    for indices in missing * 2:
        give_gradients(params, copies, indices)
        before = values(ours, params)
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)
        after = values(ours, params)
        for index in indices:
            torch.testing.assert_close(after[0][index], before[0][index], rtol=0, atol=0)
            torch.testing.assert_close(after[1][index], before[1][index], rtol=0, atol=0)


@pytest.mark.parametrize("every", [2, 7])
def test_others_are_missing_at_each_step(name, every):
    """Packed neighbours in many short parts, which are gathered, or in a few long ones."""
    params, ours, theirs, copies = both(name, shapes=[(3, 5), (40,), (), (64,)] * 10)
    for step in range(6):
        give_gradients(params, copies, range(step % every, len(params), every) if step else ())
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def test_no_gradient_at_all_is_a_no_op(name, device):
    params, ours, *_ = both(name, device)
    ours.step()
    follow(ours, ours, params, params, 2)
    give_gradients(params, params, range(5))
    before, versions = values(ours, params), [p._version for p in params]
    ours.step()
    assert_unchanged(ours, params, before)
    assert versions == [p._version for p in params]


def test_a_parameter_that_requires_no_gradient_but_has_one(name):
    """torch looks at `.grad` only."""
    params, _, _, copies = both(name)
    for some in (params, copies):
        some[1].requires_grad_(False)
    ours, theirs = OURS[name](params), TORCH[name](copies, foreach=False)
    assert params[1] not in ours.state
    follow(ours, theirs, params, copies, 3)


def test_freezing_and_thawing(name):
    params, ours, theirs, copies = both(name)
    follow(ours, theirs, params, copies, 2)
    for frozen in (True, False):
        for some in (params, copies):
            some[2].requires_grad_(not frozen)
            some[2].grad = None
        for _ in range(2):
            give_gradients(params, copies, {2} if frozen else ())
            ours.step()
            theirs.step()
            assert_follows(ours, theirs, params, copies)


# Sparse.


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("layout", ["sparse", "sparse and mixed dtypes"])
def test_sparse_gradients_raise_and_change_nothing(name, groups, before, layout):
    params, _, _, _ = both(name)
    parts = [params] if groups == 1 else [params[:2], params[2:4], params[4:]]
    ours = OURS[name]([{"params": part} for part in parts])
    for _ in range(before):
        give_gradients(params, params)
        ours.step()
    for param in params:
        param.grad = torch.randn_like(param)
    if layout != "sparse":
        for param in params[2:]:
            param.grad = None
            param.grad_dtype = None
            param.grad = torch.randn_like(param).double()
    params[4].grad = params[4].grad.to_sparse()
    now = values(ours, params)
    with pytest.raises(RuntimeError, match=f"^{name} does not support sparse gradients$"):
        ours.step()
    assert_unchanged(ours, params, now)


def test_sparse_gradients_of_an_embedding(name):
    layer = nn.Embedding(10, 4, sparse=True)
    ours = OURS[name](layer.parameters())
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=f"^{name} does not support sparse gradients$"):
        ours.step()
