"""What is left to torch, and what `describe()` says of it."""

import pytest
import torch
from cases import OURS, TORCH, follow, give_gradients, parameters, twins
from torch import nn
from torch._subclasses import FakeTensorMode

from tritonopt.device import path

SHAPES = [(3, 5), (40,), (), (64,)]


def one_step(optimizer, params):
    give_gradients(params, params)
    optimizer.step()


# Paths.


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}], ids=str)
def test_foreach_is_torchs(name, options):
    params = parameters(SHAPES)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = OURS[name](params, **options), TORCH[name](copies, **options)
    follow(ours, theirs, params, copies, 4)
    text = ours.describe()
    assert f"4 left to torch: {next(iter(options))}={options['foreach']}" in text


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(name, dtype):
    params = parameters([(5,), (3, 3)], dtype) + parameters([(7,)])
    ours, theirs, copies = twins(name, params)
    left = f"2 left to torch: is {str(dtype)[6:]}"
    assert left in ours.describe()  # before their first gradient, too
    follow(ours, theirs, params, copies, 4)
    assert left in ours.describe()


def test_complex_and_real_of_one_storage(name):
    """Views of one storage: updated in torch's order."""
    params, copies = [], []
    values = torch.randn(5, dtype=torch.complex64)
    for some in (params, copies):
        base = values.clone()
        some += [nn.Parameter(base), nn.Parameter(torch.view_as_real(base))]
    ours, theirs = OURS[name](params), TORCH[name](copies, foreach=False)
    follow(ours, theirs, params, copies, 4)


def test_describe_counts(name):
    params = parameters([(3, 5), (40,), (7,)])
    params.append(nn.Parameter(torch.randn(20)[3:9]))
    params.append(nn.Parameter(torch.randn(4, 6)[:, ::2]))
    params.append(nn.Parameter(torch.randn(4, dtype=torch.complex64)))
    held = params[1].detach()
    ours = OURS[name]([{"params": params[:4]}, {"params": params[4:]}])
    one_step(ours, params)
    text = ours.describe()
    rows = [line.split() for line in text.splitlines()]
    header = "group device dtype path packed in place torch elements bytes/step".split()
    assert rows[0] == header
    kind = path(torch.device("cpu"))[1].split()
    nbytes = (20 if name == "RMSprop" else 28) * 68
    assert rows[1] == ["0", "cpu", "float32", *kind, "2", "2", "0", "68", f"{nbytes:,}"]
    assert ["1", "cpu", "float32", "torch", "0", "0", "1", "12", "-"] in rows
    assert ["1", "cpu", "complex64", "torch", "0", "0", "1", "4", "-"] in rows
    for note in [
        "group 0: 1 in place: shares its storage with another tensor",
        "group 0: 1 in place: is a view of a larger storage",
        "group 1: 1 left to torch: is not dense",
        "group 1: 1 left to torch: is complex64",
    ]:
        assert note in text
    assert torch.equal(held, params[1])


def test_describe_changes_nothing(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    for _ in range(4):
        assert ours.describe() == ours.describe()
        follow(ours, theirs, params, copies, 1)


def test_no_kernel_for_a_device(name, monkeypatch):
    """Then torch's own implementation runs."""
    monkeypatch.setattr("tritonopt.eligible.path", lambda device: (None, f"no kernel for {device}"))
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    assert not ours.state
    follow(ours, theirs, params, copies, 3)
    assert "4 left to torch: no kernel for cpu" in ours.describe()


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_parameters_without_memory(name, kind):
    """Their steps compute shapes, as torch's do."""
    mode = torch.device("meta") if kind == "meta" else FakeTensorMode()
    for cls in (OURS[name], TORCH[name]):
        with mode:
            (param,) = parameters([(3, 5)], device=kind if kind == "meta" else "cpu")
            optimizer = cls([param])
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert optimizer.state[param].keys() >= {"step"}


class Plain(torch.Tensor):
    pass


def test_state_has_the_type_of_a_subclass(name):
    types = []
    for cls in (OURS[name], TORCH[name]):
        param = torch.randn(3).as_subclass(Plain).requires_grad_()
        optimizer = cls([param])
        param.grad = torch.ones_like(param)
        optimizer.step()
        types.append({key: type(value) for key, value in optimizer.state[param].items()})
    assert types[0] == types[1]


def test_the_layout_of_a_sparse_parameter_is_the_reason(name):
    param = torch.nn.Parameter(torch.eye(3).to_sparse())
    assert "left to torch: is sparse_coo" in OURS[name]([param]).describe()


def test_why_a_parameter_lies_in_no_slab(name):
    params = parameters([(3,), (4,), (5,)])
    optimizer = OURS[name](params)
    give_gradients(params, params)
    optimizer.step()
    params[0].data = params[0].data.clone()
    lines = optimizer.describe().splitlines()
    reason = "1 in place: nothing lies beside it, or it was moved after the first step"
    assert lines[2:] == [f"group 0: {reason}"]


# Options: those that torch does not have, where they are on.


def test_options_in_force_are_told(name):
    """By group, if each may have its own."""
    option = {"RMSprop": "eps_in_sqrt=True", "Rprop": "variant='rprop-'"}[name]
    groups = [{"params": parameters([(3,)])}, {"params": parameters([(4,)])}]
    groups[1].update(eval(f"dict({option})"))
    everywhere = {"compile": {"backend": "aot_eager"}, "fused_amp": True, "max_grad_norm": 2.0}
    optimizer = OURS[name](groups, **everywhere)
    optimizer.step()
    lines = optimizer.describe().splitlines()
    for key, value in everywhere.items():
        assert f"all groups: {key}={value}" in lines
        assert f"\n    {key}: {value}\n" in repr(optimizer)
    assert f"group 1: {option}" in lines and not any("group 0: eps" in line for line in lines)
    plain = OURS[name](parameters([(3,)]))
    assert "all groups" not in plain.describe() and "All groups" not in repr(plain)


class Imitation:
    """As Lightning wraps an optimizer: a class of both, whose attributes are the wrapped one's."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Imitation", (Imitation, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def test_an_imitation_of_the_class_tells_what_the_optimizer_tells(name):
    options = {"compile": {"backend": "aot_eager"}, "max_grad_norm": 2.0}
    params = parameters(SHAPES)
    optimizer = OURS[name](params, **options)
    give_gradients(params, params)
    optimizer.step()
    wrapper = Imitation(optimizer)
    assert wrapper.describe() == optimizer.describe() and "compile=" in wrapper.describe()
    assert wrapper.grad_norm is optimizer.grad_norm is not None
    assert "max_grad_norm: 2.0" in repr(wrapper)
