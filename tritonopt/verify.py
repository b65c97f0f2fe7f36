"""Whether many tensors are still what they were, and where they were: asked at every step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from tritonopt.eligible import is_plain


def guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What says whether others have the type, dtype, device, sizes, strides and lazy negation.

    Dynamo's own check, at 40 ns a tensor: attribute by attribute it costs four times that. It says
    no too often (of None, and it looks at autocast and inference mode, too), never yes wrongly;
    after a no, every tensor is looked at in turn.
    """
    sizes: Any = [list(t.size()) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    with torch.no_grad():  # as in the step: it notes whether a gradient is required
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return guards.check


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def chunks(count: int) -> list[slice]:
    """Of tensors of which one look warms the cache for the next: 4000 fill more than a core's."""
    return [slice(first, first + 512) for first in range(0, count, 512)]


def geometry(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(is_plain(t), t.dtype, t.device, t.size(), t.stride(), t.is_neg()) for t in tensors]
