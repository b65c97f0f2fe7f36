"""Averages of squares in 8 bits: of a block of 256 elements the greatest in fp32, and of each
element how far it lies below that, in eighths of a power of 2.

A code of 255 is the greatest itself, one of 1 lies 31.75 powers of 2 below: less counts as that.
Only 0 is 0. What is in between becomes one of two codes at random, right on average: by the nearest
one, an average that moves by less than half a code a step would never move.
"""

from typing import Any

import torch
from torch import Tensor

from tritonopt.eligible import same_layout
from tritonopt.shard import local, same_shards

BLOCK = 256  # elements that have one scale
CODE, SCALE = "square_avg_code", "square_avg_scale"  # of the state, in place of torch's
TORCHS = "square_avg"

with torch.inference_mode(False):
    POWERS = 2 ** ((torch.arange(256, dtype=torch.float64, device="cpu") - 255) / 8)
    POWERS[0] = 0
    POWERS = POWERS.float()
    MIDDLES = 2 ** ((torch.arange(1, 255, dtype=torch.float64, device="cpu") - 254.5) / 8)
    MIDDLES = MIDDLES.float()  # from which on a number is the next code's
MANTISSAS = [float(2 ** (k / 8)) for k in range(8)]
PER_WIDTH = 2**16 / (2 ** (1 / 8) - 1)  # random bits' range, by how far codes lie apart
BOUNDS = (POWERS[248:255].view(torch.int32) & 0x7FFFFF).tolist()  # mantissas where codes begin


def blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def decoded(code: Tensor, scale: Tensor) -> Tensor:
    """In fp32, of flat codes; the scales of all their blocks."""
    each = scale.repeat_interleave(BLOCK)[: code.numel()]
    if not torch.compiler.is_compiling():
        return POWERS.to(code.device)[code.int()].mul_(each)
    number = code.to(torch.int32) + 1
    power = torch.full_like(each, MANTISSAS[0])
    for k in range(1, 8):
        power = torch.where(number & 7 == k, MANTISSAS[k], power)
    bits = power.view(torch.int32) + (((number >> 3) - 32) << 23)
    return torch.where(code == 0, 0.0, bits.view(torch.float32)) * each


def encoded(square_avg: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of flat fp32: by 16 random bits for each, or the nearest."""
    numel = square_avg.numel()
    whole = torch.nn.functional.pad(square_avg, (0, blocks(numel) * BLOCK - numel)).view(-1, BLOCK)
    scale = whole.amax(1)
    ratio = (whole / scale[:, None]).view(-1)[:numel]
    if noise is None:
        code = torch.bucketize(ratio, MIDDLES.to(ratio.device), right=True).add_(1)
    else:
        bits = ratio.view(torch.int32)
        mantissa = bits & 0x7FFFFF
        code, begin = 255 + 8 * ((bits >> 23) - 127), torch.zeros_like(bits)
        for bound in BOUNDS:
            is_above = mantissa >= bound
            code, begin = code + is_above, torch.where(is_above, bound, begin)
        lower = (bits & -0x800000 | begin).view(torch.float32)
        is_next = (ratio - lower) * PER_WIDTH > (noise.float() + 0.5) * lower
        code = (code + is_next).clamp(1, 255)
    return torch.where(square_avg > 0, code, 0).to(torch.uint8), scale


def compressed(entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """An entry with torch's average as one with codes and scales, in the parameter's layout.

    Raises:
        ValueError: codes or scales are not what was made or saved.
    """
    numel, code = local(param).numel(), entry.get(CODE)
    scale: Any = entry.get(SCALE)
    if code is not None:
        fits = isinstance(code, Tensor) and code.dtype == torch.uint8
        fits = fits and same_layout(local(code), local(param))
        fits = fits and isinstance(scale, Tensor) and scale.dtype == torch.float32
        fits = fits and scale.size() == (blocks(numel),) and scale.is_contiguous()
        if not fits:
            what = f"{numel} elements laid out as the parameter: load_state_dict makes them so, "
            what += "of a checkpoint that is not flattened"
            raise ValueError(f"state {CODE!r} and {SCALE!r} are not of {what}")
        return entry
    square_avg = entry.get(TORCHS)
    if not isinstance(square_avg, Tensor) or square_avg.size() != param.size():
        return entry  # which lacks what the rule takes: the step says so
    if not same_shards(param, square_avg):
        return entry
    like = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
    flat = local(like).copy_(local(square_avg)).as_strided((numel,), (1,))
    codes, scale = encoded(flat)
    code = torch.empty_like(like, dtype=torch.uint8)
    local(code).as_strided((numel,), (1,)).copy_(codes)
    rest = {key: value for key, value in entry.items() if key != TORCHS}
    return {**rest, CODE: code, SCALE: scale}


def expanded(entry: Any) -> Any:
    """An entry with torch's average, in fp32: that of a checkpoint."""
    if not isinstance(entry, dict) or CODE not in entry:
        return entry
    code = entry[CODE]
    square_avg = torch.empty_like(code, dtype=torch.float32)
    numel = local(code).numel()
    flat = decoded(local(code).as_strided((numel,), (1,)), entry[SCALE])
    local(square_avg).as_strided((numel,), (1,)).copy_(flat)
    rest = {key: value for key, value in entry.items() if key not in (CODE, SCALE, TORCHS)}
    return {**rest, TORCHS: square_avg}
