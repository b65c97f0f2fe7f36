"""`state_dtype`, `master` and `stochastic_rounding`: what bf16 loses is kept, or lost at random."""

from copy import deepcopy

import pytest
import torch
from cases import OURS, TORCH
from lion import Lion
from precision_cases import PATHS, bits, give, leaves, random, same, whole

import tritonopt
from tritonopt import precision
from tritonopt.device import INTERPRET
from tritonopt.precision import joined, split

OPTIONS = [
    ("RMSprop", {"lr": 1e-3}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True}),
    ("RMSprop", {"momentum": 0.9, "nesterov": True, "bias_correction": True}),
    ("Rprop", {}),
]

EXACT = [row for row in OPTIONS if not INTERPRET or row[0] == "Rprop"]  # to the last bit

NEITHER_HAS_TORCH = {"nesterov", "bias_correction"}


def test_two_halves_are_the_whole():
    drawn = torch.randint(-(2**31), 2**31 - 1, (10**6,), dtype=torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, -1e-45, 1.17e-38])
    x = torch.cat([drawn.view(torch.float32), special])
    high, low = split(x)
    numbers = ~x.isnan()
    same(joined(high, low)[numbers], x[numbers])
    assert joined(high, low)[~numbers].isnan().all()
    nearest = x.to(torch.bfloat16)
    ties = x.view(torch.int32) & 0xFFFF == 0x8000  # go away from 0 here, to even there
    assert torch.equal(high[numbers & ~ties], nearest[numbers & ~ties])


