"""`RMSprop(cautious=True)`: checkpoints, what is described, and what is refused."""

import copy
import io

import pytest
import torch
from cases import give_gradients, parameters
from foreign_cases import timm_rmsprop_tf

import tritonopt
from tritonopt import sweep
from tritonopt.device import path


def cautious(params, **options):
    return tritonopt.RMSprop(params, momentum=0.9, cautious=True, **options)


def test_checkpoints():
    params = parameters([(3, 4), (5,)])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizers = [cautious(params), torch.optim.RMSprop(copies, momentum=0.5)]
    give_gradients(params, copies)
    for optimizer in optimizers:
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizers[0].state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = tritonopt.RMSprop(copies)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["cautious"] is True
    for param, twin in zip(params, copies, strict=True):
        twin.data.copy_(param)
    give_gradients(params, copies)
    optimizers[0].step()
    resumed.step()
    assert all(map(torch.equal, params, copies))
    optimizers[1].load_state_dict(saved)
    optimizers[1].step()
    del saved["param_groups"][0]["cautious"]
    optimizers[0].load_state_dict(saved)  # one that does not say: it stays on
    assert optimizers[0].param_groups[0]["cautious"] is True


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_checkpoint_of_timm(momentum, monkeypatch):
    params, copies = parameters([(3, 4), (5,)]), parameters([(3, 4), (5,)])
    theirs = timm_rmsprop_tf(monkeypatch)(copies, momentum=momentum, caution=True)
    give_gradients(params, copies)
    theirs.step()
    ours = tritonopt.RMSprop(params)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for param, twin in zip(params, copies, strict=True):
        param.data.copy_(twin)
    for _ in range(3):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        torch.testing.assert_close(params, copies, rtol=1e-5, atol=1e-6)
    assert ours.param_groups[0]["cautious"] is True


def test_what_is_described(monkeypatch, device):
    """A kernel reads gradient and state twice; a CPU does so where they leave its cache."""
    monkeypatch.setattr(sweep.Sweep, "once", 1000)
    params = parameters([(1000,), (2000,)], device=device)
    twice = 3000 if path(device)[0] == "kernel" else 2000
    ours = cautious(params)
    for _ in range(2):
        table = ours.describe().splitlines()
        assert table[1].split()[-1] == f"{3000 * 28 + twice * 12:,}"
        assert "group 0: cautious=True" in table
        give_gradients(params, params)
        ours.step()


def test_what_is_refused():
    params = parameters([(3,)])
    with pytest.raises(ValueError, match="cautious=True requires a momentum"):
        tritonopt.RMSprop(params, cautious=True)
    with pytest.raises(ValueError, match="cautious=True is not in torch's code"):
        cautious(params, foreach=True)
    with pytest.raises(ValueError, match="needs momentum_buffers for cautious"):
        lists = ([torch.ones(3)] for _ in range(3))
        torch.ops.tritonopt.rmsprop_(*lists, [], [], [], cautious=True)
