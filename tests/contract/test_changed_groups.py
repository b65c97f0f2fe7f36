"""Groups may change between steps: their parameters, their options, and what two of them share."""

import pytest
import torch
from cases import (
    FEW_SHAPES,
    OURS,
    TORCH,
    assert_follows,
    follow,
    give_gradients,
    is_packed,
    parameters,
    twins,
)
from torch import nn


def test_add_param_group(name, device):
    params = parameters(FEW_SHAPES, device=device)
    ours, theirs, copies = twins(name, params[:2])
    follow(ours, theirs, params[:2], copies, 2)
    more = [nn.Parameter(p.detach().clone()) for p in params[2:]]
    ours.add_param_group({"params": params[2:], "lr": 0.5})
    theirs.add_param_group({"params": more, "lr": 0.5})
    follow(ours, theirs, params, copies + more, 4)
    assert is_packed(ours, params)


def remove_first(group):
    del group["params"][0]


def remove_middle(group):
    del group["params"][2]


def replace_list(group):
    group["params"] = group["params"][::-1]


def replace_some(group):
    group["params"] = [
        p if index % 2 else nn.Parameter(p.detach().clone())
        for index, p in enumerate(group["params"])
    ]


def raise_lr(group):
    group["lr"] = 0.5


def ascend(group):
    group["maximize"] = True


def use_foreach(group):
    group["foreach"] = True


CHANGES = [
    remove_first, remove_middle, replace_list, replace_some, raise_lr, ascend, use_foreach
]  # fmt: skip


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_groups(name, change, before):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, before)
    for optimizer in (ours, theirs):
        change(optimizer.param_groups[0])
    params, copies = (o.param_groups[0]["params"] for o in (ours, theirs))
    follow(ours, theirs, params, copies, 4)


def test_removed_and_appended_groups(name):
    params = parameters(FEW_SHAPES)
    ours = OURS[name]([{"params": [p]} for p in params])
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    theirs = TORCH[name]([{"params": [p]} for p in copies], foreach=False)
    follow(ours, theirs, params, copies, 2)
    for optimizer in (ours, theirs):
        group = optimizer.param_groups.pop(0)
        del optimizer.param_groups[1]
        optimizer.param_groups.append({**group, "lr": 0.3})
    follow(ours, theirs, params, copies, 4)
    assert ours.state[params[2]]["step"] == 2


@pytest.mark.parametrize("what", ["parameter", "state"])
def test_what_two_groups_share_is_packed(name, what):
    """By one of them, after the other has been looked at."""
    params = parameters([(9,), (9,), (9,)])
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    made = [(OURS[name], {}, params), (TORCH[name], {"foreach": False}, copies)]
    key = "square_avg" if name == "RMSprop" else "step_size"
    held, optimizers = [], []
    for kind, options, (first, *rest) in made:
        held.append(first.detach())  # keeps it in place
        optimizers.append(kind([{"params": [first]}, {"params": rest}], **options))
    follow(*optimizers, params, copies, 1)
    for optimizer, some in zip(optimizers, (params, copies), strict=True):
        if what == "parameter":
            optimizer.param_groups[1]["params"].append(some[0])
        else:
            shared = optimizer.state[some[1]][key].clone()
            held.append(shared.detach())
            optimizer.state[some[0]][key] = optimizer.state[some[1]][key] = shared
    follow(*optimizers, params, copies, 4)
    held.clear()
    for optimizer, (*_, last) in zip(optimizers, (params, copies), strict=True):
        last.data = last.data.clone()
        optimizer.state[last][key] = optimizer.state[last][key].clone()
    follow(*optimizers, params, copies, 4)


OPTIONS = [{"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_turned_on_before_the_first_step(options):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins("RMSprop", params)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(options)
    assert not ours.state
    follow(ours, theirs, params, copies, 4)
    assert list(ours.state[params[0]]) == list(theirs.state[copies[0]])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_turned_on_after_a_step_raise_as_in_torch(options):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins("RMSprop", params)
    follow(ours, theirs, params, copies, 1)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(options)
        with pytest.raises(KeyError):
            optimizer.step()


def test_what_two_groups_share_is_packed_with_a_first_gradient():
    """Whose dtype the step sizes take: the layouts are made once more in that step."""
    params = parameters([(9,), (9,)], torch.bfloat16)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    made = [(OURS["Rprop"], {}, params), (TORCH["Rprop"], {"foreach": False}, copies)]
    held, optimizers = [], []
    for kind, options, (first, last) in made:
        held.append(first.detach())  # keeps it in place
        optimizers.append(kind([{"params": [first]}, {"params": [last]}], lr=0.125, **options))
        last.grad_dtype = torch.float32
    for step in range(6):
        give_gradients(params[:1], copies[:1])
        if step == 3:
            held.clear()
            for optimizer, some in zip(optimizers, (params, copies), strict=True):
                optimizer.param_groups[1]["params"].append(some[0])
        if step >= 3:
            params[1].grad = torch.randn(9)
            copies[1].grad = params[1].grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert_follows(*optimizers, params, copies, rtol=0.02, atol=0.02)


def test_a_tensor_in_place_of_the_number_that_it_is_rounded_from(name):
    """They are equal, and yet not the same: neighbours are no longer alike."""
    params = [torch.nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2)]
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    ours = OURS[name]([{"params": [param]} for param in params], lr=0.01)
    theirs = TORCH[name]([{"params": [copy]} for copy in copies], lr=0.01, foreach=False)
    follow(ours, theirs, params, copies, steps=1)
    for optimizer in (ours, theirs):
        optimizer.state.clear()
        optimizer.param_groups[1]["lr"] = torch.tensor(0.01)
    follow(ours, theirs, params, copies, steps=2)


def test_a_parameter_in_two_groups_begins_as_in_the_first(name):
    params = parameters([(3,), (4,), (5,)])
    ours, theirs, copies = twins(name, params)
    for optimizer in (ours, theirs):
        first = optimizer.param_groups[0]["params"].pop()
        optimizer.add_param_group({"params": [first], "lr": 0.05})
        optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"][0])
    for _ in range(3):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)
