"""Random models under random treatment, against torch's for-loop."""

import os

import pytest
import torch
from cases import OURS, TORCH, assert_follows
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from tritonopt import slab, sweep
from tritonopt.device import INTERPRET, path

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 30 if INTERPRET else 150))
FEW = 3 if INTERPRET else 15

PHASES = [Phase.generate] if INTERPRET else list(Phase)  # to shrink takes minutes there

sizes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
shapes = sizes | st.sampled_from([(1023,), (1025,), (33, 32), (64,), (1, 7, 1)])
seeds = st.integers(0, 2**31)
flags = st.booleans()
exact = path(torch.device("cpu"))[0] == "eager"  # a difference of 1 ulp decides what is NaN


def strided(draw, shape, dtype, generator, dense):
    """Random values of a random memory layout."""
    values = torch.randn(shape, generator=generator, dtype=dtype)
    order = draw(st.permutations(range(len(shape))))
    back = sorted(range(len(shape)), key=order.__getitem__)
    tensor = values.permute(order).contiguous().permute(back)
    kind = draw(st.integers(0, 7))
    if kind == 0 and not dense:
        return torch.stack([tensor, tensor], -1)[..., 0]
    if kind == 1:
        offset = draw(st.integers(1, 3))
        buffer = torch.zeros(tensor.numel() + offset, dtype=dtype)
        return buffer.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)
    if kind == 2 and not dense:
        return torch._neg_view(-tensor)
    return tensor


rmsprop = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.01, 0.3, 1]),
        "alpha": st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
        "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
        "weight_decay": st.sampled_from([0, 0.1]),
        "momentum": st.sampled_from([0, 0.9]),
        "centered": flags if exact else st.just(False),
        "maximize": flags,
    }
)
rprop = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.01, 0.3, 100.0]),
        "etas": st.sampled_from([(0.5, 1.2), (0.1, 3.0), (0.9, 1.01)]),
        "step_sizes": st.sampled_from([(1e-6, 50), (0.02, 0.2), (1.0, 0.1)]),
        "maximize": flags,
    }
)
kinds = {"RMSprop": rmsprop, "Rprop": rprop}


class Pair:
    """Our optimizer and torch's, and what may happen to both."""

    def __init__(self, draw, name):
        self.generator = torch.Generator().manual_seed(draw(seeds))
        self.draw = draw
        groups = []
        for _ in range(draw(st.integers(1, 2))):
            dtype = draw(st.sampled_from([torch.float32, torch.float64]))
            some = [
                nn.Parameter(strided(draw, shape, dtype, self.generator, dense=False).clone())
                if draw(flags)
                else nn.Parameter(strided(draw, shape, dtype, self.generator, dense=False))
                for shape in draw(st.lists(shapes, min_size=1, max_size=5))
            ]
            groups.append((some, draw(kinds[name])))
        self.params = [p for some, _ in groups for p in some]
        self.copies = [nn.Parameter(p.detach().clone()) for p in self.params]
        twins = dict(zip(self.params, self.copies, strict=True))
        self.ours = OURS[name]([{"params": some, **options} for some, options in groups])
        self.theirs = TORCH[name](
            [{"params": [twins[p] for p in some], **options} for some, options in groups],
            foreach=False,
        )

    def gradients(self):
        for param, twin in zip(self.params, self.copies, strict=True):
            if self.draw(st.integers(0, 5)) == 0:
                param.grad = twin.grad = None
                continue
            grad = strided(self.draw, param.shape, param.dtype, self.generator, dense=False)
            param.grad = grad
            twin.grad = grad.clone()

    def event(self):
        """Once in a while, something is moved, replaced or changed."""
        kind = self.draw(st.integers(0, 9))
        index = self.draw(st.integers(0, len(self.params) - 1))
        param, twin = self.params[index], self.copies[index]
        if kind == 0:
            param.data = param.data.clone()
        elif kind == 1:
            for optimizer in (self.ours, self.theirs):
                group = optimizer.param_groups[0]
                group["maximize"] = not group["maximize"]
        elif kind == 2:
            self.ours.state.pop(param, None)
            self.theirs.state.pop(twin, None)
        elif kind == 3 and param in self.ours.state:
            entry = self.ours.state[param]
            entry.update({k: t.clone() for k, t in entry.items()})
        elif kind == 4:
            state = self.ours.state_dict()
            clones = {i: {k: t.clone() for k, t in e.items()} for i, e in state["state"].items()}
            self.ours.load_state_dict({**state, "state": clones})


def random_training(examples):
    return settings(
        max_examples=examples, derandomize=True, deadline=None, phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.mark.parametrize("name", OURS)
@random_training(FEW)
@given(data=st.data())
def test_random_training(name, data):
    train(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
@random_training(EXAMPLES)
@given(data=st.data())
def test_much_random_training(name, data):
    train(name, data)


def train(name, data):
    with pytest.MonkeyPatch.context() as patch:
        piece = data.draw(st.sampled_from([2**18, sweep.SERIAL, 40, 1000]))
        patch.setattr(sweep.Sweep, "_piece", lambda *_: piece)
        patch.setattr(slab, "MAX_BYTES", data.draw(st.sampled_from([2**28, 500])))
        pair = Pair(data.draw, name)
        for _ in range(data.draw(st.integers(1, 5))):
            pair.event()
            pair.gradients()
            pair.ours.step()
            pair.theirs.step()
            assert_follows(pair.ours, pair.theirs, pair.params, pair.copies)
