"""`RMSprop(cautious=True)`: what disagrees with the gradient's sign stays put, the rest goes on."""

import copy

import pytest
import torch
from cases import SHAPES, give_gradients, parameters
from foreign_cases import timm_rmsprop_tf
from variant_cases import random_starts, train, trained

import tritonopt
from tritonopt import sweep


def by_hand_(param, grad, state, *, lr=0.01, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.9,
             maximize=False, centered=False, eps_in_sqrt=False, lr_in_momentum=False,
             nesterov=False, decoupled_weight_decay=False, bias_correction=False):  # fmt: skip
    """The rule over a whole tensor. `state`: square_avg, grad_avg, momentum_buffer, step."""
    square_avg, grad_avg, buffer, count = state
    count += 1
    grad = -grad if maximize else grad
    if decoupled_weight_decay:
        param *= 1 - lr * weight_decay
    else:
        grad = grad + weight_decay * param
    square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    grad_avg.lerp_(grad, 1 - alpha)
    avg = square_avg - grad_avg**2 if centered else square_avg
    if bias_correction:
        avg = avg / (1 - alpha**count)
    avg = (avg + eps).sqrt() if eps_in_sqrt else avg.sqrt() + eps
    summand = grad / avg * (lr if lr_in_momentum else 1)
    buffer.mul_(momentum).add_(summand)
    update = momentum * buffer + summand if nesterov else buffer
    mask = (update * grad > 0).to(param.dtype)
    param -= update * (mask / mask.mean().clamp(min=1e-3)) * (1 if lr_in_momentum else lr)


