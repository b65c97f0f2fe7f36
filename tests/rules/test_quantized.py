"""`RMSprop(quantized=True)`: averages of squares in 8 bits, as exact as their code."""

from copy import deepcopy

import pytest
import torch
from cases import SHAPES
from precision_cases import give

import tritonopt
from tritonopt.device import INTERPRET
from tritonopt.precision import joined
from tritonopt.quantized import (
    BLOCK,
    BOUNDS,
    CODE,
    MIDDLES,
    POWERS,
    SCALE,
    blocks,
    decoded,
    encoded,
)

CODES_APART = 2 ** (1 / 8) * (1 + 1e-5)  # by which factor an average is rounded at most
NEAREST = 2 ** (1 / 16) * (1 + 1e-5)  # and when it is loaded
PATHS = ["step", "op"] if INTERPRET else ["step", "compile()", "op"]


def leaves(tensors, dtype=torch.float32):
    return [tensor.detach().clone().to(dtype).requires_grad_() for tensor in tensors]


def average(entry):
    code = entry[CODE].detach()
    flat = decoded(code.as_strided((code.numel(),), (1,)).cpu(), entry[SCALE].cpu())
    return torch.empty_like(code, dtype=torch.float32, device="cpu").copy_(
        flat.as_strided(code.size(), code.stride())
    )


