"""What half precision costs a training, and how it is kept: two halves of an fp32 parameter, state
in fp32, stochastic rounding. Options of a param group of any optimizer here."""

from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonopt import quantized
from tritonopt.shard import coordinates

HALF = (torch.float16, torch.bfloat16)
OPTIONS = {"state_dtype": None, "master": None, "stochastic_rounding": False, "rounding_seed": 0}
"""Of a param group, with the values of torch's rule."""

Master = Literal["split"]
REMAINDER = "remainder"
"""Of the state: lower halves, int16 by their bits, which collectives do not know, bf16 by dtype."""


def check(group: dict[str, Any]) -> None:
    """Raises ValueError where an option has a wrong value or does not go with another."""
    values = {name: group.get(name, default) for name, default in OPTIONS.items()}
    if values["state_dtype"] not in (None, torch.float32):
        raise ValueError(f"Invalid state_dtype: {values['state_dtype']!r}, not torch.float32")
    if values["master"] not in (None, "split"):
        raise ValueError(f"Invalid master: {values['master']!r}, not 'split'")
    seed = values["rounding_seed"]
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise ValueError(f"Invalid rounding_seed: {seed!r}, not an int from 0 to 2**31 - 1")
    if seed and not values["stochastic_rounding"] and not group.get("quantized"):
        raise ValueError(
            "rounding_seed requires stochastic_rounding=True, or quantized=True, in each param "
            "group that has it: give it to that group alone"
        )
    if values["stochastic_rounding"] and values["master"]:
        raise ValueError("stochastic_rounding rounds, and master='split' does not: leave one out")


def why_not(group: dict[str, Any], param: Tensor) -> str | None:
    """Why a parameter cannot be updated as the options say."""
    dtype = str(param.dtype).removeprefix("torch.")
    if group.get("master") and param.dtype != torch.bfloat16:
        return f"is {dtype}, not bfloat16: give it to a param group without master"
    if group.get("quantized") and param.dtype == torch.float64:
        return "is float64: give it to a param group without quantized"
    if group.get("stochastic_rounding") and param.dtype == torch.float16:
        return "is float16, which only bfloat16 is rounded to stochastically"
    return None


def dtype_of(group: dict[str, Any], key: str, param: Tensor) -> torch.dtype | None:
    """The dtype of a parameter's state that options ask for; None: what torch gives it."""
    if key == REMAINDER:
        return torch.bfloat16
    if key == quantized.CODE:
        return torch.uint8
    in_single = group.get("state_dtype") or group.get("master") or key == quantized.SCALE
    in_single = in_single or (group.get("quantized") and key == quantized.TORCHS)  # loaded
    return torch.float32 if in_single and key != "step" and param.dtype in HALF else None


def fitted(
    group: dict[str, Any], param: Tensor, entry: dict[str, Any], keys: Sequence[str]
) -> dict[str, Any]:
    """State with `keys` in the dtypes that options ask for. Where there is no remainder, it is 0.

    Raises:
        ValueError: the remainder is not what was saved.
    """
    if quantized.CODE in keys:
        entry = quantized.compressed(entry, param)
    elif quantized.CODE in entry:  # an option that is no more
        entry = quantized.expanded(entry)
        as_now = dtype_of(group, quantized.TORCHS, param) or param.dtype
        entry[quantized.TORCHS] = entry[quantized.TORCHS].to(as_now)
    if REMAINDER in entry and REMAINDER not in keys:  # what was joined to it has changed since
        entry = {key: value for key, value in entry.items() if key != REMAINDER}
    if group.get("master") and REMAINDER not in entry:
        entry = {**entry, REMAINDER: torch.zeros_like(param, requires_grad=False)}
    for key in entry.keys() & keys:
        value, dtype = entry[key], dtype_of(group, key, param)
        if isinstance(value, Tensor) and dtype not in (None, value.dtype):
            if key == REMAINDER:
                raise ValueError(
                    f"state {key!r} was converted to {value.dtype}, which is no number to convert: "
                    "delete it, to go on from parameters as they are"
                )
            entry = {**entry, key: value.to(dtype)}
    return entry


def restore(optimizer: Any, saved: dict[str, Any]) -> None:
    """What torch has loaded, in the dtypes that options ask for: it converts to the parameter's."""
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    pairs = ((group, param) for group in optimizer.param_groups for param in group["params"])
    for number, (group, param) in zip(ids, pairs, strict=True):
        for key, value in (saved["state"].get(number) or {}).items():
            dtype = dtype_of(group, key, param)
            if dtype is not None and isinstance(value, Tensor) and value.dtype == dtype:
                optimizer.state[param][key] = value.to(param.device)


