"""Which tensors one launch or one sweep can take, and why others are left to torch."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from tritonopt.device import path
from tritonopt.shard import local, same_shards
from tritonopt.slab import is_dense

HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
BAD_GRADIENT = "has a gradient of another type, device or shape"


def why_watched() -> str | None:
    """Whether a mode watches operators, which it would have to see on the very tensors."""
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode"
    if torch._C._len_torch_function_stack():
        modes = _get_current_function_mode_stack()
        if not all(isinstance(mode, DeviceContext) for mode in modes):  # torch.set_default_device
            return "a TorchFunctionMode"
    return None


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is nothing but memory: an address, a shape and strides."""
    kind = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or is_lazy(tensor):
            return False
    return tensor.layout is torch.strided


def same_layout(left: Tensor, right: Tensor) -> bool:
    """Whether equal offsets are equal elements. Strides of dimensions of size 1 do not matter."""
    if left.size() != right.size():
        return False
    sizes = zip(left.size(), left.stride(), right.stride(), strict=True)
    return left.stride() == right.stride() or all(size == 1 or a == b for size, a, b in sizes)


def belongs(grad: Tensor, param: Tensor) -> bool:
    return is_plain(grad) and grad.device == param.device and grad.size() == param.size()


def why_not_native(param: Tensor) -> str | None:
    """Why a parameter is left to torch whatever its state and gradient are; None if it is not."""
    param = local(param)
    if param.layout is not torch.strided:
        return f"is {param.layout}".replace("torch.", "")
    if not is_plain(param):
        return f"is a {type(param).__name__}"
    if param.dtype not in (*HALF_OR_SINGLE, torch.float64):
        return f"is {param.dtype}".replace("torch.", "")
    if not is_dense(param):
        return "is not dense"
    if param.is_neg():
        return "is lazily negated"
    if param.is_inference():
        return "is an inference tensor"
    kind, name = path(param.device)
    return None if kind else name


def why_not_together(
    param: Tensor, grad: Tensor | None, states: Sequence[Tensor], codes: Sequence[Tensor] = ()
) -> str | None:
    """Why a parameter that has state is left to torch; None if a launch can take it. `codes` are
    state, too, of dtypes that do not matter."""
    if not all(same_shards(param, state) for state in (*states, *codes)):
        return "has state that is sharded in another way"
    if grad is not None and not same_shards(param, grad):
        return BAD_GRADIENT
    count = len(states)
    param, grad, *states = map(local, (param, grad, *states, *codes))
    for state in states:
        if not isinstance(state, Tensor) or not is_plain(state) or state.is_neg():
            return "has state that is not a plain tensor"
        if state.device != param.device:
            return f"has state on {state.device}"
        if not same_layout(state, param):
            return "has state of another shape or memory layout"
    if grad is not None and not belongs(grad, param):
        return BAD_GRADIENT
    of_state = {state.dtype for state in states[:count]}
    dtypes = of_state | {tensor.dtype for tensor in (param, grad) if tensor is not None}
    if len(dtypes) > 1 and (len(of_state) > 1 or not dtypes <= {*HALF_OR_SINGLE}):
        return "mixes dtypes: " + ", ".join(sorted(str(d).replace("torch.", "") for d in dtypes))
    return None


def overlapping(rows: Iterable[Sequence[Tensor]]) -> set[int]:
    """Rows (a parameter, its state) that share memory, which one launch would write twice."""
    ranges = []
    for index, row in enumerate(rows):
        for tensor in row:
            if is_plain(tensor) and not tensor.is_meta and (numel := tensor.numel()):
                if not tensor.is_contiguous():
                    dims = zip(tensor.size(), tensor.stride(), strict=True)
                    numel = 1 + sum((n - 1) * s for n, s in dims)
                start = tensor.data_ptr()
                ranges.append((start, start + numel * tensor.itemsize, index))
    found: set[int] = set()
    end, owner = 0, -1
    for start, stop, index in sorted(ranges):
        if start < end:
            found |= {index, owner}
        end, owner = max((end, owner), (stop, index))
    return found
