"""Replaces the updates of stock optimizers in a traced graph by one op each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tritonopt import patterns
from tritonopt.device import path
from tritonopt.eligible import HALF_OR_SINGLE
from tritonopt.values import Segment, Trace

LISTS = {
    "rmsprop_": ("square_avgs", "grad_avgs", "momentum_buffers"),
    "rprop_": ("prevs", "step_sizes"),
}
TITLES = {"rmsprop_": "RMSprop", "rprop_": "Rprop"}


@dataclass(eq=False)
class Match:
    """One parameter's update: the segments it replaces, and the nodes with the op's operands."""

    update: patterns.Update
    param: Segment
    states: dict[str, Segment]
    grad: Node | None = None
    lr: Node | None = None

    @property
    def segments(self) -> list[Segment]:
        return [self.param, *self.states.values()]


@dataclass
class Report:
    """What became of one graph."""

    replaced: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    nodes: int = 0
    ours: int = 0  # ops that were there before

    def __str__(self) -> str:
        lines = [f"replaced: {what}" for what in self.replaced]
        lines += [f"left to Inductor: {n} x {why}" for why, n in self.left.items()]
        if self.ours:
            lines.append(f"tritonopt's own ops, as they are: {self.ours}")
        return "\n".join(lines or ["left to Inductor: it writes no parameter"])


class Rewrite:
    """Finds the updates of a graph, checks that nothing sees the difference, replaces them."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        ours = sum(getattr(n.target, "namespace", "") == "tritonopt" for n in module.graph.nodes)
        self.report = Report(nodes=len(module.graph.nodes), ours=ours)
        self.trace = Trace(module)
        self.differentiated = self._differentiated()
        self.by_leaf = {segment.leaf: segment for segment in self.trace.segments}
        self.by_term: dict[int, list[Segment]] = {}
        for segment in self.trace.segments:
            self.by_term.setdefault(segment.term, []).append(segment)

    def run(self) -> bool:
        """Whether anything was replaced."""
        found = matches = self._matches()
        while matches:
            counts, buckets = self._counts(), self._buckets(matches)
            ends = self._ends(buckets, counts)
            bad = self._conflicts(buckets, counts, ends)
            if not bad:
                break
            matches = [m for m in matches if not bad & {id(s) for s in m.segments}]
            self._uncounted |= bad
        else:
            counts, buckets, ends = [], [], {}
            self.writes: set[Node] = set()
        self._tell(found, buckets)
        if buckets:
            self._replace(buckets, counts, ends)
        return bool(buckets)

    # Finding.

    def _matches(self) -> list[Match]:
        self._uncounted: set[int] = set()
        found = []
        for segment in self.trace.segments:
            if not segment.writes:
                continue
            update = patterns.step(self.trace.terms, segment.leaf, segment.term)
            if update is None:
                continue
            states = {key: self.by_leaf[leaf] for key, (leaf, _) in update.state.items()}
            match = Match(update, segment, states)
            why = self._why_not(match)
            if why:
                self.report.left[why] += 1
            else:
                found.append(match)
        return found

    def _why_not(self, match: Match) -> str | None:
        """Why an update that has the right terms is not replaced; None if it can be."""
        trace, update, title = self.trace, match.update, TITLES[match.update.name]
        for key, (_, term) in update.state.items():
            if match.states[key].term != term:
                return f"{title}, but its {key} are written by something else, too"
        if len({segment.memory for segment in match.segments}) < len(match.segments):
            return f"{title}, but its state is the parameter's memory"
        last = max(trace.position[s.writes[-1]] for s in match.segments)
        match.grad = self._carrier(update.grad, last)
        match.lr = None if update.lr is None else self._carrier(update.lr, last)
        if match.grad is None:
            return f"{title}, but its gradient is changed before the step ends"
        if update.lr is not None and (match.lr is None or not _is_scalar(trace, match.lr)):
            return f"{title}, but its lr is no tensor with one element"
        if any(write in self.differentiated for s in match.segments for write in s.writes):
            return f"{title}, but autograd differentiates it"
        holders = [trace.holders[s.memory] for s in match.segments]
        tensors = [trace.tensor(node) for node in (*holders, match.grad)]
        first = tensors[0]
        if first is None or any(t is None or is_traceable_wrapper_subclass(t) for t in tensors):
            return f"{title}, but of tensors that are not plain"
        if any(t.size() != first.size() for t in tensors):  # type: ignore[union-attr]
            return f"{title}, but of tensors of different sizes"
        if any((t.dtype, t.device) != (first.dtype, first.device) for t in tensors):  # type: ignore[union-attr]
            return f"{title}, but of tensors of different dtypes or devices"
        if first.dtype not in (*HALF_OR_SINGLE, torch.float64) or not path(first.device)[0]:
            return f"{title}, but of {first.dtype} tensors on {first.device}"
        return None

    def _differentiated(self) -> set[Node]:
        """The nodes at which autograd looks on: it does where nobody has switched it off."""
        enabled = torch.is_grad_enabled()  # where the graph begins
        found = set()
        for node in self.module.graph.nodes:
            if node.target is torch._C._set_grad_enabled:
                enabled = bool(node.args[0])
            elif enabled:
                tensors = map(self.trace.tensor, (node, *node.all_input_nodes))
                if any(tensor is not None and tensor.requires_grad for tensor in tensors):
                    found.add(node)
        return found

    def _carrier(self, term: int, position: int) -> Node | None:
        """A node in whose memory the value lies at a position."""
        for segment in self.by_term.get(term, ()):
            node = self.trace.holders[segment.memory]
            written = max((self.trace.position[w] for w in segment.writes), default=segment.start)
            if written < position < segment.stop and self.trace.position[node] < position:
                return node
        return None

    def _counts(self) -> list[Segment]:
        """Steps: scalars to which 1 is added."""
        found = []
        for segment in self.trace.segments:
            tensor = self.trace.tensor(self.trace.holders[segment.memory])
            if (
                segment.writes
                and id(segment) not in self._uncounted
                and not self.differentiated.intersection(segment.writes)
                and patterns.is_count(self.trace.terms, segment.leaf, segment.term)
                and tensor is not None
                and tensor.dim() == 0
                and tensor.dtype in (torch.float32, torch.float64)
            ):
                found.append(segment)
        return found

    def _buckets(self, matches: list[Match]) -> list[list[Match]]:
        """The matches that one op can take, for each op."""
        members: dict[Any, list[Match]] = {}
        for match in matches:
            update = match.update
            hyper = tuple(update.hyper.items())
            key = (update.name, hyper, update.maximize, match.lr, tuple(sorted(match.states)))
            members.setdefault(key, []).append(match)
        return list(members.values())

    # Checking.

    def _ends(self, buckets: list[list[Match]], counts: list[Segment]) -> dict[int, int]:
        """By segment: the position of the last node it replaces, after which its op stands."""
        position, ends = self.trace.position, dict[int, int]()
        for bucket in buckets:
            segments = [segment for match in bucket for segment in match.segments]
            if bucket is buckets[-1]:
                segments += counts
            end = max(position[segment.writes[-1]] for segment in segments)
            ends |= {id(segment): end for segment in segments}
        return ends

    def _conflicts(
        self, buckets: list[list[Match]], counts: list[Segment], ends: dict[int, int]
    ) -> set[int]:
        """Segments, by id, of which something in the graph would see the difference."""
        replaced = [s for bucket in buckets for match in bucket for s in match.segments]
        replaced += counts if buckets else []
        self.writes = {write for segment in replaced for write in segment.writes}
        self.live, unclear = self._live(buckets, ends)
        bad = {id(s) for s in replaced if s.stop <= ends[id(s)] or unclear & {*s.writes}}

        # A foreach function is replaced for all of its tensors or for none.
        written = Counter(w for writers in self.trace.writers.values() for w in writers)
        covered = Counter(write for segment in replaced for write in segment.writes)
        bad |= {id(s) for s in replaced if any(covered[w] < written[w] for w in s.writes)}

        for bucket in buckets:
            end = ends[id(bucket[0].param)]
            for match in bucket:
                for term, node in ((match.update.grad, match.grad), (match.update.lr, match.lr)):
                    if node is not None and self._carrier(term, end) is not node:  # type: ignore[arg-type]
                        bad.add(id(match.param))

        # Everybody else looks before the first write or after the op.
        looks: dict[int, list[int]] = {}
        for node in self.live - self.writes:
            for memory in self.trace.accesses(node):
                looks.setdefault(memory, []).append(self.trace.position[node])
        for match in (match for bucket in buckets for match in bucket):  # so do the ops
            for node in (match.grad, match.lr):
                if node is not None:
                    read = self.trace.memory(node)
                    assert read is not None
                    looks.setdefault(read, []).append(ends[id(match.param)])
        for segment in replaced:
            first, end = self.trace.position[segment.writes[0]], ends[id(segment)]
            tensor = self.trace.tensor(self.trace.holders[segment.memory])
            if tensor is not None and tensor.dim() == 0:  # see `tritonopt.traced.fill`
                first = 0
            if any(first <= here <= end for here in looks.get(segment.memory, ())):
                bad.add(id(segment))
        return bad

    def _live(
        self, buckets: list[list[Match]], ends: dict[int, int]
    ) -> tuple[set[Node], set[Node]]:
        """Nodes that stay, and replaced ones whose result is needed and is not a tensor."""
        trace, live, unclear = self.trace, set[Node](), set[Node]()
        stack: list[tuple[Node, int]] = []

        def keep(node: Node, before: int) -> None:
            """The node stays, and so does what has written its memory before a position."""
            if node not in self.writes and node not in live:
                live.add(node)
                stack.append((node, trace.position[node]))
            elif node in self.writes and trace.memory(node) is None:
                unclear.add(node)
            for writer in trace.writers.get(trace.memory(node) or 0, ()):
                if trace.position[writer] < before and writer not in self.writes | live:
                    live.add(writer)
                    stack.append((writer, trace.position[writer]))

        for node, here in trace.position.items():
            if node not in trace.known and node.op not in ("placeholder", "get_attr"):
                keep(node, here)
        for memory, writers in trace.writers.items():
            if trace.holders[memory] not in trace.known:  # visible outside of the graph
                for writer in writers:
                    if writer not in self.writes:
                        keep(writer, trace.position[writer])
        for bucket in buckets:
            for match in bucket:
                for node in (match.grad, match.lr):
                    if node is not None:
                        keep(node, ends[id(match.param)])
        while stack:
            node, here = stack.pop()
            for argument in node.all_input_nodes:
                keep(argument, here)
        return live, unclear

    # Replacing.

    def _tell(self, found: list[Match], buckets: list[list[Match]]) -> None:
        self.report.left.update(
            f"{TITLES[match.update.name]}, but its tensors are used while it runs"
            for match in found
            if not any(match in bucket for bucket in buckets)
        )
        for bucket in buckets:
            update = bucket[0].update
            hyper = {**update.hyper, "maximize": update.maximize}
            if bucket[0].lr is not None:
                hyper["lr"] = "tensor"
            options = ", ".join(f"{name}={value}" for name, value in hyper.items())
            self.report.replaced.append(
                f"{TITLES[update.name]} of {len(bucket)} parameters ({options})"
            )
        others = sum(
            trace_segment.writes != [] and not self.writes & {*trace_segment.writes}
            for trace_segment in self.trace.segments
            if self.trace.holders[trace_segment.memory].op in ("placeholder", "get_attr")
        )
        if others > sum(self.report.left.values()):
            why = "a write that is no step of RMSprop or Rprop"
            self.report.left[why] += others

    def _replace(
        self, buckets: list[list[Match]], counts: list[Segment], ends: dict[int, int]
    ) -> None:
        graph, nodes = self.module.graph, list(self.trace.position)
        holders = self.trace.holders
        for bucket in buckets:
            update = bucket[0].update
            lists = [[holders[m.param.memory] for m in bucket], [m.grad for m in bucket]]
            for key in LISTS[update.name]:
                lists.append([holders[m.states[key].memory] for m in bucket if key in m.states])
            lists.append([holders[s.memory] for s in counts] if bucket is buckets[-1] else [])
            hyper = {**update.hyper, "maximize": update.maximize}
            overload = "default"
            if bucket[0].lr is not None:
                hyper["lr"], overload = bucket[0].lr, "tensor_lr"
            op = getattr(getattr(torch.ops.tritonopt, update.name), overload)
            with graph.inserting_after(nodes[ends[id(bucket[0].param)]]):
                graph.call_function(op, tuple(lists), hyper)  # type: ignore[arg-type]
        for node in self.live:
            for argument in node.all_input_nodes:
                if argument in self.writes:
                    memory = self.trace.memory(argument)
                    assert memory is not None
                    node.replace_input_with(argument, holders[memory])
        for node in reversed(nodes):
            if node in self.trace.known and node not in self.live:
                graph.erase_node(node)
        graph.lint()
        self.module.recompile()


def _is_scalar(trace: Trace, node: Node) -> bool:
    tensor = trace.tensor(node)
    return tensor is not None and tensor.numel() == 1 and tensor.is_floating_point()
