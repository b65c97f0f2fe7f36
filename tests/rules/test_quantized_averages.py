"""Averages in 8 bits over many steps: they go where torch's go, though a step moves them by less
than codes lie apart."""

import pytest
import torch
from cases import SHAPES

import tritonopt
from tritonopt.device import INTERPRET
from tritonopt.precision import Noise, origin
from tritonopt.quantized import BLOCK, CODE, SCALE, decoded, encoded

COUNT, STEPS = 4 * BLOCK, 60 if INTERPRET else 1000


def trained(gradients, **options):
    """The optimizer, its state, and torch's average of squares after the same gradients."""
    averages = []
    for kind, more in ((tritonopt.RMSprop, {"quantized": True}), (torch.optim.RMSprop, {})):
        param = torch.nn.Parameter(torch.zeros(COUNT))
        optimizer = kind([param], **more, **options)
        for step in range(STEPS):
            param.grad = gradients(step)
            optimizer.step()
        entry = optimizer.state_dict()["state"][0]
        averages.append(entry["square_avg"])
    return averages


def beside(value, greatest):
    """A gradient in which each block has an element that is greater."""
    grad = torch.full((COUNT,), value)
    grad[::BLOCK] = greatest
    return grad


WAYS = {
    "fall": lambda step: beside(1.0 if step < 5 else 1e-3, 1.0),
    "grow": lambda step: beside(1.0 if step < 5 else 2.3, 100.0),
    "stay": lambda step: beside(0.37, 1.0),
}


@pytest.mark.parametrize("alpha", [0.9] if INTERPRET else [0.9, 0.99, 0.999])
@pytest.mark.parametrize("way", WAYS)
def test_averages_go_where_those_of_torch_go(way, alpha):
    ours, theirs = trained(WAYS[way], alpha=alpha)
    small = torch.arange(COUNT) % BLOCK > 0
    found, wanted = ours[small].double(), theirs[small].double()
    # Each differs by chance; their mean is that of a thousand.
    assert abs(float(found.mean() / wanted.mean()) - 1) < 0.03
    torch.testing.assert_close(ours[~small], theirs[~small], rtol=1e-5, atol=0)


def test_roots_under_random_gradients():
    grads = [torch.randn(COUNT) for _ in range(STEPS)]
    ours, theirs = trained(lambda step: grads[step])
    ratio = (ours / theirs).sqrt()
    assert abs(float(ratio.mean()) - 1) < 0.02
    assert float(((ratio - 1).abs() < 0.15).float().mean()) > 0.85
    assert float((ratio - 1).abs().max()) < 0.5


