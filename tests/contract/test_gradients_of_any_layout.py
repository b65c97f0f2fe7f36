"""Gradients may have any dtype and memory that torch takes; they are never written."""

import copy

import pytest
import torch
from cases import OURS, TORCH, assert_follows, follow, give_gradients, parameters, twins
from torch import nn

SHAPES = [(3, 5), (40,), (), (64,), (7,)]
OPTIONS = {"RMSprop": {"weight_decay": 0.1, "momentum": 0.9, "centered": True}, "Rprop": {}}


def both(name, device="cpu", shapes=SHAPES, **kwargs):
    params = parameters(shapes, device=device)
    return params, *twins(name, params, lr=0.05, **OPTIONS[name], **kwargs)


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


def test_a_gradient_that_is_a_parameter(name):
    params = parameters([(10,)] * 6)
    ours, theirs, copies = twins(name, params)
    for _ in range(3):
        give_gradients(params, copies)
        for some in (params, copies):
            some[1].grad = some[0].detach()
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def test_a_gradient_in_another_dtype_after_none(name):
    """Where one is missing, nothing is assumed of the dtype in which it will come."""
    params = [nn.Parameter(torch.randn(8, 6).bfloat16()) for _ in range(2)]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = OURS[name](params, lr=0.1), TORCH[name](copies, lr=0.1, foreach=False)
    for param in (*params, *copies):
        param.grad_dtype = None  # any
    whole, turned, half = torch.randn(8, 6), torch.randn(6, 8).t(), torch.randn(8, 6).bfloat16()
    for grads in ((turned, whole), (whole, None), (whole, half), (half, None), (half, whole)):
        for some in (params, copies):
            for param, grad in zip(some, grads, strict=True):
                param.grad = grad if grad is None else grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(params, copies, rtol=0.1, atol=0.1)  # torch rounds often


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
