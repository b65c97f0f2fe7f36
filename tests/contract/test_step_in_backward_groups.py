"""Param groups that change, while steps are taken in backward."""

import torch
from torch import nn

import tritonopt


def pairs_of_linear(**options):
    """One that steps in backward, one that steps after it."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        groups = [{"params": [*layer.parameters()]} for layer in model]
        made.append((model, tritonopt.RMSprop(groups, **options)))
    tritonopt.step_in_backward(*made[0], bucket_bytes=0)
    return made


def steps_agree(made, changes, steps=4):
    for step in range(steps):
        x = torch.randn(5, 4)
        for model, optimizer in made:
            changes(step, optimizer)
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    (model, _), (twin, _) = made
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_parameter_moves_to_the_group_beside_its_own():
    def changes(step, optimizer):
        optimizer.param_groups[1]["lr"] = 0.0
        if step == 2:
            first, second = (group["params"] for group in optimizer.param_groups)
            second.insert(0, first.pop())

    steps_agree(pairs_of_linear(lr=0.1), changes)


def test_an_option_is_deleted():
    def changes(step, optimizer):
        if step == 2:
            for group in optimizer.param_groups:
                del group["nesterov"]

    steps_agree(pairs_of_linear(lr=0.1, momentum=0.9, nesterov=True), changes)


def test_a_first_step_with_an_lr_of_0():
    """Of gradients that are 0, those of a bucket say nothing of the others."""
    ends = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        first, second = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.randn(2, 3))
        model = nn.ParameterList([first, second])
        options = {"weight_decay": 0.1, "bias_correction": True}
        optimizer = tritonopt.RMSprop(model.parameters(), lr=0.0, **options)
        if in_backward:
            tritonopt.step_in_backward(model, optimizer, bucket_bytes=0)
        x = torch.randn(8, 4)
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 0.01 * step
            ((x @ first.T @ second.T) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([first, second, *(optimizer.state[p]["step"] for p in (first, second))])
    assert all(map(torch.equal, *ends))


def test_a_parameter_that_has_left_keeps_its_gradient():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = tritonopt.RMSprop(model.parameters())
    tritonopt.step_in_backward(model, optimizer, bucket_bytes=0)
    model(torch.randn(2, 3)).sum().backward()
    last = optimizer.param_groups[0]["params"].pop()
    model(torch.randn(2, 3)).sum().backward()
    assert last.grad is not None