def origin(group: int, index: int, param: Tensor) -> int:
    """Where the counters of a parameter begin, by its place in the optimizer: far from all others.
    Shards draw other bits than each other, replicas the same."""
    place = repr((group, index, coordinates(param))).encode()
    return int.from_bytes(blake2b(place, digest_size=8).digest(), "little") >> 2


NAN = 0x7FC00000
"""The greatest number that is looked at: one with more bits that are 1 would become another."""


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves of fp32: the nearest bf16, and what it lacks, in 2^-16 of its last place."""
    magnitude = (x.view(torch.int32) & 0x7FFFFFFF).clamp_max_(NAN)
    high = (magnitude + 0x8000) & -0x10000
    low = (magnitude - high).to(torch.int16)
    high = (high >> 16).to(torch.int16) | (x.view(torch.int32) >> 16).to(torch.int16) & -0x8000
    return high.view(torch.bfloat16), low


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 of which these are the halves. What somebody has set to 0 since is 0, or nearly."""
    bits, low = high.view(torch.int16).to(torch.int32) << 16, low.view(torch.int16)
    magnitude = ((bits & 0x7FFFFFFF) + low).clamp_min_(0)
    return (bits.bitwise_and_(-0x80000000) | magnitude).view(torch.float32)


class Noise(NamedTuple):
    """Random bits for stochastic rounding and for codes, of one step of some tensors.

    16 for each element and column, from Philox4x32-10: its key is the seed and the number of the
    tensor's step, its counter says where the element lies, so that every path draws the same.
    """

    seed: int
    origins: Sequence[int]  # of each tensor, where its counters begin
    steps: float | Tensor  # of all tensors, or of each
    is_stochastic: bool = True  # whether bf16 takes some, and not codes alone

    def is_for(self, tensor: Tensor | None) -> bool:
        dtype = None if tensor is None else tensor.dtype
        return dtype is torch.uint8 or (self.is_stochastic and dtype is torch.bfloat16)

    def like(self, tensors: Sequence[Any]) -> list[Tensor | None]:
        """For one parameter and its state, in the order of its elements."""
        return [
            self.of([0], [tensor.numel()], 0, column).view(tensor.size())
            if self.is_for(tensor)
            else None
            for column, tensor in enumerate(tensors)
        ]

    def of(self, some: Sequence[int], numels: Sequence[int], first: int, column: int) -> Tensor:
        """From element `first` of tensors that lie side by side on; each has `numels` elements."""
        counts = torch.tensor([(numel + 7) // 8 for numel in numels], device="cpu")
        total = int(counts.sum())
        index = torch.arange(total, device="cpu")
        ends = counts.cumsum(0)

        def of_each(values: Any) -> Tensor:
            return torch.repeat_interleave(torch.as_tensor(values, device="cpu"), counts)

        lower = index - of_each(ends - counts)
        at = lower + of_each([self.origins[i] for i in some]) + first // 8
        step: Any = self.steps
        if isinstance(step, Tensor):
            step = of_each(step[list(some)].to("cpu", torch.int64))
        else:
            step = int(step)
        words = philox(at & MASK, at >> 32, column, 0, self.seed, step)
        bits = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], -1)
        if all(numel % 8 == 0 for numel in numels):
            return bits.view(-1).to(torch.int32)
        inside = lower[:, None] * 8 + torch.arange(8, device="cpu") < of_each(numels)[:, None]
        return bits[inside].to(torch.int32)


MASK = 0xFFFFFFFF


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Four words of 32 random bits, in int64 (Salmon et al., Parallel Random Numbers: As Easy as 1,
    2, 3, 2011)."""
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (right >> 32) & MASK ^ c1 ^ k0, right & MASK
        c2, c3 = (left >> 32) & MASK ^ c3 ^ k1, left & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """Fp32 to one of the two nearest bf16, the nearer the likelier; `bits` are 16 random ones."""
    magnitude = (x.view(torch.int32) & 0x7FFFFFFF).clamp_max_(NAN)
    noisy = (magnitude + bits) & -0x10000 | x.view(torch.int32) & -0x80000000
    return noisy.view(torch.float32)
