"""State as torch makes it, in slabs; and the moves of parameters and loaded state into slabs."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from tritonopt import slab
from tritonopt.eligible import why_not_native
from tritonopt.quantized import SCALE, blocks
from tritonopt.shard import is_sharded, local


@torch.inference_mode(False)
def make_state(
    state: MutableMapping[Tensor, Any], params: Sequence[Tensor], starts: Mapping[str, float],
    like_gradient: Sequence[str], on_device: bool,
    dtype_of: Callable[[str, Tensor], torch.dtype | None] = lambda key, param: None,
) -> None:  # fmt: skip
    """For each parameter, tensors of its shape that begin with `starts`, and a count of steps.

    `like_gradient`: the keys that have the gradient's dtype, unless `dtype_of` key and parameter
    says another one than the parameter's. `on_device`: where steps are counted.
    """

    def kind(param: Any) -> object:
        return (param.device, param.dtype, param.grad.dtype) if _makes_plain(param) else id(param)

    scalar = torch.empty((), dtype=_get_scalar_dtype(), device="meta")
    for param in params:
        state.setdefault(param, {})  # all before any is filled: in torch's order
    for batch in slab.batches(params, kind):
        first = batch[0]
        home = first.device if on_device else torch.device("cpu")
        columns = {"step": slab.allocate([scalar] * len(batch), scalar.dtype, home)}
        for key, start in starts.items():
            like: Any = first.grad if key in like_gradient else first
            # One that makes no plain tensors is alone; sharded checkpoints need its type.
            shapes = batch if _makes_plain(first) else [like]
            dtype = dtype_of(key, first) or like.dtype
            if key == SCALE:
                shapes = [torch.empty(blocks(local(p).numel()), device="meta") for p in batch]
            columns[key] = slab.allocate(shapes, dtype, like.device, start)
        for param, *values in zip(batch, *columns.values(), strict=True):
            state[param].update(zip(columns, values, strict=True))


def _makes_plain(param: Tensor) -> bool:
    """Whether what is made like it is a plain tensor."""
    plain = type(param).__torch_function__ is torch._C._disabled_torch_function_impl
    return (plain or type(param) is Tensor) and not is_sharded(param) and not param.is_complex()


def pack_on_cpu(params: Iterable[Tensor], state: Mapping[Tensor, Any], keys: Iterable[str]) -> None:
    """At the first step: until then models are moved, cast and wrapped, and state is loaded."""
    movable = [p for p in params if p.is_cpu and may_move(p)]
    slab.pack(movable)
    for key in dict.fromkeys(("step", *keys)):
        values = [state[p].get(key) for p in movable if state.get(p)]
        slab.pack(value for value in values if isinstance(value, Tensor) and value.is_cpu)


def may_move(param: Tensor) -> bool:
    return param.requires_grad and why_not_native(param) is None
