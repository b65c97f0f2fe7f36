"""What may be in `.grad`, and when it is read."""

import copy

import pytest
import torch
from cases import OURS, TORCH, assert_follows, follow, give_gradients, parameters, twins
from torch import nn

import tritonopt

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


# dtypes.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_single_gradients_of_half_parameters(name, dtype, device):
    params = parameters([(3, 5), (40,), (64,)], dtype, device)
    ours = OURS[name](params)
    for param in params:
        param.grad_dtype = torch.float32
    key = {"RMSprop": "square_avg", "Rprop": "prev"}[name]
    for step in range(3):
        grads = [torch.rand_like(p, dtype=torch.float32) * 4 + 7 for p in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        before = [ours.state[p].get(key, torch.zeros_like(p)).float() for p in params]
        ours.step()
        for param, grad, old in zip(params, grads, before, strict=True):
            new = 0.99 * old + 0.01 * grad**2 if name == "RMSprop" else grad
            actual = ours.state[param][key].float()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(actual, new, rtol=eps, atol=1e-7)
            assert param.grad.dtype == torch.float32 and torch.equal(param.grad, grad)
        assert ours.state[params[0]]["step"] == step + 1


@pytest.mark.parametrize("who", ["gradient", "state"])
def test_state_in_single_precision_of_half_parameters(name, who):
    """Rprop's step sizes have the gradients' dtype in torch; state that is given stays as it is."""
    params = parameters([(3, 5), (40,)], torch.bfloat16)
    ours, theirs, copies = twins(name, params, lr=0.1)
    for param, twin in zip(params, copies, strict=True):
        if who == "gradient":
            param.grad_dtype = twin.grad_dtype = torch.float32
        else:
            key = {"RMSprop": "square_avg", "Rprop": "prev"}[name]
            for optimizer, p in ((ours, param), (theirs, twin)):
                entry = {"step": torch.tensor(0.0), key: torch.zeros(p.shape)}
                if name == "Rprop":
                    entry["step_size"] = torch.full(p.shape, 0.1)
                optimizer.state[p] = entry
    for _ in range(3):
        for param, twin in zip(params, copies, strict=True):
            param.grad = torch.randn(param.shape, dtype=param.grad_dtype)
            twin.grad = param.grad.clone()
        ours.step()
        theirs.step()
        for param, twin in zip(params, copies, strict=True):
            for key, value in theirs.state[twin].items():
                assert ours.state[param][key].dtype == value.dtype, key
                torch.testing.assert_close(ours.state[param][key], value, rtol=0.02, atol=0.02)


def test_gradient_dtypes_that_alternate(name):
    params = parameters([(3, 5), (40,), (64,)], torch.bfloat16)
    ours = OURS[name](params, lr=0.1)
    twin = copy.deepcopy(params)
    theirs = OURS[name](twin, lr=0.1)
    for param in params:
        param.grad_dtype = None
    for step in range(6):
        for index, (param, other) in enumerate(zip(params, twin, strict=True)):
            other.grad = torch.randn_like(other)
            single = step and (step + index) % 3 == 0  # not first: Rprop's step sizes follow it
            param.grad = other.grad.to(torch.float32 if single else torch.bfloat16)
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, twin)


