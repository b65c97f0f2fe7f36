"""Random lives of an optimizer: after every event it is what torch's for-loop is, state and all."""

import copy
import os
import random

import pytest
import torch
from cases import OURS, TORCH
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from life_cases import KERNEL, OPTIONS, Side
from torch import Tensor

from tritonopt.device import INTERPRET

EXAMPLES = int(os.environ.get("LIVES", 4 if INTERPRET else 20))  # of each optimizer
MANY = int(os.environ.get("LIVES", 20 if INTERPRET else 300))
COMPILED = {**OPTIONS, "RMSprop": {**OPTIONS["RMSprop"], "centered": [False]}}  # else NaN by chance


def load_from_the_other(ours, theirs):
    """Each optimizer continues from the other's checkpoint."""
    states = [copy.deepcopy(side.optimizer.state_dict()) for side in (theirs, ours)]
    for side, state in zip((ours, theirs), states, strict=True):
        for group in state["param_groups"]:
            if group["foreach"] is not True:
                group["foreach"] = side.foreach
        side.optimizer.load_state_dict(state)


STEPS = [
    "step", "step", "step_with_missing_gradients", "step_without_gradients", "step_again",
    "step_with_closure", "step_another_optimizer",
]  # fmt: skip
EVENTS = [
    "zero_grad", "move", "write", "exchange", "tie", "cast", "channels_last", "freeze", "share",
    "hold", "add_group", "remove_group", "remove_param", "replace_param", "renew_params",
    "change_option", "change_option", "same_options", "change_any_option", "write_tensor_lr",
    "clear_entry", "clear_state", "replace_state", "replace_state", "move_what_was_replaced",
    "replace_entry", "keep_entry", "load_own", "load_from_the_other", "copy", "pickle",
]  # fmt: skip


def picture(side):
    """All that a user can see of an optimizer and its parameters."""
    number = {id(p): index for index, p in enumerate(side.params)}
    seen = {"params": [p.detach() for p in side.params], "grads": [p.grad for p in side.params]}
    seen["strides"] = [p.stride() for p in side.params]
    for index, optimizer in enumerate(side.optimizers):
        try:
            state = optimizer.state_dict()
        except KeyError:  # there is state of a parameter that is in no group
            state = {"param_groups": []}
        for group in state["param_groups"]:
            group["foreach"] = group["foreach"] is True
        entries = [(number[id(key)], entry) for key, entry in optimizer.state.items()]
        entries = dict(sorted(entries))  # in any order, as neighbours in memory are made together
        state["state"] = dict(sorted(state.get("state", {}).items()))
        seen[index] = {"entries": entries, "state_dict": state}
    seen["kept entry"] = getattr(side, "kept_entry", None)
    seen["kept"] = [value for value in side.kept if isinstance(value, Tensor)]
    return seen


def pairs(actual, expected, where=""):
    """Tensors at the same place of two pictures, which are equal in all else."""
    assert type(actual) is type(expected), f"{where}: {type(actual)} is not {type(expected)}"
    if isinstance(actual, Tensor):
        assert actual.dtype == expected.dtype, f"{where}: {actual.dtype}, not {expected.dtype}"
        assert actual.shape == expected.shape, f"{where}: {actual.shape}, not {expected.shape}"
        yield where, actual, expected
    elif isinstance(actual, dict):
        assert list(actual) == list(expected), f"{where}: {list(actual)}, not {list(expected)}"
        for key in actual:
            yield from pairs(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected), where
        for index, both in enumerate(zip(actual, expected, strict=True)):
            yield from pairs(*both, f"{where}[{index}]")
    else:
        assert actual == expected, f"{where}: {actual}, not {expected}"


def assert_equal(exact, actual, expected):
    """To the last bit, but for halves, which torch rounds more often, and kernels.

    What may differ is made the same, so that differences do not add up.
    """
    found = list(pairs(actual, expected))
    dtypes = {value.dtype for _, value, _ in found}
    halves = not dtypes <= {torch.float32, torch.float64}
    exact = exact and not halves
    rounding = {"rtol": 0.1, "atol": 0.1} if halves else {"rtol": 2e-5, "atol": 2e-6}
    limits = {"rtol": 0, "atol": 0} if exact else rounding
    for where, one, other in found:
        if halves:  # where a square or a product is subnormal, one rounding decides
            close = torch.isclose(one, other, equal_nan=True, **limits) | ~other.isfinite()
            assert (~close).sum() <= max(1, close.numel() // 10), f"{where}: {one}, not {other}"
            continue
        torch.testing.assert_close(
            one, other, equal_nan=True, **limits, msg=lambda text, w=where: f"{w}: {text}"
        )
    if not exact:
        with torch.no_grad():
            for _, one, other in found:
                one.copy_(other)


def assert_unchanged_or_equal(exact, before, actual, expected):
    """After an error: a closure may have left gradients."""
    for picture in (before, actual, expected):
        del picture["grads"]
    try:
        assert_equal(exact, actual, before)
    except AssertionError:
        assert_equal(exact, actual, expected)


def happen(side, event, seed):
    try:
        getattr(side, event)(random.Random(seed))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return error
    return None


def live(name, program, compiled=False):
    (_, first), *events = program
    options = COMPILED if compiled else OPTIONS
    ours = Side(name, OURS[name], None, random.Random(first), options)
    theirs = Side(name, TORCH[name], False, random.Random(first), options)
    if compiled:
        ours.optimizer.compile(backend="eager")
    exact = name == "Rprop" or not (KERNEL or compiled)
    assert_equal(exact, picture(ours), picture(theirs))
    for event, seed in events:
        if event == "load_from_the_other":
            try:
                load_from_the_other(ours, theirs)
            except (ValueError, KeyError):  # other sizes of groups
                return
        else:
            before = copy.deepcopy(picture(ours))
            errors = happen(ours, event, seed), happen(theirs, event, seed)
            if "expected dtype" in str(errors[1]):  # which ours may do: torch's lerp mixes none
                return
            if any(errors):
                assert type(errors[0]) is type(errors[1]), f"{event}: {errors[0]!r}, {errors[1]!r}"
                assert_unchanged_or_equal(exact, before, picture(ours), picture(theirs))
                return
        try:
            assert_equal(exact, picture(ours), picture(theirs))
        except AssertionError as error:
            raise AssertionError(f"after {event!r}: {error}") from error


seeds = st.integers(0, 2**31)
events = st.tuples(st.sampled_from(EVENTS), seeds)
stages = st.tuples(events, st.tuples(st.sampled_from(STEPS), seeds)).map(list)
programs = st.builds(
    lambda first, stages: [("begin", first), *(event for stage in stages for event in stage)],
    seeds, st.lists(stages, min_size=3, max_size=12),
)  # fmt: skip
PHASES = [Phase.generate] if INTERPRET else list(Phase)


def lives(count, phases=PHASES):
    return settings(
        max_examples=count, derandomize=True, deadline=None, phases=phases, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.mark.parametrize("name", OURS)
@lives(EXAMPLES)
@given(program=programs)
def test_a_life(name, program):
    live(name, program)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
@lives(MANY)
@given(program=programs)
def test_many_lives(name, program):
    live(name, program)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
@lives(EXAMPLES)
@given(program=programs)
def test_a_life_that_is_compiled(name, program):
    live(name, program, compiled=True)
