"""Rprop's state in 4 bytes an element: of the last gradient only the sign counts.

It lies in the two lowest bits of a step size, as -1, 0 or 1, and the step size in those above,
rounded to nearest: to within 2 units in its last place. In torch's state they are two tensors.
"""

from typing import Any

import torch
from torch import Tensor

from tritonopt.eager import Scratch, rprop_
from tritonopt.eligible import same_layout
from tritonopt.shard import local, same_shards

TORCHS = ("prev", "step_size")
KEY = "signed_step_size"  # of the state: none of torch's, whose tensors must not be mistaken for it


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


@torch.inference_mode(False)
def compressed(entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """An entry with torch's two tensors as one with the one; any other in the parameter's layout.

    Raises:
        ValueError: where a sign would lie is none, as the tensor is not of fp32.
    """
    code = entry.get(KEY)
    if isinstance(code, Tensor):  # torch's two beside it count for nothing, now and later
        if code.dtype != torch.float32:
            raise ValueError(f"{KEY} is to be of float32, not of {code.dtype}")
        if same_layout(local(code), local(param)) or code.size() != param.size():
            return entry
        return {**entry, KEY: torch.empty_like(param, requires_grad=False).copy_(code)}
    pair = [entry.get(key) for key in TORCHS]
    tensors = [t for t in pair if isinstance(t, Tensor) and t.size() == param.size()]
    if len(tensors) < 2 or not all(same_shards(param, tensor) for tensor in tensors):
        return entry  # which lacks what the rule takes: the step says so
    prev, step_size = (local(tensor).float() for tensor in tensors)
    code = torch.empty_like(param, requires_grad=False)
    # A NaN of its own: the sum of another one and 2 may be a number.
    step_size = step_size.nan_to_num(torch.nan, torch.inf, -torch.inf)
    local(code).copy_(encoded(prev, step_size))
    rest = {key: value for key, value in entry.items() if key not in TORCHS}
    return {**rest, KEY: code}


def expanded(entry: Any) -> Any:
    """Torch's two tensors, of the same type as the one: those of a checkpoint."""
    if not isinstance(entry, dict) or KEY not in entry:
        return entry
    made = {}
    for key, value in entry.items():
        if key == KEY:
            for name, column in zip(TORCHS, decoded(local(value)), strict=True):
                made[name] = torch.empty_like(value)
                local(made[name]).copy_(column)
        elif key not in TORCHS:
            made[key] = value
    return made
