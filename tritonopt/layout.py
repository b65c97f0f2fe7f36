"""Where the tensors of one param group lie and which path updates them: verified at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, compress, repeat
from operator import is_, is_not, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.optim.optimizer import _get_capturable_supported_devices

from tritonopt import slab
from tritonopt.device import is_capturing, path
from tritonopt.scaling import NONE, Scaling
from tritonopt.shard import is_sharded, local, same_shards
from tritonopt.sweep import Sweep

_CAPTURABLE = _get_capturable_supported_devices()
HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


class Rule(NamedTuple):
    """What tells one optimizer from the other."""

    title: str  # the optimizer's name in torch's error texts
    name: str  # of the eager rule, of the launcher and of the op
    eager: Callable[..., None]
    keys: tuple[str, ...]  # of the state a group needs, besides "step"
    all_keys: tuple[str, ...]  # in the order in which the rule takes them
    counts: bool = False  # whether it takes the number of steps, too
    sweep: Callable[..., Sweep] = Sweep


IMMUTABLE = (int, float, str, type(None))
"""Types of options that are what they were. A tensor or an array may have been written to."""

BAD_GRADIENT = "has a gradient of another type, device or shape"


class Stale(Exception):
    """A gradient does not fit the layout: it must be made again."""


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is nothing but memory: an address, a shape and strides."""
    return (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and tensor.layout is torch.strided
        and not torch.nn.parameter.is_lazy(tensor)
    )


def same_layout(left: Tensor, right: Tensor) -> bool:
    """Whether equal offsets are equal elements. Strides of dimensions of size 1 do not matter."""
    return left.size() == right.size() and all(
        size == 1 or a == b
        for size, a, b in zip(left.size(), left.stride(), right.stride(), strict=True)
    )


def _belongs(grad: Tensor, param: Tensor) -> bool:
    return is_plain(grad) and grad.device == param.device and grad.size() == param.size()


def why_not_native(param: Tensor) -> str | None:
    """Why a parameter is left to torch whatever its state and gradient are; None if it is not."""
    param = local(param)
    if not is_plain(param):
        return f"is a {type(param).__name__}" if type(param) is not Tensor else f"is {param.layout}"
    if param.dtype not in (*HALF_OR_SINGLE, torch.float64):
        return f"is {param.dtype}".replace("torch.", "")
    if not slab.is_dense(param):
        return "is not dense"
    if param.is_neg():
        return "is lazily negated"
    kind, name = path(param.device)
    return None if kind else name


def why_not_together(param: Tensor, grad: Tensor | None, states: Sequence[Tensor]) -> str | None:
    """Why a parameter that has state is left to torch; None if a launch can take it."""
    if not all(same_shards(param, state) for state in states):
        return "has state that is sharded in another way"
    if grad is not None and not same_shards(param, grad):
        return BAD_GRADIENT
    param, grad, states = local(param), local(grad), [local(state) for state in states]
    for tensor in states:
        if not isinstance(tensor, Tensor) or not is_plain(tensor) or tensor.is_neg():
            return "has state that is not a plain tensor"
        if tensor.device != param.device:
            return f"has state on {tensor.device}"
        if not same_layout(tensor, param) or not slab.is_dense(tensor):
            return "has state of another shape or memory layout"
    if grad is not None and grad.layout is torch.strided:
        if not _belongs(grad, param):
            return BAD_GRADIENT
    dtypes = {t.dtype for t in (param, *states, *([] if grad is None else [grad]))}
    if len({s.dtype for s in states}) > 1 or not (len(dtypes) == 1 or dtypes <= {*HALF_OR_SINGLE}):
        return "mixes dtypes: " + ", ".join(sorted(str(d).replace("torch.", "") for d in dtypes))
    return None


class Guards:
    """Checks type, dtype, device, sizes, strides and lazy negation of many tensors, at 40 ns each.

    Dynamo's own check: attribute by attribute it costs four times that. It says no too often (it
    looks at autocast and inference mode, too), never yes wrongly; after a no, every tensor is
    looked at in turn.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        given = [t for t in tensors if t is not None]
        self.of_all = len(given) == len(tensors)
        self._given = [] if self.of_all else _given(tensors)
        sizes: Any = [list(t.size()) for t in given]
        strides: Any = [list(t.stride()) for t in given]
        with torch.no_grad():  # as in the step: they note whether a gradient is required
            guards = TensorGuards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._check = guards.check

    def fit(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the same ones are None, and the others as they were."""
        if self.of_all:
            return self._check(*tensors)
        return _given(tensors) == self._given and self._check(*compress(tensors, self._given))