def test_the_code():
    assert len(POWERS) == 256 and POWERS[0] == 0 and POWERS[255] == 1 and POWERS[1] == 2**-31.75
    assert (POWERS[2:] > POWERS[1:-1]).all() and len(MIDDLES) == 254 and len(BOUNDS) == 7
    x = torch.cat([torch.rand(5000) ** 9, torch.tensor([0.0, 1e-45, 1e-38, 3e38]).repeat(64)])
    code, scale = encoded(x)
    assert code.dtype == torch.uint8 and len(scale) == blocks(len(x)) == -(-len(x) // BLOCK)
    back = decoded(code, scale)
    least = scale.repeat_interleave(BLOCK)[: len(x)] * 2**-31.75
    near = x >= least
    assert ((back / x)[near] < NEAREST).all() and ((x / back)[near] < NEAREST).all()
    assert torch.equal(back[~near & (x > 0)], least[~near & (x > 0)])  # never less than it was
    assert (back[x == 0] == 0).all()
    again = encoded(back)
    assert torch.equal(again[0], code) and torch.equal(again[1], scale)


OPTIONS = [
    {"lr": 1e-3},
    {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "lr_in_momentum": True, "eps_in_sqrt": True, "initial_scale": 1.0},
    {"bias_correction": True, "alpha": 0.9},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_each_step_is_that_of_fp32_within_the_code(path, options, dtype, anywhere):
    """From what the codes say: the average becomes one of two, all else is exact."""
    shapes = [*SHAPES, (3001,), (2500 if INTERPRET or len(options) > 1 else 2**19 + 300,)]
    params = leaves([torch.randn(shape, device=anywhere) for shape in shapes], dtype)
    transposed = torch.randn(40, 50, device=anywhere).t()
    params.append(leaves([transposed], dtype)[0])
    ours = tritonopt.RMSprop(params, quantized=True, **options)
    if path == "compile()":
        ours.compile()
    for step in range(3):
        grads = [torch.randn_like(p) * torch.rand_like(p) ** 2 for p in params]
        if step:
            grads[step] = None
        singles = leaves(params)
        theirs = tritonopt.RMSprop(singles, **options)  # which other tests compare with torch
        for param, single in zip(params, singles, strict=True):
            if ours.state.get(param):
                entry = {k: v.clone().float() for k, v in ours.state[param].items()}
                entry["square_avg"] = average(ours.state[param]).to(anywhere)
                theirs.state[single] = {k: v for k, v in entry.items() if k not in (CODE, SCALE)}
        give(grads, params, singles)
        theirs.step()
        if path == "op" and step:
            by_op(ours, params, options)
        else:
            ours.step()
        for param, single, grad in zip(params, singles, grads, strict=True):
            if grad is None or not param.numel():
                continue
            entry, wanted = ours.state[param], theirs.state[single]
            assert entry[CODE].dtype == torch.uint8 and "square_avg" not in entry
            found, exact = average(entry).to(anywhere), wanted["square_avg"]
            greatest = entry[SCALE].max()
            torch.testing.assert_close(greatest, exact.max(), rtol=1e-5, atol=0)
            near = exact > greatest * 2**-31
            ratio = (found / exact)[near]
            assert (ratio < CODES_APART).all() and (ratio > 1 / CODES_APART).all()
            close = {"rtol": 1e-3, "atol": 1e-3}  # where an average is next to 0
            if dtype == torch.bfloat16:
                close = {"rtol": 2**-7, "atol": 1e-2}
            torch.testing.assert_close(param.detach().float(), single.detach(), **close)


def by_op(optimizer, params, options):
    given = [param for param in params if param.grad is not None and param.numel()]
    state = [optimizer.state[param] for param in given]
    buffers = [entry["momentum_buffer"] for entry in state] if "momentum" in options else []
    scales = [entry[SCALE] for entry in state]
    hyper = {key: value for key, value in options.items() if key != "initial_scale"}
    with torch.no_grad():
        torch.ops.tritonopt.rmsprop_(
            given, [param.grad for param in given], [entry[CODE] for entry in state], [], buffers,
            [entry["step"] for entry in state], None, scales, **{"lr": 0.01, **hyper},
        )  # fmt: skip


def test_with_two_halves(anywhere):
    """An fp32 parameter in 4 bytes, with 1 of state: as with fp32 parameters, to the last bit."""
    start = [torch.randn(shape, device=anywhere).bfloat16() for shape in SHAPES]
    halves, singles = leaves(start, torch.bfloat16), leaves(start)
    ours = tritonopt.RMSprop(halves, quantized=True, master="split")
    theirs = tritonopt.RMSprop(singles, quantized=True)
    for _ in range(4):
        give([torch.randn_like(half) for half in halves], halves, singles)
        ours.step()
        theirs.step()
    for half, single in zip(halves, singles, strict=True):
        entry = ours.state[half]
        whole = joined(half.detach().cpu(), entry["remainder"].cpu())
        assert torch.equal(whole, single.detach().cpu())
        assert torch.equal(entry[CODE], theirs.state[single][CODE])


def test_training_goes_where_that_of_fp32_goes():
    torch.manual_seed(1)
    x, target = torch.randn(64, 20), torch.randn(64, 1)
    ends = []
    few = {"lr": 1e-2} if INTERPRET else {"lr": 1e-3}
    for options in (few, {**few, "quantized": True}):
        torch.manual_seed(2)
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
        )
        optimizer = tritonopt.RMSprop(model.parameters(), **options)
        for _ in range(25 if INTERPRET else 150):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert max(ends) < (0.15 if INTERPRET else 0.03) < 0.5 < float(target.square().mean())


def test_clipping_and_skipped_steps(anywhere):
    params = leaves([torch.randn(3000, device=anywhere)])
    copies = leaves(params)
    ours = tritonopt.RMSprop(params, quantized=True, max_grad_norm=1.0, fused_amp=True)
    theirs = tritonopt.RMSprop(copies, quantized=True)
    grad = torch.randn(3000, device=anywhere)
    for skip in (1.0, 0.0, 1.0):
        give([grad * 4], params)
        ours.grad_scale = torch.full((), 4.0, device=anywhere)
        ours.found_inf = torch.full((), skip, device=anywhere)
        ours.step()
    torch.nn.utils.clip_grad_norm_([give([grad], copies) or copies[0]], 1.0)
    theirs.step()
    torch.testing.assert_close(params[0], copies[0])
    torch.testing.assert_close(average(ours.state[params[0]]), average(theirs.state[copies[0]]),
                               rtol=0.1, atol=0)  # fmt: skip
    assert float(ours.state[params[0]]["step"]) == 1


def train(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        give([torch.randn(param.shape, generator=generator) for param in params], params)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_resumed(way, dtype):
    """A checkpoint has torch's key, in fp32: its codes are found again, to the last bit."""
    params = leaves([torch.randn(shape) for shape in SHAPES], dtype)
    optimizer = tritonopt.RMSprop(params, quantized=True, momentum=0.9)
    train(params, optimizer, range(3))
    if way == "deepcopy":
        copies, other = deepcopy((params, optimizer))
    else:
        copies = leaves(params, dtype)
        other, saved = tritonopt.RMSprop(copies), deepcopy(optimizer.state_dict())
        entry = saved["state"][3]
        assert entry.keys() == {"step", "square_avg", "momentum_buffer"}
        assert entry["square_avg"].dtype == torch.float32
        other.load_state_dict(saved)
    train(params, optimizer, range(3, 6))
    train(copies, other, range(3, 6))
    for param, copy in zip(params, copies, strict=True):
        assert torch.equal(param, copy)
        for key, value in optimizer.state[param].items():
            assert torch.equal(other.state[copy][key], value)


def test_from_torch_and_to_it():
    params = leaves([torch.randn(shape) for shape in SHAPES])
    theirs = torch.optim.RMSprop(params, foreach=None)
    train(params, theirs, range(2))
    ours = tritonopt.RMSprop(params, quantized=True)
    ours.load_state_dict(deepcopy(theirs.state_dict()))
    train(params, ours, range(2, 4))
    assert all(float(ours.state[param]["step"]) == 4 for param in params)
    assert ours.state[params[3]].keys() == {"step", CODE, SCALE}
    theirs.load_state_dict(
        {**ours.state_dict(), "param_groups": theirs.state_dict()["param_groups"]}
    )
    assert torch.equal(theirs.state[params[3]]["square_avg"], average(ours.state[params[3]]))
    train(params, theirs, range(4, 5))
    del ours.param_groups[0]["quantized"]  # from now on the average is torch's
    train(params, ours, range(4, 5))
    assert ours.state[params[3]].keys() == {"step", "square_avg"}
    entry = {**ours.state[params[3]], CODE: torch.ones(3, 5), SCALE: torch.ones(1)}
    ours.param_groups[0]["quantized"] = True
    ours.state[params[3]] = entry
    with pytest.raises(ValueError, match="are not of 15 elements"):
        train(params, ours, range(5, 6))


@pytest.mark.skipif(INTERPRET, reason="kernels have no pieces of several parameters")
def test_a_long_parameter_beside_many_small_ones():
    params = leaves([*[torch.ones(4)] * 220, torch.ones(33000)])
    alone = leaves([torch.ones(33000)])
    for some in (params, alone):
        ours = tritonopt.RMSprop(some, quantized=True)
        give([torch.linspace(-1, 1, param.numel()) for param in some], some)
        ours.step()
    assert torch.equal(params[-1], alone[0])


def test_an_error_comes_before_anything_is_converted():
    params = leaves([torch.ones(64), torch.ones(64)])
    ours = tritonopt.RMSprop(params)
    give([torch.linspace(0.1, 1, 64)] * 2, params)
    ours.step()
    before = ours.state[params[0]]["square_avg"].clone()
    ours.param_groups[0]["quantized"] = True
    params[1].grad = torch.ones(64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        ours.step()
    assert torch.equal(ours.state[params[0]]["square_avg"], before)


def test_refused():
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="quantized=True leaves no variance for centered"):
        tritonopt.RMSprop([param], quantized=True, centered=True)
    with pytest.raises(ValueError, match="quantized=True does not go with cautious=True"):
        tritonopt.RMSprop([param], quantized=True, cautious=True, momentum=0.9)
    with pytest.raises(ValueError, match="quantized=True.*foreach=True"):
        tritonopt.RMSprop([param], quantized=True, foreach=True)
    double = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    double.grad = torch.ones_like(double)
    with pytest.raises(ValueError, match="is float64"):
        tritonopt.RMSprop([double], quantized=True).step()
    lists = [torch.ones(3)], [torch.ones(3)], [torch.ones(3, dtype=torch.uint8)]
    steps = [torch.zeros(())]
    with pytest.raises(ValueError, match="needs state_steps for random bits"):
        torch.ops.tritonopt.rmsprop_(*lists, [], [], [], None, [torch.ones(1)])
    with pytest.raises(ValueError, match="an fp32 scale for each block"):
        torch.ops.tritonopt.rmsprop_(*lists, [], [], steps)
    with pytest.raises(ValueError, match="codes go with no grad_avgs"):
        torch.ops.tritonopt.rmsprop_(*lists, [torch.ones(3)], [], steps, None, [torch.ones(1)])
    with pytest.raises(ValueError, match="contiguous scales"):
        codes = torch.zeros(600, dtype=torch.uint8)
        lists = [torch.zeros(600)], [torch.ones(600)], [codes], [], [], steps, None
        torch.ops.tritonopt.rmsprop_(*lists, [torch.zeros(6)[::2]])
    lists = [torch.ones(3)], [torch.ones(3)], [torch.ones(3, dtype=torch.uint8)]
    with pytest.raises(NotImplementedError, match="dense parameters"):
        wide = [torch.ones(6)[::2]]
        torch.ops.tritonopt.rmsprop_(wide, *lists[1:], [], [], steps, None, [torch.ones(1)])


def test_describe_tells_bytes():
    params = leaves([torch.randn(30, 50), torch.randn(500)])
    optimizer = tritonopt.RMSprop(params, quantized=True)
    for _ in range(2):
        table = optimizer.describe()
        assert f"{2000 * (4 + 8 + 2):,}" in table and "quantized=True" in table, table
        give(map(torch.randn_like, params), params)
        optimizer.step()
