"""What two processes do together in `test_distributed.py`; each scenario trains with a class.

Run as `python ranks.py FOLDER RANK`. It writes what went wrong in each scenario, nothing if nothing
did, to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tritonopt

OURS = {"RMSprop": tritonopt.RMSprop, "Rprop": tritonopt.Rprop}
TORCH = {"RMSprop": torch.optim.RMSprop, "Rprop": torch.optim.Rprop}  # for-loops on a CPU
KWARGS = {
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 1e-3},
    "Rprop": {"lr": 0.01},
}
STEPS = 6


def network():
    """Shards are uneven on two ranks (5 and 3 rows), or empty on one of them (1 row)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 1)
    )


def train(model, optimizer, steps=STEPS, first=0):
    """Every rank sees other data."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def whole(value):
    """DTensors gathered, containers copied, so that two results can be compared."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return [whole(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def result(model, optimizer):
    """Parameters and state. Ours has state before the first gradient, which torch has not."""
    states = [optimizer.state[p] for p in model.parameters()]
    used = [state if state and state["step"] > 0 else {} for state in states]
    return whole([list(model.parameters()), used])


def assert_equal(ours, theirs, where=""):
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        if where.endswith(".remainder"):  # as numbers, some are NaN
            ours, theirs = ours.view(torch.int16), theirs.view(torch.int16)
        assert torch.equal(ours, theirs), f"{where}: {ours} and {theirs}"
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), f"{where}: {ours.keys()} and {theirs.keys()}"
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert ours == theirs, f"{where}: {ours} and {theirs}"


# Engines: wrap the network, build the optimizer, and train.


def ddp(make, bucket_view, built_first):
    model = network()
    if built_first:
        optimizer = make(model.parameters())
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    if not built_first:
        optimizer = make(wrapped.parameters())
    train(wrapped, optimizer)
    return result(model, optimizer)


def flat(model, use_orig_params):
    return FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def fsdp1(make, use_orig_params):
    model = flat(network(), use_orig_params)
    optimizer = make(model.parameters())
    train(model, optimizer)
    return result(model, optimizer)


def sharded(model=None):
    model = network() if model is None else model
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2(make):
    model = sharded()
    optimizer = make(model.parameters())
    train(model, optimizer)
    for param in model.parameters():
        for key, value in optimizer.state[param].items():
            assert key == "step" or (
                isinstance(value, DTensor) and value.placements == param.placements
            )
    if isinstance(optimizer, tuple(OURS.values())):
        assert "left to torch" not in optimizer.describe(), optimizer.describe()
    return result(model, optimizer)


def as_ddp(make):
    """torch's Rprop cannot train DTensors: it assigns through a mask."""
    return fsdp2(make) if make.func is not torch.optim.Rprop else untouched(make, "ddp", STEPS)


WRAPPERS = DistributedDataParallel, functools.partial(flat, use_orig_params=True)


def in_backward(make):
    """Its hooks run when FSDP2 has reduced the gradients; some wait for the end of the pass."""
    if make.func not in OURS.values():
        return as_ddp(make)
    model = sharded()
    optimizer = make(model.parameters())
    tritonopt.step_in_backward(model, optimizer, bucket_bytes=40)
    train(model, optimizer)
    return result(model, optimizer)


def reduced_later(ours, theirs, folder):
    """What DDP and FSDP1 do to gradients comes too late. The module inside looks innocent, and is
    so until it is wrapped; FSDP1 calls no hooks of it then, so that a step after backward is right.
    """
    for wrap, when in itertools.product(WRAPPERS, ("wrapped", "inside", "before")):
        model = network()
        wrapped = wrap(model) if when != "before" else None
        optimizer = ours((wrapped or model).parameters())
        try:
            tritonopt.step_in_backward(wrapped if when == "wrapped" else model, optimizer)
            wrapped = wrapped or wrap(model)
            train(wrapped, optimizer, 1)
        except RuntimeError as error:
            assert "reduces gradients after step_in_backward" in str(error), error
            assert not optimizer.state
        else:
            assert (wrap, when) == (WRAPPERS[1], "before"), (wrap, when)
            assert {float(entry["step"]) for entry in optimizer.state.values()} == {1.0}


def clipped(ours, theirs, folder):
    """The norm inside the step is that of all ranks' shards."""
    model, reference = sharded(), DistributedDataParallel(network())
    optimizer = ours(model.parameters(), max_grad_norm=0.01)
    plain = theirs(reference.parameters())
    plain.register_step_pre_hook(
        lambda *_: norms.append(nn.utils.clip_grad_norm_(reference.parameters(), 0.01))
    )
    norms: list[torch.Tensor] = []
    train(model, optimizer, 1)
    train(reference, plain, 1)
    torch.testing.assert_close(optimizer.grad_norm, norms[0])
    for param, twin in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(param.full_tensor(), twin)