class Place:
    """Where tensors lie and how: in chunks, of which the first look warms the cache for the second.

    4000 tensors with their storages fill more than a core's own cache.
    """

    CHUNK = 256

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._chunks = []
        for first in range(0, len(tensors), self.CHUNK):
            where = slice(first, first + self.CHUNK)
            chunk = tensors[where]
            self._chunks.append((where, _addresses(chunk), Guards(chunk), _geometry(chunk)))

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        for where, addresses, guards, geometry in self._chunks:
            chunk = tensors[where]
            if _addresses(chunk) != addresses:
                return False
            if not guards.fit(chunk) and _geometry(chunk) != geometry:
                return False
        return True


def _given(tensors: Sequence[Tensor | None]) -> list[bool]:
    return list(map(is_not, tensors, repeat(None)))


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _geometry(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.dtype, t.device, t.size(), t.stride(), t.is_neg()) for t in tensors]


class Bucket:
    """Parameters of one group, device and dtype, updated by one launch or one sweep."""

    def __init__(self, rule: Rule, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        self.rule = rule
        self.owners = params
        self.sharded = any(map(is_sharded, params))
        self.params = params = self._local(params)
        self.states = states
        self.device = params[0].device
        self.dtype = params[0].dtype
        self.keys = ("step", *rule.keys)
        self._held = {key: list(map(itemgetter(key), states)) for key in self.keys}
        self.columns = {key: self._local(column) for key, column in self._held.items()}
        self._steps_at = _addresses(self.columns["step"])  # without dimensions: no more to look at
        self.tensors = list(chain(params, *(self.columns[key] for key in rule.keys)))
        self._place = Place(self.tensors)
        grads = (p.grad for p in self.owners)
        self.grad_dtype = next((g.dtype for g in grads if g is not None), self.dtype)
        self._expected: Guards | None = None  # of gradients that need no look, one by one
        self._all_given = False  # whether the gradients last asked for are
        self._steps, self._lone_steps = slab.spans([self.columns["step"]], len(params), 1, 1)

        columns = [self.columns.get(key) for key in rule.all_keys]
        self.update: Callable[..., None]
        if path(self.device)[0] == "eager":
            self.update = rule.sweep(rule.eager, params, columns)
        else:
            from tritonopt.kernels import launch

            self.update = launch.Launch(getattr(launch, rule.name), params, columns)

    def _local(self, tensors: list[Any]) -> list[Any]:
        return list(map(local, tensors)) if self.sharded else tensors

    def holds(self) -> bool:
        """Whether every parameter and state tensor still lies where it lay, and as it lay."""
        try:
            for key, column in self._held.items():
                if not all(map(is_, map(itemgetter(key), self.states), column)):
                    return False
        except KeyError:
            return False
        tensors = self.tensors
        if self.sharded:  # a DTensor may have got another part
            columns = (self._held[key] for key in self.rule.keys)
            tensors = self._local([*self.owners, *chain(*columns)])
        return _addresses(self.columns["step"]) == self._steps_at and self._place.holds(tensors)

    def gradients(self) -> list[Tensor | None] | None:
        """The gradients as the update needs them; None if there are none."""
        grads = [p.grad for p in self.owners]
        if self.sharded:
            both = zip(self.owners, grads, strict=True)
            if not all(grad is None or same_shards(param, grad) for param, grad in both):
                raise Stale
            grads = self._local(grads)
        if self._expected is not None and self._expected.fit(grads):
            self._all_given = self._expected.of_all
            return grads
        self._all_given = slab.all_given(grads)
        if not any(map(is_not, grads, repeat(None))):
            return None
        return self._fitted(grads)

    def _fitted(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        fitted: list[Tensor | None] = []
        for param, grad in zip(self.params, grads, strict=True):
            if grad is not None:
                if grad.layout is not torch.strided:
                    kind = "sparse gradients" if grad.is_sparse else f"{grad.layout} gradients"
                    raise RuntimeError(f"{self.rule.title} does not support {kind}")
                if grad.dtype != self.grad_dtype or not _belongs(grad, param):
                    raise Stale
                if not same_layout(grad, param) or grad.is_neg() or grad._is_zerotensor():
                    grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
            fitted.append(grad)
        if all(map(is_, fitted, grads)):
            self._expected = Guards(fitted)
        return fitted

    def count(self, grads: list[Tensor | None], skip: Tensor | None = None) -> None:
        """Adds 1 to the step of every parameter that has a gradient, unless `skip` is not 0."""
        one: Any = 1 if skip is None else (skip == 0).to(self.columns["step"][0])
        for span in self._steps:
            flat = span.flats[0]
            assert flat is not None
            if self._all_given:
                flat.add_(one)
            else:
                for part in slab.present(span, grads):
                    flat[part].add_(one)
        for index in self._lone_steps:
            if grads[index] is not None:
                self.states[index]["step"] += one

    def counts(self) -> float | Tensor:
        """The number of steps: of all parameters if it is one and the host knows it, or of each."""
        flat = self._steps[0].flats[0] if len(self._steps) == 1 and not self._lone_steps else None
        return common_count(self.columns["step"] if flat is None else flat)

    def step(
        self, grads: list[Tensor | None], hyper: dict[str, Any], scaling: Scaling = NONE
    ) -> None:
        self.count(grads, scaling.skip)
        if scaling is not NONE:
            hyper["factor"] = scaling.factor
        if scaling.skip is not None:
            hyper["skip"] = scaling.skip
        if self.rule.counts:
            hyper["step"] = self.counts()
        self.update(grads, **hyper)
        changed = self.owners
        if not self._all_given:
            changed = [p for p, g in zip(self.owners, grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(changed)  # a later backward must notice

    def reserve(self) -> None:
        """What a graph capture of later steps will need, and could not allocate itself."""
        if not isinstance(self.update, Sweep) and not is_capturing(self.device):
            self.update.reserve()  # type: ignore[attr-defined]

    @property
    def bytes_per_element(self) -> int:
        """Read parameter, gradient and state, write parameter and state."""
        states = [column[0].itemsize for key, column in self.columns.items() if key != "step"]
        return 2 * self.dtype.itemsize + self.grad_dtype.itemsize + 2 * sum(states)


def common_count(steps: Sequence[Tensor] | Tensor) -> float | Tensor:
    """The number of steps that all took, if the host knows it and it is one; else that of each."""
    counts = steps if isinstance(steps, Tensor) else torch.stack(list(steps))
    if not counts.is_cpu:
        return counts
    low, high = torch.aminmax(counts)
    return float(low) if low == high else counts


class Layout:
    """One param group as it lay when it was last looked at."""

    def __init__(
        self,
        rule: Rule,
        group: dict[str, Any],
        state: dict[Tensor, Any],
        why_torch: str | None,
    ) -> None:
        self.params: list[Tensor] = list(group["params"])
        self.flags: tuple[Any, ...] = ()  # that decided about it
        self.options: list[Any] | None = None  # that decided about the flags, and are right
        self.states = [state.get(p) for p in self.params]
        lacking = [not s or not s.keys() >= {*rule.keys} for s in self.states]
        self.stateless = list(compress(self.params, lacking))
        self.fallback: list[tuple[Tensor, str]] = []  # left to torch, and why
        self.steps = 0  # taken since

        members: dict[tuple[Any, ...], list[int]] = {}
        shared = overlapping([local(param) for param in self.params])
        for index, (param, entry) in enumerate(zip(self.params, self.states, strict=True)):
            if lacking[index] and not why_torch and param.grad is None:
                continue  # it may be lazy, or moved before its first gradient comes
            why = why_torch or why_not_native(param)
            if why is None and group["capturable"] and param.device.type not in _CAPTURABLE:
                why = f"capturable=True is not for {param.device.type}"  # torch raises
            if why is None and index in shared:
                why = "overlaps another parameter"
            if why is None:
                assert entry is not None
                tensors = [entry[key] for key in rule.keys]
                why = why_not_together(param, param.grad, tensors)
            if why is not None:
                self.fallback.append((param, why))
                continue
            grad_dtype = param.dtype if param.grad is None else param.grad.dtype
            key = (param.device, param.dtype, grad_dtype, tensors[0].dtype)
            members.setdefault(key, []).append(index)
        self.buckets = [
            Bucket(rule, [self.params[i] for i in some], [self.states[i] or {} for i in some])
            for some in members.values()
        ]
        self.provisional = any(why == BAD_GRADIENT for _, why in self.fallback)

    def lacks_state(self) -> bool:
        """Whether a parameter without state has got a gradient."""
        return bool(self.stateless) and any(p.grad is not None for p in self.stateless)

    def holds(self, params: list[Tensor], state: dict[Tensor, Any] | None) -> bool:
        """Whether nothing has been moved, replaced, added or removed.

        `state` None: every parameter's entry is known to be the same.
        """
        if self.provisional or len(params) != len(self.params):
            return False
        if not all(map(is_, params, self.params)):
            return False
        if state is not None and not all(map(is_, map(state.get, params), self.states)):
            return False
        for bucket in self.buckets:
            if not bucket.holds():
                return False
        return True


def overlapping(params: Sequence[Tensor]) -> set[int]:
    """Indices of parameters that share memory: one launch would write it twice at once."""
    ranges = []
    for index, param in enumerate(params):
        if is_plain(param) and param.numel() and param.device.type != "meta":
            last = sum((n - 1) * s for n, s in zip(param.size(), param.stride(), strict=True))
            start = param.data_ptr()
            ranges.append((start, start + (last + 1) * param.itemsize, index))
    ranges.sort()
    found: set[int] = set()
    end, owner = 0, -1
    for start, stop, index in ranges:
        if start < end:
            found |= {index, owner}
        if stop > end:
            end, owner = stop, index
    return found
