"""State as torch makes it, in slabs; and the moves of parameters and loaded state into slabs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from tritonopt import slab
from tritonopt.eligible import why_not_native
from tritonopt.shard import is_sharded

_SCALAR = torch.empty((), device="meta")


@torch.inference_mode(False)  # else it could not be updated outside of that mode
def make_state(
    state: MutableMapping[Tensor, Any],
    params: Sequence[Tensor],
    starts: Mapping[str, float],
    like_gradient: Sequence[str],
    on_device: bool,
) -> None:
    """For each parameter, tensors of its shape that begin with `starts`, and a count of steps.

    `like_gradient`: the keys that have the gradient's dtype. `on_device`: where steps are counted.
    """
    scalar = _get_scalar_dtype()
    kinds: dict[Any, list[Tensor]] = {}
    if len({(p.device, p.dtype) for p in params}) > 1:
        for param in params:
            state[param]  # so that entries stand in torch's order  # noqa: B018
    for param in params:
        if _makes_plain(param):
            kinds.setdefault(param.grad.dtype, []).append(param)  # type: ignore[union-attr]
            continue
        entry: Any = state[param]
        entry["step"] = torch.zeros((), dtype=scalar, device=_home(param, on_device))
        for key, start in starts.items():  # of its type, which sharded checkpoints need
            like: Any = param.grad if key in like_gradient else param
            entry[key] = torch.full_like(like, start)
    for grad_dtype, members in kinds.items():
        for batch in slab.batches(members):
            device, dtype = batch[0].device, batch[0].dtype
            home, scalars = _home(batch[0], on_device), [_SCALAR] * len(batch)
            columns = {"step": slab.allocate(scalars, scalar, home, alignment=1)}
            for key, start in starts.items():
                kind = grad_dtype if key in like_gradient else dtype
                columns[key] = slab.allocate(batch, kind, device, start)
            for number, param in enumerate(batch):
                entry = {key: column[number] for key, column in columns.items()}
                if state.get(param) is None:
                    state[param] = entry
                else:
                    state[param].update(entry)


def _home(param: Tensor, on_device: bool) -> torch.device:
    return param.device if on_device else torch.device("cpu")


def _makes_plain(param: Tensor) -> bool:
    """Whether what is made like it is a plain tensor."""
    plain = type(param).__torch_function__ is torch._C._disabled_torch_function_impl
    return (plain or type(param) is Tensor) and not is_sharded(param) and not param.is_complex()


def pack_on_accelerator(params: Iterable[Tensor]) -> None:
    """Once an optimizer has them: a graph that is captured later may know where they lie."""
    slab.pack(p for p in dict.fromkeys(params) if p.device.type != "cpu" and _may_move(p))


def pack_on_cpu(
    params: Iterable[Tensor], state: Mapping[Tensor, Any], keys: Iterable[str]
) -> None:
    """At the first step: until then models are moved, cast and wrapped, and state is loaded."""
    movable = [p for p in dict.fromkeys(params) if p.is_cpu and _may_move(p)]
    slab.pack(movable)
    entries = [entry for entry in map(state.get, movable) if entry]
    for key in dict.fromkeys(keys):
        slab.pack(entry[key] for entry in entries if isinstance(entry.get(key), Tensor))
    steps = [entry["step"] for entry in entries if isinstance(entry.get("step"), Tensor)]
    slab.pack((step for step in steps if step.is_cpu), alignment=1)


def _may_move(param: Tensor) -> bool:
    return param.requires_grad and why_not_native(param) is None
