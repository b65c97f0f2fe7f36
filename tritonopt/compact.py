"""Rprop's state in 4 bytes an element: of the last gradient only the sign counts.

It lies in the two lowest bits of a step size, as -1, 0 or 1, and the step size in those above,
rounded to nearest: to within 2 units in its last place. In torch's state they are two tensors.
"""

from typing import Any

import torch
from torch import Tensor

from tritonopt.eager import Scratch, rprop_
from tritonopt.shard import local


def encoded(prev: Tensor, step_size: Tensor) -> Tensor:
    bits = ((step_size.view(torch.int32) + 2) & -4) | (torch.sign(prev).to(torch.int32) & 3)
    return bits.view(torch.float32)


def decoded(code: Tensor) -> tuple[Tensor, Tensor]:
    """The sign as -1, 0 or 1, and the step size."""
    bits = code.view(torch.int32)
    return ((bits & 1) - (bits & 2)).to(torch.float32), (bits & -4).view(torch.float32)


def compact_rprop_(
    param: Tensor, grad: Tensor, code: Tensor, scratch: Scratch, **hyper: Any
) -> None:
    """:func:`tritonopt.eager.rprop_` of what is decoded. A product of `grad` and a sign never
    underflows to 0, as one of two small gradients does in torch."""
    prev, product = scratch.first, scratch.second
    if prev is None or product is None:
        prev, step_size = decoded(code)
        rprop_(param, grad, prev, step_size, scratch, **hyper)
        code.copy_(encoded(prev, step_size))
        return
    bits, signs, twos = (tensor.view(torch.int32) for tensor in (code, product, prev))
    torch.bitwise_and(bits, 1, out=signs).sub_(torch.bitwise_and(bits, 2, out=twos))
    prev.copy_(signs)
    bits.bitwise_and_(-4)
    rprop_(param, grad, prev, code, Scratch(None, product), **hyper)
    signs.copy_(prev.sign_()).bitwise_and_(3)
    bits.add_(2).bitwise_and_(-4).bitwise_or_(signs)


def compress(entry: dict[str, Any]) -> None:
    """Makes torch's two tensors one."""
    if "prev" in entry:
        code = entry["step_size"].clone()  # what was loaded may belong to who loads it
        # As the sum of another NaN and 2 may be a number.
        local(code).nan_to_num_(torch.nan, torch.inf, -torch.inf)
        local(code).copy_(encoded(local(entry.pop("prev")), local(code)))
        entry["step_size"] = code


def expanded(entry: Any) -> Any:
    """Torch's two tensors, of the same type as the one: those of a checkpoint."""
    if not isinstance(entry, dict) or "step_size" not in entry:
        return entry
    columns = entry["step_size"].clone(), entry["step_size"].clone()
    for column, values in zip(columns, decoded(local(entry["step_size"])), strict=True):
        local(column).copy_(values)
    step = {"step": entry["step"]} if "step" in entry else {}
    return {**step, "prev": columns[0], **entry, "step_size": columns[1]}