def test_double_gradients_of_single_parameters(name):
    """A mixture that no launch takes: torch's own."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 1)
    for some in (params, copies):
        some[1].grad_dtype = None
    for _ in range(3):
        give_gradients(params, copies)
        for some in (params, copies):
            some[1].grad = some[1].grad.double()
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)
    follow(ours, theirs, params, copies, 3)


# Memory layouts.


def in_a_buffer(offset):
    def make(grad):
        buffer = torch.zeros(grad.numel() + 8)
        view = buffer[offset : offset + grad.numel()].view(grad.shape)
        return view.copy_(grad)

    return make


def other_strides_of_size_1(grad):
    strides = [99 if n == 1 else s for n, s in zip(grad.shape, grad.stride(), strict=True)]
    return grad.as_strided(grad.shape, strides)


GRADIENTS = {
    "transposed": lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda g: g.to(memory_format=torch.channels_last) if g.dim() == 4 else g,
    "size 1": other_strides_of_size_1,
    "gaps": lambda g: torch.stack([g, g], -1)[..., 0],
    "expanded": lambda g: g.flatten()[0].clone().expand(g.shape),
    "negated": lambda g: torch._neg_view(-g),
    "negated and transposed": lambda g: torch._neg_view(-g.transpose(0, -1).contiguous()).transpose(
        0, -1
    ),
    "imaginary part": lambda g: torch.complex(g, -g).conj().imag,
    "zero tensor": lambda g: torch._efficientzerotensor(g.shape),
    "with a graph": lambda g: g.clone().requires_grad_() * 1,
    "a Parameter": lambda g: nn.Parameter(g),
    "offset 1": in_a_buffer(1),
    "offset 2": in_a_buffer(2),
    "offset 3": in_a_buffer(3),
}


@pytest.mark.parametrize("one", [False, True], ids=["all", "one"])
@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_other_layouts(name, make, one):
    params, ours, theirs, copies = both(name, shapes=[(2, 3, 4, 5), (1, 5, 1), (6, 7), (40,)])
    for step in range(6):
        give_gradients(params, copies)
        if step >= 1:  # after plain gradients have become what is expected
            for param, twin in list(zip(params, copies, strict=True))[2 if one else 0 :]:
                param.grad = make(param.grad)
                twin.grad = param.grad.detach().clone(memory_format=torch.contiguous_format)
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def test_a_gradient_is_never_written(name):
    params, ours, theirs, copies = both(name, maximize=True)
    for _ in range(3):
        give_gradients(params, copies)
        held = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        ours.step()
        for param, (grad, value, version) in zip(params, held, strict=True):
            assert param.grad is grad and torch.equal(grad, value) and grad._version == version


def test_one_gradient_of_two_parameters(name):
    params, ours, theirs, copies = both(name, shapes=[(7,), (7,), (7,)])
    for _ in range(4):
        shared = torch.randn(7)
        for param in (*params, *copies):
            param.grad = shared
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def test_overlapping_gradients(name):
    params, ours, theirs, copies = both(name, shapes=[(7,), (7,), (7,)])
    for _ in range(4):
        buffer = torch.randn(11)
        for some in (params, copies):
            for index, param in enumerate(some):
                param.grad = buffer[index * 2 : index * 2 + 7]
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def test_a_gradient_that_is_its_parameter(name):
    params, ours, theirs, copies = both(name)
    for _ in range(3):
        for param in (*params, *copies):
            param.grad = param.detach()
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def test_accumulated_gradients_stay_in_place(name):
    model = nn.Linear(5, 3)
    twin = copy.deepcopy(model)
    ours = OURS[name](model.parameters())
    theirs = TORCH[name](twin.parameters(), foreach=False)
    for step in range(6):
        inputs = torch.randn(4, 5)
        for net, optimizer in ((model, ours), (twin, theirs)):
            net(inputs).square().sum().backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=step == 3)
        assert_follows(ours, theirs, [*model.parameters()], [*twin.parameters()])


# Closures.


def test_a_closure_runs_with_gradients_and_is_gathered_after(name):
    model = nn.Linear(5, 3)
    twin = copy.deepcopy(model)
    ours = OURS[name](model.parameters())
    theirs = TORCH[name](twin.parameters(), foreach=False)
    params, copies = [*model.parameters()], [*twin.parameters()]
    inputs = torch.randn(4, 5)

    def closure_of(net, optimizer):
        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = net(inputs).square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            return loss

        return closure

    for param in params:  # stale: must not be used
        param.grad = torch.full_like(param, 100.0)
    with torch.no_grad():
        for _ in range(4):
            mine, other = ours.step(closure_of(model, ours)), theirs.step(closure_of(twin, theirs))
            torch.testing.assert_close(mine, other)
            assert mine.requires_grad
            assert not torch.is_grad_enabled()
            assert_follows(ours, theirs, params, copies)


def test_what_a_closure_returns(name):
    params, ours, *_ = both(name)
    give_gradients(params, params)
    assert ours.step() is None
    assert ours.step(lambda: None) is None
    assert ours.step(closure=lambda: 3.5) == 3.5


def test_a_closure_that_moves_everything(name):
    params, ours, theirs, copies = both(name)
    follow(ours, theirs, params, copies, 2)
    for _ in range(3):
        give_gradients(params, copies, {1})

        def closure():
            for param in params:
                param.data = param.data.clone()
            ours.param_groups[0]["maximize"] = True
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))

        theirs.param_groups[0]["maximize"] = True
        ours.step(closure)
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def test_a_closure_that_raises_changes_nothing(name):
    params, ours, *_ = both(name)
    give_gradients(params, params)
    ours.step()
    before = values(ours, params)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        ours.step(lambda: 1 / 0)
    assert torch.is_grad_enabled()
    assert_unchanged(ours, params, before)


# Autograd.


def test_a_backward_after_the_step_notices(name, device):
    params, ours, *_ = both(name, device)
    for _ in range(3):
        loss = sum((p**3).sum() for p in params)
        loss.backward(retain_graph=True)
        ours.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        ours.zero_grad()


def test_a_backward_through_a_skipped_parameter_does_not(name):
    params, ours, *_ = both(name)
    for _ in range(3):
        losses = [(p**3).sum() for p in params]
        losses[0].backward(retain_graph=True)
        ours.step()
        ours.zero_grad()
        losses[1].backward()
        params[1].grad = None


def test_an_optimizer_in_the_backward(name):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    kinds = {model: OURS[name], twin: lambda params: TORCH[name](params, foreach=False)}
    for net, kind in kinds.items():
        for param in net.parameters():
            optimizer = kind([param])

            def update(param, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            param.register_post_accumulate_grad_hook(update)
    for _ in range(4):
        inputs = torch.randn(2, 5)
        for net in kinds:
            net(inputs).square().sum().backward()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, other, rtol=2e-5, atol=2e-5)


def test_differentiable_steps(name):
    """Autograd through the step: with respect to the gradient that was used."""
    results = []
    for kind in (OURS[name], TORCH[name]):
        torch.manual_seed(0)
        start = torch.randn(5, requires_grad=True, dtype=torch.float64)
        grad = torch.randn(5, requires_grad=True, dtype=torch.float64)
        param = start.clone()
        param.grad = grad
        optimizer = kind([param], lr=0.1, differentiable=True)
        optimizer.step()
        results.append((param, *torch.autograd.grad(param.sum(), (start, grad))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_fast_path_is_taken_for_these(name):
    """Else none of the above would say anything of it."""
    _, ours, *_ = both(name)
    assert isinstance(ours, tritonopt.RMSprop | tritonopt.Rprop)
    assert "torch:" not in ours.describe()


def test_step_sizes_in_the_gradients_dtype_are_not_made_again():
    """When the layout is, because torch has yet to make another parameter's state."""
    optimizers, lists = [], []
    for kind in (OURS["Rprop"], TORCH["Rprop"]):
        params = [nn.Parameter(torch.ones(130)), nn.Parameter(torch.ones(3, 2)[:, 0])]
        params[0].grad_dtype = None
        optimizers.append(kind(params, **({"foreach": False} if optimizers else {})))
        lists.append(params)
    for step in range(3):
        for params in lists:
            params[0].grad = torch.full((130,), (-1.0) ** step, dtype=torch.bfloat16)
            params[1].grad = torch.ones(3)
        for optimizer in optimizers:
            optimizer.step()
        assert_follows(*optimizers, *lists)
        assert optimizers[0].state[lists[0][0]]["step_size"].dtype == torch.bfloat16
