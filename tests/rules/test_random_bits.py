"""The random bits of `stochastic_rounding`: of seed, step, place and element, on every path."""

from copy import deepcopy

import pytest
import torch
from cases import OURS, SHAPES
from precision_cases import PATHS, give, leaves, random

import tritonopt
from tritonopt.device import INTERPRET
from tritonopt.precision import Noise, origin, philox, rounded

VECTORS = [  # Random123's own, of Philox4x32-10: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_philox(counter, key, words):
    assert tuple(map(int, philox(*map(torch.tensor, counter), *key))) == words


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", [0, 2**31 - 1])
@pytest.mark.parametrize("in_single", [False, True], ids=["", "state in fp32"])
def test_random_bits_are_the_same_on_every_path(path, seed, in_single, anywhere):
    """What is fp32 in torch is rounded by the bits of the parameter's place, step and column."""
    shapes = [*SHAPES, (3001,), (64,), (2500 if INTERPRET else 2**19 + 9,)]
    singles = [leaves(random(shapes, anywhere)), leaves(random([(5, 3), (8,)], anywhere))]
    singles[1][0] = singles[1][0].detach().t().contiguous().t().requires_grad_()
    ours = tritonopt.Rprop(
        [{"params": singles[0]}, {"params": singles[1], "etas": (0.4, 1.3)}],
        lr=2**-6, stochastic_rounding=True, rounding_seed=seed,
        state_dtype=torch.float32 if in_single else None,
    )  # fmt: skip
    if path == "compile()":
        ours.compile()
    places = [(group, index) for group in (0, 1) for index in range(len(singles[group]))]
    for step in range(1, 4):
        expected = []
        for group, index in places:
            param = singles[group][index]
            given = torch.randn(param.shape, device=anywhere).bfloat16()
            param.grad = None if (index + step) % 3 == 0 else given.as_strided(
                param.size(), param.stride()
            )  # fmt: skip
            copy = param.detach().float().requires_grad_()
            copy.grad = None if param.grad is None else param.grad.float()
            etas = ours.param_groups[group]["etas"]
            theirs = torch.optim.Rprop([copy], lr=2**-6, etas=etas, foreach=False)
            if ours.state.get(param):
                theirs.state[copy] = {k: v.float().clone() for k, v in ours.state[param].items()}
            theirs.step()
            expected.append((copy, theirs.state[copy], param.grad is not None))
        ours.step()
        for (group, index), (copy, state, is_updated) in zip(places, expected, strict=True):
            param = singles[group][index]
            if not is_updated:
                continue
            count = float(ours.state[param]["step"])
            noise = Noise(seed, [origin(group, index, param)], count)
            found = ours.state[param]
            pairs = (copy, param), *((state[key], found[key]) for key in ("prev", "step_size"))
            for column, pair in enumerate(pairs):
                wanted, drawn = (t.detach().as_strided((t.numel(),), (1,)).cpu() for t in pair)
                if drawn.dtype == torch.bfloat16:
                    wanted = rounded(wanted, noise.of([0], [param.numel()], 0, column))
                assert torch.equal(drawn.float(), wanted)


def test_what_is_rounded_is_right_on_average():
    """One of the two neighbours, the nearer the likelier; NaN and infinities stay."""
    low, share = 1.0, 0.3
    x = torch.full((80000,), low + share * 2**-7)
    drawn = Noise(3, [7], 1.0).of([0], [80000], 0, 0)
    assert 0 <= int(drawn.min()) and int(drawn.max()) < 2**16
    up = rounded(x, drawn) == low + 2**-7
    assert torch.equal(rounded(x, drawn)[~up], torch.full_like(x, low)[~up])
    assert abs(float(up.float().mean()) - share) < 4 * (share * (1 - share) / 80000) ** 0.5
    assert abs(float(rounded(-x, drawn).mean() + x.mean())) < 1e-4
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1.0])
    assert torch.equal(rounded(special, drawn[:5]).nan_to_num(7), special.nan_to_num(7))
    some = drawn.view(-1, 8).float()  # no word of a counter is another one's
    assert (torch.corrcoef(some.t()).abs() - torch.eye(8)).max() < 0.05


def test_each_parameter_step_column_and_seed_has_bits_of_its_own():
    param = torch.zeros(1)
    origins = [origin(*place, param) for place in ((0, 0), (0, 1), (1, 0), (10, 0), (1, 0))]
    assert len({*origins}) == 4 and all(0 <= start < 2**62 for start in origins)
    drawn = [
        Noise(seed, [start], step).of([0], [64], 0, column)
        for seed in (0, 1) for start in origins[:3] for step in (1.0, 2.0) for column in (0, 1)
    ]  # fmt: skip
    assert len({tuple(some.tolist()) for some in drawn}) == len(drawn)


@pytest.mark.parametrize("name", OURS)
def test_the_same_seed_trains_alike(name, anywhere):
    start, steps = random(device=anywhere), [random(device=anywhere) for _ in range(3)]
    ends = []
    for options in ({}, {}, {"rounding_seed": 1}, {"foreach": None, "fused_amp": True}):
        params = leaves(start)
        ours = OURS[name](params, stochastic_rounding=True, **options)
        for grads in steps:
            give(grads, params)
            ours.step()
        ends.append(torch.cat([param.detach().reshape(-1) for param in params]))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[3])
    assert not torch.equal(ends[0], ends[2])


def test_random_bits_do_not_depend_on_what_is_updated_beside():
    """Many small parameters change the pieces in which a CPU goes through a long one."""
    ends = []
    for others in (0, 250):
        params = leaves([torch.ones(40000), *[torch.ones(4)] * others])
        ours = tritonopt.RMSprop(
            params, lr=1e-4, stochastic_rounding=True, state_dtype=torch.float32
        )
        give([torch.ones_like(param) for param in params], params)
        ours.step()
        ends.append(params[0])
    assert torch.equal(*ends)


def test_random_bits_follow_a_parameter_that_changes_its_group():
    params = leaves([torch.ones(64)] * 3)
    a, b, c = params
    ours = tritonopt.RMSprop([{"params": [a, b]}, {"params": [c]}], stochastic_rounding=True)
    give(random([(64,)] * 3), params)
    ours.step()
    ours.param_groups[1]["params"].insert(0, ours.param_groups[0]["params"].pop())
    copies = deepcopy((params, ours))
    grads = random([(64,)] * 3)
    for some, optimizer in ((params, ours), copies):
        give(grads, some)
        optimizer.step()
    assert all(map(torch.equal, params, copies[0]))


def test_param_groups_of_equal_options_are_one_update():
    params = leaves(random([(3,), (4,)]))
    ours = tritonopt.RMSprop([{"params": [p]} for p in params], state_dtype=torch.float32)
    for _ in range(2):
        give(random([(3,), (4,)]), params)
        ours.step()
        (known,) = ours._units.groups.values()
    give(random([(3,), (4,)]), params)
    ours.step()
    assert [*ours._units.groups.values()] == [known]  # not made anew
