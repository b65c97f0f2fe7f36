"""Signatures, types and errors are torch's."""

import copy
import inspect
import re

import pytest
import torch
from cases import INFO, OURS, TORCH, follow, give_gradients, parameters, twins
from torch import nn

SHAPES = [(3, 5), (40,), (), (64,)]


def one_step(optimizer, params):
    give_gradients(params, params)
    optimizer.step()


# Signatures and types.


def test_signature(name):
    """torch's, argument by argument; what more there is can be given by keyword only."""
    ours, theirs = (inspect.signature(kinds[name]).parameters for kinds in (OURS, TORCH))
    shared = [ours[key].replace(annotation=p.annotation) for key, p in theirs.items()]
    assert shared == list(theirs.values())
    more = [p for key, p in ours.items() if key not in theirs]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in more)
    assert [key for key in ours if key in theirs] == list(theirs)


@pytest.mark.parametrize("method", ["step", "zero_grad", "add_param_group", "load_state_dict"])
def test_method_signatures(name, method):
    ours, theirs = (inspect.signature(getattr(k[name], method)) for k in (OURS, TORCH))
    assert list(ours.parameters) == list(theirs.parameters)
    for mine, other in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert (mine.default, mine.kind) == (other.default, other.kind)


def test_types(name):
    optimizer = OURS[name](parameters(SHAPES))
    assert isinstance(optimizer, TORCH[name]) and isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ == name
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_defaults(name):
    params = parameters(SHAPES)
    ours, theirs = OURS[name](params), TORCH[name](params)
    assert {k: ours.defaults[k] for k in theirs.defaults} == theirs.defaults
    for key, value in theirs.param_groups[0].items():
        if key != "params":
            assert ours.param_groups[0][key] == value


def test_repr_names_every_option(name):
    params = parameters(SHAPES)
    ours, theirs = repr(OURS[name](params)), repr(TORCH[name](params))
    assert set(theirs.splitlines()) <= set(ours.splitlines())


def test_a_subclass(name):
    class Half(OURS[name]):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = 0.125
            return super().step(closure)

    params = parameters(SHAPES)
    _, theirs, copies = twins(name, params, lr=0.125)
    follow(Half(params, lr=1.0), theirs, params, copies)


# Errors.


def errors(name):
    torch.manual_seed(0)
    rows = INFO[name].optim_error_inputs_func("cpu", torch.float32) if INFO else []
    return [pytest.param(name, row, id=f"{name}-{row.optimizer_error_input.desc}") for row in rows]


@pytest.mark.parametrize("name, row", errors("RMSprop") + errors("Rprop"))
def test_torchs_error_inputs(name, row):
    given = row.optimizer_error_input
    params = [nn.Parameter(torch.randn(1))] if given.params is None else given.params
    kwargs = given.kwargs
    if issubclass(row.error_type, Warning):
        with pytest.warns(row.error_type, match=row.error_regex):
            OURS[name](params, **kwargs)
    else:
        with pytest.raises(row.error_type, match=row.error_regex):
            OURS[name](params, **kwargs)


NAN = float("nan")
BAD = {
    "RMSprop": [
        {"lr": -1.0}, {"lr": NAN}, {"eps": -1.0}, {"eps": NAN}, {"momentum": -1.0},
        {"momentum": NAN}, {"weight_decay": -1.0}, {"alpha": -0.1}, {"alpha": NAN},
        {"lr": torch.ones(2)}, {"lr": torch.ones(0)}, {"lr": torch.tensor(-1.0)}, {"lr": "1"},
        {"fused": True},
    ],
    "Rprop": [
        {"lr": -1.0}, {"lr": NAN}, {"etas": (0.5, 0.9)}, {"etas": (1.1, 1.2)}, {"etas": (0, 1.2)},
        {"etas": (NAN, 1.2)}, {"etas": (-0.5, 1.2)}, {"lr": torch.ones(2)}, {"lr": "1"},
        {"weight_decay": 0.1}, {"etas": (0.5,)},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "name, kwargs", [pytest.param(n, k, id=f"{n}-{k}") for n, rows in BAD.items() for k in rows]
)
def test_bad_options_raise_as_in_torch(name, kwargs):
    raised = []
    for kinds in (OURS, TORCH):
        params = parameters([(3,)])
        before = params[0].data_ptr()
        with pytest.raises(Exception) as error:
            kinds[name](params, **kwargs)
        raised.append((error.type, str(error.value).replace("SlabOptimizer", name)))
        assert params[0].data_ptr() == before
    assert raised[0] == raised[1]


PARAMS = {
    "empty": lambda: [],
    "a tensor": lambda: torch.zeros(3),
    "not a leaf": lambda: [nn.Parameter(torch.zeros(3)) * 2],
    "not tensors": lambda: [1, 2],
    "a group with a set": lambda: [{"params": set(parameters([(3,)]))}],
}


@pytest.mark.parametrize("make", PARAMS.values(), ids=PARAMS)
def test_bad_params_raise_as_in_torch(name, make):
    raised = []
    for kinds in (OURS, TORCH):
        torch.manual_seed(0)
        with pytest.raises(Exception) as error:
            kinds[name](make())
        raised.append((error.type, re.sub(r"0x\w+", "", str(error.value))))
    assert raised[0][0] == raised[1][0]
    assert raised[0][1][:60] == raised[1][1][:60]


def test_empty_groups(name):
    params = parameters(SHAPES)
    ours = OURS[name]([{"params": []}, {"params": params}])
    one_step(ours, params)
    assert ours.state[params[0]]["step"] == 1 and "group" in ours.describe()


@pytest.mark.parametrize("before", [0, 2])
def test_capturable_on_a_cpu_raises_as_in_torch_and_changes_nothing(name, before):
    texts = []
    for kinds in (OURS, TORCH):
        params = parameters(SHAPES)
        optimizer = kinds[name](params)
        for _ in range(before):
            one_step(optimizer, params)
        optimizer.param_groups[0]["capturable"] = True
        values = [p.detach().clone() for p in params]
        state = copy.deepcopy([dict(optimizer.state[p]) for p in params])
        with pytest.raises(AssertionError) as error:
            one_step(optimizer, params)
        texts.append(str(error.value))
        assert all(map(torch.equal, params, values))
        for param, entry in zip(params, state, strict=True):
            for key, value in entry.items():
                assert torch.equal(optimizer.state[param][key], value)
    assert texts[0] == texts[1]
    with pytest.raises(AssertionError):
        one_step(OURS[name](params, capturable=True), params)


def test_a_gradient_of_a_wrong_shape_raises_as_in_torch(name):
    """It can come from `p.data = smaller` after the gradient was set."""
    for kinds in (OURS, TORCH):
        params = parameters([(4,), (40,)])
        optimizer = kinds[name](params)
        one_step(optimizer, params)
        give_gradients(params, params)
        params[0].data = torch.zeros(3)
        with pytest.raises(RuntimeError, match="size"):
            optimizer.step()