def test_codes_are_right_on_average():
    """Over all random bits that there are."""
    noise = torch.arange(2**16, dtype=torch.int32)
    for value in (0.9999, 0.7, 2**-0.125, 3.3e-4, 2**-31.5):
        square_avg = torch.full((2**16,), value)
        square_avg[:: BLOCK // 2] = 1.0
        code, scale = encoded(square_avg, noise)
        below = torch.arange(2**16) % (BLOCK // 2) > 0
        found = decoded(code, scale)
        assert abs(float(found[below].double().mean()) / value - 1) < 1e-5
        assert (found[~below] == 1).all() and len({*code[below].tolist()}) <= 2


PATHS = ["step", "lone"] if INTERPRET else ["step", "compile()", "lone"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_all_paths_draw_the_same_codes(path, dtype, anywhere):
    """Those of the bits of seed, step, place and element."""
    shapes = [*SHAPES, *[(3,), (256,), (300,), (511,)] * 3, (2500,)]  # small ones are together
    params = [torch.nn.Parameter(torch.zeros(s, dtype=dtype, device=anywhere)) for s in shapes]
    optimizer = tritonopt.RMSprop(params, lr=0.5, alpha=0.75, quantized=True, rounding_seed=7)
    if path == "compile()":
        optimizer.compile()
    before = [torch.zeros(param.numel()) for param in params]
    for step in range(1, 4):
        optimizer.zero_grad()
        for param in params[-1:] if path == "lone" else params[step % 3 :: step]:
            param.grad = torch.randn_like(param)
        optimizer.step()
        for index, param in enumerate(params):
            if param.grad is None or not param.numel():
                continue
            found = optimizer.state[param]
            noise = Noise(7, [origin(0, index, param)], float(found["step"]), False)
            bits = noise.of([0], [param.numel()], 0, 1)
            grad = param.grad.float().flatten().cpu()
            code, scale = encoded(before[index] * 0.75 + (grad * grad) * 0.25, bits)
            torch.testing.assert_close(found[SCALE].cpu(), scale, rtol=1e-6, atol=0)
            same = found[CODE].flatten().cpu() == code
            assert same.float().mean() > 0.99  # the average may be off by an ulp
            before[index] = decoded(found[CODE].flatten().cpu(), found[SCALE].cpu())


def test_bf16_is_rounded_at_random_only_where_that_is_asked_for(anywhere):
    ends = []
    for options in ({}, {"stochastic_rounding": True}):
        param = torch.nn.Parameter(torch.ones(3000, dtype=torch.bfloat16, device=anywhere))
        optimizer = tritonopt.RMSprop([param], lr=1e-5, quantized=True, **options)
        param.grad = torch.ones_like(param)
        optimizer.step()
        ends.append(param.detach().float().cpu())
    assert len(ends[0].unique()) == 1  # the update, 1e-4, is far below a place of bf16
    assert 0.005 < float((ends[1] < 1).float().mean()) < 0.1 and len(ends[1].unique()) == 2


def test_a_seed_is_of_codes_alone():
    codes = []
    for seed in (0, 1, 1):
        param = torch.nn.Parameter(torch.zeros(3000))
        optimizer = tritonopt.RMSprop([param], quantized=True, rounding_seed=seed)
        param.grad = torch.linspace(-1, 1, 3000)
        optimizer.step()
        codes.append(optimizer.state[param][CODE])
    assert torch.equal(codes[1], codes[2]) and not torch.equal(codes[0], codes[1])
    with pytest.raises(ValueError, match="or quantized=True"):
        tritonopt.RMSprop([param], rounding_seed=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_draws_new_bits_at_each_replay(dtype):
    params, copies = (
        [torch.nn.Parameter(torch.zeros(n, dtype=dtype, device="cuda")) for n in (5, 1500)]
        for _ in range(2)
    )
    options = {"quantized": True, "capturable": True, "stochastic_rounding": dtype != torch.float32}
    captured, eager = (tritonopt.RMSprop(some, **options) for some in (params, copies))
    for param, copy in zip(params, copies, strict=True):
        param.grad = torch.randn_like(param)
        copy.grad = param.grad.clone()
    captured.step(), eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(5):
        graph.replay(), eager.step()
        for param, copy in zip(params, copies, strict=True):
            assert torch.equal(param, copy)
            assert torch.equal(captured.state[param][CODE], eager.state[copy][CODE])


def test_an_infinite_block_does_not_depend_on_what_is_updated_beside(anywhere):
    ends = []
    for count in (1, 4, 6):
        params = [torch.nn.Parameter(torch.ones(64, device=anywhere)) for _ in range(count)]
        optimizer = tritonopt.RMSprop(params, quantized=True, compile=not INTERPRET and count == 6)
        for step in range(4):
            for param in params:
                param.grad = torch.ones_like(param)
            if step == 0:
                params[0].grad[3] = 1e25
            optimizer.step()
        ends.append((params[0].detach(), optimizer.state[params[0]][SCALE]))
    for end in ends:
        torch.testing.assert_close(end, ends[0])
        assert end[0].isfinite().all() and end[1].isinf().all()


def test_no_longer_quantized_in_half_precision():
    params = [torch.nn.Parameter(torch.randn(300).bfloat16()) for _ in range(3)]
    optimizer = tritonopt.RMSprop(params, quantized=True, momentum=0.9, bias_correction=True)
    for quantized in (True, False):
        optimizer.param_groups[0]["quantized"] = quantized
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    entry = optimizer.state[params[0]]
    assert entry["square_avg"].dtype == entry["momentum_buffer"].dtype == torch.bfloat16
