"""Parameters may get their memory after the optimizer: lazy modules, the meta device."""

import copy

import torch
from cases import OURS, TORCH, follow, is_packed, lists
from torch import nn


def test_lazy_linear(name):
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    ours = OURS[name](model.parameters())
    assert "2 without state" in ours.describe()
    inputs = torch.randn(2, 5)
    model(inputs)
    twin = copy.deepcopy(model)
    theirs = TORCH[name](twin.parameters(), foreach=False)
    follow(ours, theirs, *lists(model, twin), 4)
    assert is_packed(ours, model.parameters())


def test_meta_construction(name):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    ours = OURS[name](model.parameters())
    assert not ours.state and "4 without state" in ours.describe()
    torch.__future__.set_swap_module_params_on_conversion(True)  # else they are other parameters
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for param in model.parameters():
        nn.init.normal_(param)
    twin = copy.deepcopy(model)
    theirs = TORCH[name](twin.parameters(), foreach=False)
    follow(ours, theirs, *lists(model, twin), 4)