OPTIONS = {
    "plain": {},
    "lr in momentum": {"lr_in_momentum": True},
    "nesterov": {"nesterov": True},
    "nesterov, lr in momentum": {"nesterov": True, "lr_in_momentum": True},
    "l2": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps_in_sqrt": True},
    "centered": {"centered": True, "eps": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "bias correction": {"bias_correction": True, "alpha": 0.9},
}


class ByHand:
    def __init__(self, params, **options):
        self.params, self.options = params, options
        self.states = [[*(torch.zeros_like(p) for _ in "vgb"), p.new_zeros(())] for p in params]

    @torch.no_grad()
    def step(self):
        for param, state in zip(self.params, self.states, strict=True):
            if param.grad is not None:
                by_hand_(param, param.grad, state, **self.options)


class Op:
    """Steps with `torch.ops.tritonopt.rmsprop_`, in a graph of its own."""

    def __init__(self, params, centered=False, **options):
        self.params, self.options, self.centered = params, options, centered
        self.states = [[torch.zeros_like(p) for p in params] for _ in "vgb"]
        self.states.append([torch.zeros(()) for _ in params])

    @torch.no_grad()
    def step(self):
        some = [i for i, p in enumerate(self.params) if p.grad is not None]
        params, *states = ([c[i] for i in some] for c in (self.params, *self.states))
        states[1] = states[1] if self.centered else []
        grads = [p.grad for p in params]
        params = [p.detach() for p in params]
        torch.ops.tritonopt.rmsprop_(params, grads, *states, cautious=True, **self.options)


def make(path, params, **options):
    options = {"momentum": 0.9, **options}
    if path == "op":
        return Op(params, **options)
    return tritonopt.RMSprop(params, cautious=True, compile=path == "compile()", **options)


def copies_of(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("path", ["step", "compile()", "op"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_rule(options, path, device):
    """Scalars, empty ones, neighbours, large ones, of any strides; some without gradients."""
    params = [*parameters(SHAPES, device=device), *parameters([(7, 9), (40,)], device=device)]
    params[-2].data = params[-2].data.t()
    copies = copies_of(params)
    ours, theirs = make(path, params, **options), ByHand(copies, **options)
    for step in range(4):
        give_gradients(params, copies, {step, step + 4} if step else ())
        ours.step()
        theirs.step()
        torch.testing.assert_close(params, copies, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("lr_in_momentum", [True, False], ids=["", "lr apart"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("decoupled", [False, True], ids=["l2", "decoupled"])
def test_timm(decoupled, momentum, lr_in_momentum, monkeypatch):
    common = {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "momentum": momentum}
    common["lr_in_momentum"] = lr_in_momentum
    param = torch.nn.Parameter(random_starts())
    make = timm_rmsprop_tf(monkeypatch)
    train(make([param], caution=True, decoupled_decay=decoupled, **common), [param])
    options = {"eps_in_sqrt": True, "initial_scale": 1.0, "decoupled_weight_decay": decoupled}
    ours = trained("RMSprop", random_starts(), cautious=True, **options, **common)
    torch.testing.assert_close(ours, param.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"nesterov": True, "weight_decay": 0.1}], ids=str)
def test_a_tensor_in_pieces_has_one_mean(options, dtype, monkeypatch):
    params = parameters([(5000,), (3, 11), (64,)], dtype)
    params[0].grad = torch.randn_like(params[0])
    params[0].grad[:100].abs_()  # a piece that agrees more than others
    copies = copies_of(params)
    ours = [make("step", params, **options)]
    monkeypatch.setattr(sweep, "PIECE", 64)
    ours.append(make("step", copies, **options))
    for _ in range(3):
        give_gradients(params, copies)
        for optimizer, piece in zip(ours, (2**19, 64), strict=True):
            monkeypatch.setattr(sweep, "PIECE", piece)
            optimizer.step()
        assert all(map(torch.equal, params, copies))


PRECISION = {
    "bf16": {},
    "fp32 state": {"state_dtype": torch.float32},
    "split": {"master": "split"},
    "stochastic": {"stochastic_rounding": True, "rounding_seed": 3},
}


@pytest.mark.parametrize("path", ["step", "compile()"])
@pytest.mark.parametrize("options", PRECISION.values(), ids=PRECISION)
def test_half_precision(options, path, anywhere):
    """The mask is that of fp32, before anything is rounded."""
    params = parameters([(3000,), (5, 3), ()], torch.bfloat16, anywhere)
    copies = [torch.nn.Parameter(p.detach().float()) for p in params]
    ours, theirs = make(path, params, **options), ByHand(copies)
    for step in range(3):
        for param, twin in zip(params, copies, strict=True):
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.float()
        ours.step()
        theirs.step()
        if not step:  # later, a rounded buffer may have another sign than one that is not
            limits = {"rtol": 2**-7, "atol": 1e-4}
            torch.testing.assert_close([p.float() for p in params], copies, **limits)
    error = sum((p.float() - c).abs().mean() for p, c in zip(params, copies, strict=True))
    assert error < 0.03


def test_clipped_scaled_and_skipped(device):
    params = parameters([(40,), (3, 5), (2000,)], device=device)
    copies = copies_of(params)
    ours = make("step", params, max_grad_norm=0.5, fused_amp=True, capturable=device.type == "cuda")
    theirs = ByHand(copies)
    ours.grad_scale, ours.found_inf = (torch.tensor(x, device=device) for x in (8.0, 0.0))
    for step in range(4):
        give_gradients(params, copies)
        torch._foreach_mul_([p.grad for p in params], 8.0)
        before = copy.deepcopy([params, [*ours.state.values()]])
        ours.found_inf.fill_(step == 2)
        ours.step()
        if step == 2:
            after = [params, [*ours.state.values()]]
            torch.testing.assert_close(after, before, rtol=0, atol=0)
            continue
        torch.nn.utils.clip_grad_norm_(copies, 0.5)
        theirs.step()
        torch.testing.assert_close(params, copies, rtol=2e-5, atol=2e-6)


def test_without_agreement_nothing_moves():
    """The mean of the mask counts as 0.001 at the least; a NaN is no agreement, and stays one."""
    (param,) = params = parameters([(4,)])
    ours = make("step", params)
    param.grad = torch.tensor([1.0, 1.0, 1.0, torch.nan])
    ours.step()
    before = param.detach().clone()
    param.grad = torch.tensor([-1e-3, -1e-3, -1e-3, 1.0])
    ours.step()
    assert torch.equal(param[:3], before[:3]) and param[3].isnan()
