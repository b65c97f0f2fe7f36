"""`fused_amp` and `max_grad_norm` inside the step equal the separate passes over the gradients."""

import copy
import pickle

import pytest
import torch
from cases import OURS, TORCH, give_gradients, parameters

from tritonopt.device import path

LIMIT = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Relative: the factor of a clipped gradient is rounded once less than in two passes."""


def pair(name, device="cpu", dtype=torch.float32, **options):
    """One optimizer with the options and one without, two groups each."""
    params = parameters(dtype=dtype, device=device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    groups = [[{"params": ps[:4]}, {"params": ps[4:], "lr": 0.003}] for ps in (params, copies)]
    return OURS[name](groups[0], **options), params, OURS[name](groups[1]), copies


def assert_close(ours, params, theirs, copies, limit):
    for param, twin in zip(params, copies, strict=True):
        torch.testing.assert_close(param, twin, rtol=limit, atol=limit)
        for key, value in theirs.state[twin].items():
            mine = ours.state[param][key].to(value.device)
            torch.testing.assert_close(mine, value, rtol=limit, atol=limit, msg=key)


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e4])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_clipping(name, dtype, max_grad_norm, device):
    ours, params, theirs, copies = pair(name, device, dtype, max_grad_norm=max_grad_norm)
    for step in range(5):
        give_gradients(params, copies, missing={step})
        before = [None if p.grad is None else p.grad.clone() for p in params]
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(copies, max_grad_norm)
        theirs.step()
        torch.testing.assert_close(ours.grad_norm, norm, rtol=LIMIT[dtype], atol=0)
        for param, grad in zip(params, before, strict=True):
            assert grad is None if param.grad is None else torch.equal(param.grad, grad)
        assert_close(ours, params, theirs, copies, LIMIT[dtype] * 10)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_amp(name, max_grad_norm, device):
    """A scale that is no power of two, and infinite gradients at every third step."""
    options = {"fused_amp": True, "max_grad_norm": max_grad_norm}
    ours, params, theirs, copies = pair(name, device, **options)
    scalers = [torch.amp.GradScaler(device.type, init_scale=1000.0) for _ in range(2)]
    for step in range(6):
        for scaler in scalers:
            scaler.scale(torch.zeros((), device=device))  # makes its scale
        give_gradients(params, copies)
        if step % 3 == 1:
            params[-1].grad[0] = copies[-1].grad[0] = torch.inf
        scalers[1].unscale_(theirs)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(copies, max_grad_norm)
        for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_close(ours, params, theirs, copies, 1e-5)
    assert {float(ours.state[p]["step"]) for p in params} == {4.0}


OPTIONS = [
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("RMSprop", {"bias_correction": True}),
    ("RMSprop", {"bias_correction": True, "centered": True, "initial_scale": 0.5}),
    ("RMSprop", {"initial_scale": 1.0, "eps_in_sqrt": True}),
    ("Rprop", {}),
    ("Rprop", {"variant": "rprop+"}),
    ("Rprop", {"variant": "irprop+"}),
    ("Rprop", {"lr": torch.tensor(0.5)}),
]


@pytest.mark.parametrize("constant", [False, True], ids=["warm-up", "constant lr"])
@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_skipped_steps_leave_no_trace(name, options, constant, device):
    """As GradScaler without the fused protocol, which does not call `step` at all.

    The first two steps are skipped, while the learning rate changes: Rprop's step sizes start from
    that of the third, or, where a gradient comes late, of the fourth.
    """
    params = parameters([(5,), (1024,), (33,)], device=device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    both = [
        OURS[name](some, **options, fused_amp=fused)
        for some, fused in ((params, True), (copies, False))
    ]
    scalers = [torch.amp.GradScaler(device.type, init_scale=1024.0) for _ in both]
    losses = iter([3.0, 2.0, 5.0, 4.0, 6.0, 1.0, 2.0, 0.5])
    for step in range(8):
        for scaler in scalers:
            scaler.scale(torch.zeros((), device=device))
        give_gradients(params, copies, missing={2} if step < 3 else {})
        if step == 1:
            params[1].data = params[1].data.clone()  # all is laid out again
        if step in (0, 1, 4):
            params[0].grad[0] = copies[0].grad[0] = torch.inf
        loss = next(losses)
        for scaler, optimizer in zip(scalers, both, strict=True):
            for group in optimizer.param_groups:
                rate = 0.1 if constant else 0.1 * (step + 1)
                group["lr"] = torch.tensor(rate) if "lr" in options else rate
            scaler.step(optimizer, lambda loss=loss: loss)
            scaler.update()
        for param, twin in zip(params, copies, strict=True):
            assert torch.equal(param, twin), step
            for key, value in both[1].state[twin].items():
                # before the first step, a step size is whatever a skipped one made it
                if key != "step_size" or both[1].state[twin]["step"] > 0:
                    assert torch.equal(both[0].state[param][key].to(value), value), (step, key)
        groups = [
            {k: v for k, v in o.param_groups[0].items() if k not in ("params", "lr")} for o in both
        ]
        assert groups[0] == groups[1]
    assert [float(both[0].state[p]["step"]) for p in params] == [5.0, 5.0, 4.0]


def test_infinite_gradients_without_waiting(name, device):
    """What a kernel sees of a skipped step: nothing changes, no step is counted."""
    ours, params, theirs, copies = pair(name, device, fused_amp=True)
    give_gradients(params, copies)
    for optimizer in (ours, theirs):
        optimizer.step()  # makes state: that step asks the host
    give_gradients(params, copies)
    ours.grad_scale, ours.found_inf = torch.ones((), device=device), torch.ones((), device=device)
    ours.step()
    assert_close(ours, params, theirs, copies, 0.0)


def test_state_that_was_only_skipped_is_unused_in_copies(device):
    """What a kernel counts of a skipped step is nothing: not even the sign of 0 changes."""
    (param,) = parameters([(5,)], device=device)
    ours = OURS["Rprop"]([param], lr=0.1, fused_amp=True)
    param.grad = torch.ones(5, device=device)
    ours.grad_scale, ours.found_inf = torch.ones((), device=device), torch.ones((), device=device)
    ours.step()
    copied = copy.deepcopy(ours)
    (mine,) = copied.param_groups[0]["params"]
    copied.param_groups[0]["lr"] = 0.3
    mine.grad = torch.ones(5, device=device)
    copied.grad_scale = copied.found_inf = None
    copied.step()
    assert torch.equal(copied.state[mine]["step_size"], torch.full((5,), 0.3, device=device))


def test_what_is_left_to_torch(name):
    ours, params, theirs, copies = pair(name, max_grad_norm=0.5)
    for group in (*ours.param_groups, *theirs.param_groups):
        group["foreach"] = False
    give_gradients(params, copies)
    grads = [p.grad for p in params]
    ours.step()
    torch.nn.utils.clip_grad_norm_(copies, 0.5)
    theirs.step()
    assert_close(ours, params, theirs, copies, 1e-6)
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_the_options(name, copied):
    optimizer = copied(OURS[name](parameters(), fused_amp=True, max_grad_norm=2.0))
    assert optimizer.max_grad_norm == 2.0 and optimizer._step_supports_amp_scaling
    assert "max_grad_norm" not in optimizer.state_dict()["param_groups"][0]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "1", [1.0], torch.ones(2)])
def test_wrong_norms(name, value):
    """Given to the constructor, or set later."""
    with pytest.raises(ValueError, match="Invalid max_grad_norm value"):
        OURS[name](parameters(), max_grad_norm=value)
    optimizer = OURS[name](parameters(), max_grad_norm=1.0)
    optimizer.max_grad_norm = value
    with pytest.raises(ValueError, match="Invalid max_grad_norm value"):
        optimizer.step()


@pytest.mark.parametrize(
    "option", [{"max_grad_norm": 1.0}, {"fused_amp": True}, {"compile": True}], ids=str
)
def test_not_of_one_group(name, option):
    """Where it would be shown and have no effect."""
    group = {"params": parameters(), **option}
    with pytest.raises(ValueError, match="concerns all param groups"):
        OURS[name]([group])
    optimizer = OURS[name](parameters())
    with pytest.raises(ValueError, match="concerns all param groups"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_differentiable_is_refused(name):
    with pytest.raises(RuntimeError, match="`fused_amp` does not support `differentiable`"):
        OURS[name](parameters(), fused_amp=True, differentiable=True)


def test_differentiable_through_clipping(name):
    """With respect to the gradient, which counts a factor that is taken as a constant."""
    found = []
    for kind, options, factor in (
        (OURS[name], {"max_grad_norm": 0.5}, 1.0),
        (TORCH[name], {}, 0.5 / (torch.tensor([3.0, 4.0]).norm() + 1e-6)),
    ):
        x = torch.tensor([3.0, 4.0], requires_grad=True)
        param = torch.ones(2, requires_grad=True).clone()
        param.grad = x * factor
        options = {**options, **({"eps": 0.1} if name == "RMSprop" else {})}
        kind([param], lr=0.1, differentiable=True, **options).step()
        found.append((param, *torch.autograd.grad(param.sum(), x)))
    torch.testing.assert_close(*found)


def test_no_option_no_protocol(name):
    assert not hasattr(OURS[name](parameters()), "_step_supports_amp_scaling")


def test_a_compiled_step_scales_and_clips(name):
    """:meth:`compile` is for the rule alone: around it, everything is as before."""
    ours, params, theirs, copies = pair(name, fused_amp=True, max_grad_norm=0.5)
    ours.compile(backend="eager")
    for _ in range(2):
        give_gradients(params, copies)
        torch.nn.utils.clip_grad_norm_(copies, 0.5)
        ours.step()
        theirs.step()
        assert_close(ours, params, theirs, copies, 1e-5)


def test_a_norm_over_groups_is_one_launch(name, device):
    """In kernels; the same gradients give the same bits, wherever the groups begin."""
    if path(device)[0] != "kernel":
        pytest.skip("no kernels here")
    from tritonopt.kernels import launch

    launched = []
    original = launch.Grid.launch

    def recorded(self, kernel, *args):
        launched.append(kernel)
        original(self, kernel, *args)

    ours, params, _, copies = pair(name, device, max_grad_norm=0.5)
    other = OURS[name](copies, max_grad_norm=0.5)
    give_gradients(params, copies)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Grid, "launch", recorded)
        ours.step()
        other.step()
    assert launched.count(launch.square_sum_kernel) == 2
    assert torch.equal(ours.grad_norm, other.grad_norm)


def test_a_group_without_parameters(name):
    """torch allows one; it has no device to put a norm on."""
    (param,) = parameters([(3,)])
    optimizer = OURS[name]([{"params": []}, {"params": [param]}], max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 0
    param.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(3.0).sqrt())


def test_loaded_steps_count_where_skips_are_known(name):
    """A checkpoint's `step` lies on the CPU, a skip on the device: no step may wait for it."""
    (param,) = parameters([(3,)])
    param.grad = torch.ones(3)
    writer = TORCH[name]([param])
    writer.step()
    there = torch.nn.Parameter(torch.ones(3, device="meta"))
    reader = OURS[name]([there], fused_amp=True)
    reader.load_state_dict(writer.state_dict())
    assert reader.state[there]["step"].device == there.device
    assert writer.state[param]["step"].is_cpu


def test_the_norm_of_scaled_gradients_in_half_precision(name):
    """It may be beyond what half precision can hold where none of the gradients is."""
    params = parameters([(100,)] * 4, torch.float16)
    optimizer = OURS[name](params, fused_amp=True, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(torch.ones(1))
    before = copy.deepcopy(params)
    for param in params:
        param.grad = torch.full((100,), 1.9 * 2**14).half()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(38.0), rtol=1e-3, atol=0)
    assert not any(torch.equal(*pair) for pair in zip(params, before, strict=True))