def loss_scale(ours, theirs, folder):
    """An infinite gradient on one rank skips the step on all, with the fused protocol, too."""

    def run(make, **kwargs):
        model = sharded()
        optimizer = make(model.parameters(), **kwargs)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
            loss = model(torch.randn(8, 4, generator=generator)).square().mean()
            scaler.scale(loss).backward()
            if step % 3 == 0 and dist.get_rank() == 1:
                next(model.parameters()).grad.to_local()[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        steps = {float(optimizer.state[p]["step"]) for p in model.parameters()}
        assert steps == {2.0} and scaler.get_scale() == 256.0
        return result(model, optimizer)

    assert_equal(run(ours, fused_amp=True), run(ours))


def compact(ours, theirs, folder):
    """State in half the memory, sharded, and through a distributed checkpoint."""
    outcomes = []
    for options in ({}, {"compact": True}):
        model = sharded()
        optimizer = ours(model.parameters(), **options)
        train(model, optimizer, 3)
        again = ours(model.parameters(), **options)
        set_optimizer_state_dict(model, again, get_optimizer_state_dict(model, optimizer))
        train(model, again, 3, 3)
        key = "signed_step_size" if options else "step_size"
        assert all(isinstance(again.state[p][key], DTensor) for p in model.parameters())
        saved = whole(get_optimizer_state_dict(model, again)["state"])
        outcomes.append((saved, whole([*model.parameters()])))
    (plain, params), (small, others) = outcomes
    torch.testing.assert_close(others, params)
    for name, entry in plain.items():
        assert torch.equal(small[name]["prev"], entry["prev"].sign()) and entry["step"] == 6
        torch.testing.assert_close(small[name]["step_size"], entry["step_size"])


HALF = [
    {"state_dtype": torch.float32},
    {"master": "split"},
    {"stochastic_rounding": True, "rounding_seed": 3},
]


def half(ours, theirs, folder):
    """Bf16, sharded: resumed to the last bit; replicas draw the same bits, shards do not."""

    def train(model, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
            optimizer.zero_grad()
            data = torch.randn(8, 4, generator=generator).bfloat16()
            model(data).square().mean().backward()
            optimizer.step()

    quantized = [{"quantized": True, "centered": False}]
    for options in HALF + (quantized if ours.func is tritonopt.RMSprop else []):
        ends = []
        for wrap in (sharded, lambda model: DistributedDataParallel(model)):
            model = wrap(network().bfloat16())
            first = ours(model.parameters(), **options)
            train(model, first, range(3))
            saved = whole(get_optimizer_state_dict(model, first))
            second = ours(model.parameters(), **options)
            set_optimizer_state_dict(model, second, get_optimizer_state_dict(model, first))
            assert_equal(whole(get_optimizer_state_dict(model, second))["state"], saved["state"])
            train(model, second, range(3, 6))
            copy = wrap(network().bfloat16())
            third = ours(copy.parameters(), **options)
            train(copy, third, range(6))
            assert_equal(result(model, second), result(copy, third))
            ends.append(result(model, second))
        assert all(("remainder" in entry) == ("master" in options) for entry in ends[0][1])
        everywhere = [None, None]
        dist.all_gather_object(everywhere, ends[1])
        assert_equal(*everywhere)
        if {"stochastic_rounding", "quantized"}.isdisjoint(options):
            assert_equal(ends[0], ends[1])


def cautious(ours, theirs, folder):
    """Whole parameters and their shards, of which some are empty, have the same means."""
    whole_ones = DistributedDataParallel(network())
    train(whole_ones, ours(whole_ones.parameters(), cautious=True))
    for options in ({}, {"compile": {"backend": "aot_eager"}}, {"fused_amp": True}):
        model = sharded()
        optimizer = ours(model.parameters(), cautious=True, **options)
        train(model, optimizer)
        assert "left to torch" not in optimizer.describe()
        for param, twin in zip(model.parameters(), whole_ones.parameters(), strict=True):
            torch.testing.assert_close(param.full_tensor(), twin)
    model = network()
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=ours.func, cautious=True, **ours.keywords
    )
    train(DistributedDataParallel(model), optimizer)
    assert_equal([*model.parameters()], [*whole_ones.parameters()])


def zero(make, bucket_view):
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(
        wrapped.parameters(), optimizer_class=make.func, parameters_as_bucket_view=bucket_view,
        **make.keywords,
    )  # fmt: skip
    train(wrapped, optimizer)
    optimizer.consolidate_state_dict(to=0)
    state = optimizer.state_dict()["state"] if dist.get_rank() == 0 else {}
    return whole([list(model.parameters()), state])


# Checkpoints: `before` steps, get, save, load and set into new ones, train on.

WRAP = {
    "ddp": lambda: DistributedDataParallel(network()),
    "fsdp1": lambda: flat(network(), use_orig_params=True),
    "fsdp2": sharded,
}
OPTIONS = {
    "sharded": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
}


def checkpoint(make, other, folder, engine, options, before):
    """`make` writes the checkpoint and trains on; `other` resumes from it and must equal that."""
    options = StateDictOptions(**OPTIONS[options])
    model = WRAP[possible(make, engine)]()
    optimizer = make(model.parameters())
    train(model, optimizer, before)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=folder)
    train(model, optimizer, 3, first=before)

    fresh = WRAP[possible(other, engine)]()
    resumed = other(fresh.parameters())
    state = {
        "model": get_model_state_dict(fresh, options=options),
        "optimizer": get_optimizer_state_dict(fresh, resumed, options=options),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(fresh, state["model"], options=options)
    set_optimizer_state_dict(fresh, resumed, state["optimizer"], options=options)
    train(fresh, resumed, 3, first=before)
    assert_equal(result(fresh, resumed), result(model, optimizer))
    return result(model, optimizer)


def untouched(make, engine, steps):
    model = WRAP[engine]()
    optimizer = make(model.parameters())
    train(model, optimizer, steps)
    return result(model, optimizer)


def possible(make, engine):
    return "ddp" if make.func is torch.optim.Rprop and engine == "fsdp2" else engine


ENGINES = {
    **{
        f"ddp, {'' if view else 'no '}bucket view, built {'before' if first else 'after'}":
            functools.partial(ddp, bucket_view=view, built_first=first)
        for view, first in itertools.product([False, True], [False, True])
    },
    "fsdp1, flat parameters": functools.partial(fsdp1, use_orig_params=False),
    "fsdp1, original parameters": functools.partial(fsdp1, use_orig_params=True),
    "fsdp2": as_ddp,
    "fsdp2, steps in backward": in_backward,
    "zero, parameters": functools.partial(zero, bucket_view=False),
    "zero, bucket views": functools.partial(zero, bucket_view=True),
}  # fmt: skip
WAYS = [  # who writes, who reads, after how many steps
    ("ours", "ours", 0),
    ("ours", "ours", 3),
    ("ours", "torch", 3),
    ("torch", "ours", 3),
]  # torch's own dummy step before the first one changes its state: nothing to compare with


def compare(run, ours, theirs, folder):
    assert_equal(run(ours), run(theirs))


def resume(writer, reader, engine, options, before, ours, theirs, folder):
    make = {"ours": ours, "torch": theirs}
    trained = checkpoint(make[writer], make[reader], folder, engine, options, before)
    assert_equal(trained, untouched(theirs, possible(theirs, engine), before + 3))


def scenarios():
    """Readable ids, and what to do with our class, torch's, and a folder."""
    rows = {title: functools.partial(compare, run) for title, run in ENGINES.items()}
    rows["fsdp2, clipped inside the step"] = clipped
    rows["fsdp2, loss scale"] = loss_scale
    rows["ddp and fsdp1, steps in backward"] = reduced_later
    for engine, options, way in itertools.product(WRAP, OPTIONS, WAYS):
        if (engine, options) == ("fsdp1", "sharded"):
            continue  # torch cannot load what it saved there: it looks for "param_groups."
        writer, reader, before = way
        title = f"dcp, {engine}, {options}, {writer} to {reader}, step {before}"
        rows[title] = functools.partial(resume, writer, reader, engine, options, before)
    both = {
        f"{name}, {title}": functools.partial(run, *classes(name))
        for name, (title, run) in itertools.product(OURS, rows.items())
    }
    both |= {f"{name}, half precision": functools.partial(half, *classes(name)) for name in OURS}
    both["RMSprop, fsdp2, cautious"] = functools.partial(cautious, *classes("RMSprop"))
    return {**both, "Rprop, fsdp2, compact": functools.partial(compact, *classes("Rprop"))}


def classes(name):
    return [functools.partial(source[name], **KWARGS[name]) for source in (OURS, TORCH)]


def main(folder, rank, stride):
    """Runs every `stride`-th scenario."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    failures = {}
    for number, (title, run) in list(enumerate(scenarios().items()))[::stride]:
        try:
            run(str(folder / str(number)))
        except (Exception, dcp.api.CheckpointException):
            failures[title] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps([number, failures]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