@pytest.mark.parametrize("name, options", EXACT, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_two_halves_are_trained_as_fp32(name, options, path, device):
    if path == "compile()" and name == "RMSprop":
        pytest.skip("equal up to rounding, as in fp32")
    if device.type != "cpu" and name == "RMSprop":
        pytest.skip("a square root of ours is rounded to nearest there")
    start = random(device=device)
    halves, singles = leaves(start), leaves(start, torch.float32)
    ours = OURS[name](halves, master="split", **options)
    if NEITHER_HAS_TORCH & options.keys():
        theirs = OURS[name](singles, **options)
    else:
        theirs = TORCH[name](singles, foreach=False, **options)
    if path == "compile()":
        ours.compile()
    for step in range(12):
        grads = random(device=device)
        grads[step % 4] = None
        give(grads, halves, singles)
        ours.step()
        theirs.step()
        for half, single in zip(halves, singles, strict=True):
            same(whole(ours, half), single) if half in ours.state else None
            for key, value in theirs.state[single].items():
                assert torch.equal(ours.state[half][key], value)


def test_close_to_fp32_where_kernels_or_compilers_round_otherwise(anywhere):
    start = random(device=anywhere)
    halves, singles = leaves(start), leaves(start, torch.float32)
    ours = tritonopt.RMSprop(halves, master="split", momentum=0.9, compile=not INTERPRET)
    theirs = torch.optim.RMSprop(singles, momentum=0.9, foreach=False)
    for _ in range(5):
        give(random(device=anywhere), halves, singles)
        ours.step()
        theirs.step()
    for half, single in zip(halves, singles, strict=True):
        torch.testing.assert_close(whole(ours, half), single.detach().cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_what_somebody_writes_to_a_parameter_counts(name):
    """A stale remainder is less than a unit in the last place: none of 0 is a NaN, or anything."""
    (param,) = leaves(random([(3000,)]))
    ours = OURS[name]([param], master="split")
    for _ in range(3):
        give(random([(3000,)]), [param])
        ours.step()
    with torch.no_grad():
        param.mul_((torch.arange(3000) % 2).bfloat16())  # pruned, as +0 and -0
        assert whole(ours, param)[::2].abs().max() < 1e-40
        param.copy_(torch.linspace(-1, 1, 3000))
    written = param.detach().float()
    assert ((whole(ours, param) - written).abs() <= written.abs() * 2**-8 + 1e-40).all()


@pytest.mark.parametrize("name, options", EXACT, ids=str)
def test_state_in_single_precision(name, options):
    """Every step is torch's of what was there, in fp32; only the parameter is rounded."""
    params = leaves(random())
    ours = OURS[name](params, state_dtype=torch.float32, **options)
    for step in range(6):
        grads = random()
        singles = leaves(params, torch.float32)
        if NEITHER_HAS_TORCH & options.keys():
            theirs = OURS[name](singles, **options)
        else:
            theirs = TORCH[name](singles, foreach=False, **options)
        if step:
            state = deepcopy(ours.state_dict()["state"])
            theirs.load_state_dict({**theirs.state_dict(), "state": state})
        give(grads, params, singles)
        ours.step()
        theirs.step()
        for param, single in zip(params, singles, strict=True):
            if not INTERPRET:  # which truncates
                assert torch.equal(param, single.bfloat16())
            for key, value in theirs.state[single].items():
                assert ours.state[param][key].dtype == torch.float32
                assert torch.equal(ours.state[param][key], value)


@pytest.mark.parametrize("option", [{"master": "split"}, {"stochastic_rounding": True}], ids=str)
def test_no_small_update_is_lost(option, anywhere):
    """Updates of a sixteenth of a unit in the last place; in plain bf16 none is seen."""
    ends = {}
    for title, options in (("plain", {}), ("kept", option)):
        param = torch.full((4096,), 1.0, device=anywhere).bfloat16().requires_grad_()
        optimizer = tritonopt.Rprop([param], lr=2**-12, step_sizes=(2**-12, 2**-12), **options)
        for _ in range(64):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends[title] = float(param.detach().float().mean())
    moved = 1 - ends["kept"]
    assert INTERPRET or ends["plain"] == 1  # the interpreter truncates
    assert moved == pytest.approx(64 * 2**-12, rel=0.05)


@pytest.mark.parametrize(
    "option",
    [{"master": "split"}, {"stochastic_rounding": True}, {"state_dtype": torch.float32}],
    ids=str,
)
@pytest.mark.parametrize("name", OURS)
def test_with_clipping_and_skipped_steps(name, option, anywhere):
    """As if the gradients had been clipped before; a step that is skipped leaves no trace."""
    start, grads = random(device=anywhere), random(device=anywhere)
    params, copies = leaves(start), leaves(start, torch.float32)
    ours = OURS[name](params, fused_amp=True, max_grad_norm=0.5, lr=0.0625, **option)
    theirs = TORCH[name](copies, lr=0.0625, foreach=False)
    ours.grad_scale = torch.full((), 2.0, device=anywhere)
    ours.found_inf = torch.ones((), device=anywhere)
    give(grads, params)
    ours.step()
    assert all(map(torch.equal, params, leaves(start))) and not ours.state
    ours.found_inf.zero_()
    ours.step()
    norm = torch.nn.utils.get_total_norm([grad.float() / 2 for grad in grads])
    torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-5, atol=0)
    give([grad.float() / 2 * (0.5 / (norm + 1e-6)) for grad in grads], copies)
    theirs.step()
    for param, copy in zip(params, copies, strict=True):
        torch.testing.assert_close(param.detach().float(), copy.detach(), rtol=2**-7, atol=1e-3)
        for key, value in theirs.state[copy].items():
            found = ours.state[param][key].to(value)
            torch.testing.assert_close(found, value, rtol=2**-7, atol=0)
    entries = [{"param": param, **ours.state[param]} for param in params]
    before = deepcopy([{key: bits(value) for key, value in entry.items()} for entry in entries])
    ours.found_inf.fill_(1)
    ours.step()
    for entry, kept in zip(entries, before, strict=True):
        assert all(torch.equal(bits(value), kept[key]) for key, value in entry.items())


def test_a_third_rule():
    """Lion of two halves, as of fp32."""
    start = random()
    halves, singles = leaves(start), leaves(start, torch.float32)
    ours, theirs = Lion(halves, lr=0.01, master="split"), Lion(singles, lr=0.01)
    for _ in range(5):
        give(random(), halves, singles)
        ours.step()
        theirs.step()
    for half, single in zip(halves, singles, strict=True):
        same(whole(ours, half), single)
        same(ours.state[half]["exp_avg"], theirs.state[single]["exp_avg"])


REFUSED = [
    ({"state_dtype": torch.float64}, torch.bfloat16, "Invalid state_dtype"),
    ({"master": "kahan"}, torch.bfloat16, "Invalid master"),
    ({"rounding_seed": 3}, torch.bfloat16, "requires stochastic_rounding"),
    ({"rounding_seed": -1, "stochastic_rounding": True}, torch.bfloat16, "Invalid rounding_seed"),
    ({"rounding_seed": 0.5, "stochastic_rounding": True}, torch.bfloat16, "Invalid rounding_seed"),
    ({"master": "split", "stochastic_rounding": True}, torch.bfloat16, "leave one out"),
    ({"master": "split", "foreach": True}, torch.bfloat16, "master='split'.*foreach=True"),
    ({"stochastic_rounding": True, "differentiable": True}, torch.bfloat16, "differentiable"),
    ({"master": "split"}, torch.float32, "is float32, not bfloat16"),
    ({"stochastic_rounding": True}, torch.float16, "is float16"),
]


@pytest.mark.parametrize("options, dtype, match", REFUSED, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_refused(name, options, dtype, match):
    params = leaves(random([(3,)]), dtype)
    with pytest.raises(ValueError, match=match):
        optimizer = OURS[name](params, **options)
        give(random([(3,)]), params)
        before = params[0].detach().clone()
        try:
            optimizer.step()
        finally:
            assert torch.equal(params[0], before) and not optimizer.state


def test_fp32_parameters_beside_those_in_half_precision():
    """They are neither rounded nor is their state changed: as without the options."""
    start = random([(3, 5), (7,)])
    mixed = [*leaves(start), *leaves(start, torch.float32)]
    copies = leaves(start, torch.float32)
    ours = tritonopt.RMSprop(mixed, stochastic_rounding=True, state_dtype=torch.float32)
    theirs = tritonopt.RMSprop(copies)
    for _ in range(3):
        grads = random([(3, 5), (7,)])
        give([*grads, *grads], mixed)
        give(grads, copies)
        ours.step()
        theirs.step()
    assert all(map(torch.equal, mixed[2:], copies))
    assert precision.dtype_of(ours.param_groups[0], "square_avg", mixed[0]) == torch.float32


BYTES = [  # of a step for each element: gradient, parameter and state
    ("RMSprop", {}, 2 + 4 + 4),
    ("RMSprop", {"stochastic_rounding": True}, 2 + 4 + 4),
    ("RMSprop", {"state_dtype": torch.float32}, 2 + 4 + 8),
    ("RMSprop", {"master": "split"}, 2 + 4 + 8 + 4),
    ("Rprop", {"master": "split"}, 2 + 4 + 16 + 4),
]


@pytest.mark.parametrize("name, options, each", BYTES, ids=str)
def test_describe_tells_bytes(name, options, each):
    params = leaves(random([(30, 50), (500,)]))
    optimizer = OURS[name](params, **options)
    for _ in range(2):
        table = optimizer.describe()
        assert f"{2000 * each:,}" in table, table
        assert all(f"{key}={value!r}" in table for key, value in options.items())
        give(random([(30, 50), (500,)]), params)
        optimizer.step()


def test_a_remainder_goes_with_its_option():
    param = leaves([torch.ones(5)])[0]
    optimizer = tritonopt.RMSprop([param], master="split")
    for master in ("split", None):
        optimizer.param_groups[0]["master"] = master
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert ("remainder" in optimizer.state[param]) == bool(master)


OF_MANY = [{"stochastic_rounding": True}, {"cautious": True, "momentum": 0.9}]


@pytest.mark.skipif(INTERPRET, reason="kernels have no pieces of several parameters")
@pytest.mark.parametrize("options", OF_MANY, ids=str)
def test_a_thousand_small_views(options):
    """Gathered, as they lie apart: the same as those that lie side by side."""
    start = torch.randn(1000, 64).bfloat16()
    flat = start.clone()
    views, owners = [*map(torch.nn.Parameter, flat)], leaves([*start])
    for params in (views, owners):
        optimizer = tritonopt.RMSprop(params, **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            give([torch.randn(64, generator=generator) for _ in params], params)
            optimizer.step()
    assert all(map(torch.equal, views, owners)) and not torch.equal(flat, start)
