"""The table that `describe()` prints."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from torch.nn.parameter import is_lazy

from tritonopt import slab
from tritonopt.device import path
from tritonopt.group import Group
from tritonopt.rule import RuleOptimizer
from tritonopt.shard import local
from tritonopt.sweep import Sweep
from tritonopt.units import Units

HEAD = "group|device|dtype|path|packed|in place|torch|elements|bytes/step".split("|")
SIDES = "><<<>>>>>"


def in_force(units: Units) -> dict[str, Any]:
    """Options that torch does not have and that concern all groups, where they are on."""
    optimizer = units.optimizer  # itself: Lightning wraps it in what imitates its class
    options = optimizer._of_all_groups()
    if optimizer._sweep is Sweep:
        options["compile"] = False  # without a compiler
    return {name: value for name, value in options.items() if value}


def table(units: Units) -> str:
    rows: list[Sequence[str]] = [HEAD]
    notes = [f"all groups: {name}={value}" for name, value in in_force(units).items()]
    sweep: Any = units.optimizer._sweep
    sweep_path = getattr(sweep, "func", sweep).path
    for index, known in enumerate(units.each_group()):
        options = RuleOptimizer._beyond_torch(units.optimizer, known.options)
        notes += [f"group {index}: {options}"] if options else []
        totals: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        reasons: Counter[str] = Counter()
        for kind, column, numel, nbytes, why in _members(known, sweep_path, units.packed):
            totals[kind].update({column: 1, "elements": numel, "bytes/step": nbytes})
            if why is not None:
                reasons[f"{column.replace('torch', 'left to torch')}: {why}"] += 1
        for kind, total in totals.items():
            cells = [f"{total[name]:,}" for name in HEAD[4:]]
            if total["torch"]:
                cells[-1] = "-"  # torch's functions are not looked into
            rows.append((str(index), *(text.removeprefix("torch.") for text in kind), *cells))
        notes += [f"group {index}: {count} {reason}" for reason, count in reasons.items()]
        waiting = len(known.waiting) - (0 if known.native else len(known.expected()))
        if waiting:
            notes.append(f"group {index}: {waiting} without state until their first gradient")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map("{:{}{}}".format, row, SIDES, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *notes])


def _members(known: Group, sweep_path: str, packed: bool) -> Iterator[tuple[Any, ...]]:
    """Of each parameter: device, dtype and path; the column that counts it; elements; bytes; why it
    is not packed. What has no state yet will be in one launch with its like."""
    expected = known.expected()
    native = [(p, known.expected_bytes(p)) for p, why in expected if not why]
    parts = known.plan.parts if known.plan is not None else []
    own = known.native
    taken = [(own[i], p.bytes_of(local(own[i]).numel())) for p in parts for i in p.indices]
    for param, nbytes in (*taken, *native):
        device, numel = local(param).device, local(param).numel()
        kind, name = path(device)
        names = str(device), str(param.dtype), sweep_path if kind == "eager" else name
        why = known.why_in_place[id(param)]
        if why is None and packed and slab.find(param) is None:
            why = "nothing lies beside it, or it was moved after the first step"
        yield names, "in place" if why else "packed", numel, nbytes, why
    for param, why in (*known.fallback, *expected):
        if why is not None:
            names = str(param.device), str(param.dtype), "torch"
            yield names, "torch", 0 if is_lazy(param) else param.numel(), 0, why
