"""Launches, below the optimizers: address tables, missing gradients, unaligned and huge tensors."""

import pytest
import torch
from conftest import DEVICES

from tritonopt import RMSprop, eager
from tritonopt.device import path

LAUNCHED = [name for name in DEVICES if path(torch.device(name))[0] == "kernel"]
if not LAUNCHED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl

from tritonopt.kernels import arithmetic, launch, update

RPROP = {
    "etaminus": 0.5, "etaplus": 1.2, "step_size_min": 1e-6, "step_size_max": 50.0,
    "maximize": False,
}  # fmt: skip

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="a compiled kernel is what it is")


@pytest.fixture(params=LAUNCHED)
def device(request):
    return torch.device(request.param)


def tensors(numels, device, dtype=torch.float32, offset=0):
    """Parameters, gradients, prev and step_size: `offset` elements into buffers of their own."""
    columns = [
        [torch.randn(n + offset, device=device, dtype=dtype)[offset:] for n in numels]
        for _ in range(4)
    ]
    columns[3] = [step_size.abs_() for step_size in columns[3]]
    return columns


def expected(params, grads, prevs, step_sizes, dtype=torch.float32):
    """The eager rule on copies; half precision in fp32, rounded once."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for group in zip(params, grads, prevs, step_sizes, strict=True):
        if group[1] is not None:
            flat = [t.to(compute, copy=True) for t in group]
            eager.rprop_(*flat, eager.Scratch(), **RPROP)
            yield flat[0].to(dtype), flat[2].to(dtype), flat[3].to(dtype)
        else:
            yield tuple(t.clone() for t in (group[0], group[2], group[3]))


def assert_updates(params, grads, prevs, step_sizes):
    dtype = params[0].dtype
    wanted = list(expected(params, grads, prevs, step_sizes, dtype))
    launch.Launch(launch.rprop_, params, [prevs, step_sizes])(grads, RPROP)
    for index, want in enumerate(wanted):
        for name, tensor, value in zip(
            ("param", "prev", "step_size"),
            (params[index], prevs[index], step_sizes[index]),
            want,
            strict=True,
        ):
            close = dtype == torch.bfloat16  # which the interpreter truncates
            rtol = torch.finfo(dtype).eps if close else 0
            torch.testing.assert_close(
                tensor, value, rtol=rtol, atol=0, msg=f"{name} of tensor {index}"
            )


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_unaligned_addresses_and_odd_sizes(dtype, offset, device):
    assert_updates(*tensors([0, 1, 3, 1023, 1024, 0, 1025, 2048, 0], device, dtype, offset))


@interpreted
@pytest.mark.parametrize("offset", [0, 1])
def test_a_masked_block_in_pieces(offset, device, monkeypatch):
    monkeypatch.setattr(update, "PIECES", tl.constexpr(4))
    assert_updates(*tensors([1, 255, 256, 257, 1023, 1024, 1025], device, offset=offset))


def test_missing_gradients_get_no_work(device):
    params, grads, prevs, step_sizes = tensors([5, 2000, 1024, 7], device)
    grads[1] = grads[3] = None
    assert_updates(params, grads, prevs, step_sizes)


def test_no_gradients_and_no_elements(device):
    params, grads, prevs, step_sizes = tensors([4, 4], device)
    before = [p.clone() for p in params]
    launch.Launch(launch.rprop_, params, [prevs, step_sizes])([None, None], RPROP)
    assert all(map(torch.equal, params, before))
    params, grads, prevs, step_sizes = tensors([0, 0], device)
    launch.Launch(launch.rprop_, params, [prevs, step_sizes])(grads, RPROP)


def test_a_table_is_uploaded_only_when_an_address_changed(device, monkeypatch):
    params, grads, prevs, step_sizes = tensors([5, 6], device)
    others = [grad.clone() for grad in grads]
    uploads = []
    read = torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda at, **kw: uploads.append(at) or read(at, **kw))
    update = launch.Launch(launch.rprop_, params, [prevs, step_sizes])
    partly = [None, others[1]]
    for chosen, count in ((grads, 1), (grads, 1), (others, 2), (grads, 2), (partly, 3)):
        update(chosen, RPROP)
        assert len(uploads) == count
    for _ in range(3 * launch.RECENT_TABLES):
        update([torch.ones_like(grad) for grad in grads], RPROP)
    assert len(update._recent) <= launch.RECENT_TABLES


def test_an_interrupt_while_a_table_is_filled(device, monkeypatch):
    params, grads, prevs, step_sizes = tensors([5, 6], device)
    update = launch.Launch(launch.rprop_, params, [prevs, step_sizes])

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(torch, "frombuffer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            update(grads, RPROP)
    want = list(expected(params, grads, prevs, step_sizes))
    update(grads, RPROP)
    assert all(torch.equal(p, w[0]) for p, w in zip(params, want, strict=True))


def test_more_than_2_to_the_31_elements(device):
    """Only the last programs run; pages that nobody touches take no memory."""
    numel, tail = 2**31 + 1500, 2500
    try:
        big = [torch.empty(numel, dtype=torch.float16, device=device) for _ in range(4)]
    except torch.OutOfMemoryError:
        pytest.skip("needs 16 GiB of the device's memory")
    small = [torch.rand(tail, device=device).half() + 0.5 for _ in big]
    for large, values in zip(big, small, strict=True):
        large[-tail:] = values
    param, grad, prev, step_size = big
    update = launch.Launch(launch.rprop_, [param], [[prev], [step_size]])
    update.programs = update.programs[-2:].clone()
    (want,) = expected(*([values] for values in small), torch.float16)
    update([grad], RPROP)
    touched = numel - int(update.programs[0] & 0xFFFFFFFF) * launch.BLOCK
    assert 1024 < touched < tail
    assert torch.equal(param[-touched:], want[0][-touched:])
    assert torch.equal(param[-tail:-touched], small[0][: tail - touched])
    assert torch.equal(step_size[-touched:], want[2][-touched:])


def fma(x, y, z):
    return (x.double() * y.double() + z.double()).float()


def on_a_gpu(param, grad, square_avg, grad_avg, buffer, kwargs):
    """RMSprop in fp32, rounded as the machine code of torch's operators for sm_90 rounds."""
    one = {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, **kwargs}
    lr, alpha = (torch.tensor(one[name]) for name in ("lr", "alpha"))
    weight = torch.tensor(1 - one["alpha"])
    if one.get("maximize"):
        grad = -grad
    if one["weight_decay"]:
        grad = fma(torch.tensor(one["weight_decay"]), param, grad)
    square_avg = fma(weight, grad * grad, square_avg * alpha)
    avg = square_avg
    if one.get("centered"):
        grad_avg = fma(weight, grad - grad_avg, grad_avg)
        avg = avg - grad_avg * grad_avg
    avg = avg.double().sqrt().float() + torch.tensor(
        one["eps"]
    )  # torch's own is 1 ulp off at times
    if one["momentum"]:
        buffer = buffer * torch.tensor(one["momentum"]) + grad / avg
        return fma(-lr, buffer, param), square_avg, grad_avg, buffer
    return fma(-lr, grad / avg, param), square_avg, grad_avg, buffer


GPU_ORDERS = [
    {}, {"weight_decay": 0.1, "maximize": True}, {"centered": True}, {"momentum": 0.9},
    {"centered": True, "momentum": 0.9, "weight_decay": 0.01, "alpha": 0.7},
]  # fmt: skip


@interpreted
@pytest.mark.parametrize("kwargs", GPU_ORDERS, ids=str)
def test_the_order_of_gpu_operators(kwargs, monkeypatch):
    monkeypatch.setattr(arithmetic, "AS_ON_CPU", tl.constexpr(False))
    param = torch.nn.Parameter(torch.randn(3000))
    optimizer = RMSprop([param], **kwargs)
    missing = torch.zeros(3000)
    for _ in range(5):
        param.grad = torch.randn(3000)
        entry = optimizer.state[param]
        keys = ("square_avg", "grad_avg", "momentum_buffer")
        before = [entry.get(key, missing).clone() for key in keys]
        wanted = on_a_gpu(param.detach().clone(), param.grad, *before, kwargs)
        optimizer.step()
        assert torch.equal(param, wanted[0])
        for key, value in zip(keys, wanted[1:], strict=True):
            assert key not in entry or torch.equal(entry[key], value), key
