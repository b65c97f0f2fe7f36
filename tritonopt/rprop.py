"""Rprop: `torch.optim.Rprop` in one kernel per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.rprop import rprop

from tritonopt import eager
from tritonopt.device import is_capturing
from tritonopt.layout import Layout, Rule
from tritonopt.optimizer import SlabOptimizer
from tritonopt.shard import local
from tritonopt.slab import Slab


class Rprop(SlabOptimizer, torch.optim.Rprop):
    r"""Drop-in for :class:`torch.optim.Rprop`: same signature, state, checkpoints and results.

    Every element has a step size of its own, which grows while its gradient keeps its sign and
    shrinks when the sign changes; only the gradient's sign is used. What torch runs is iRprop-: on
    a change of sign the gradient counts as 0, so the element stays put for one step.

    .. math::
        \eta_t &= \mathrm{clip}(\eta_{t-1} \cdot (\eta^+ \text{ if } g_t g_{t-1} > 0,\;
            \eta^- \text{ if } g_t g_{t-1} < 0,\; \text{else } 1), \Gamma_{min}, \Gamma_{max}) \\
        g_t &\leftarrow 0 \text{ where } g_t g_{t-1} < 0 \\
        \theta_t &= \theta_{t-1} - \eta_t \, \mathrm{sign}(g_t)

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts that define param groups. Any shape and
            strides; float16, bfloat16, float32 and float64 take the fast paths.
        lr: the step size of every element at its first step; later values are ignored, as in
            torch. A float, or a tensor with one element.
        etas: factors ``(etaminus, etaplus)`` by which a step size shrinks and grows.
        step_sizes: the least and the greatest step size, in units of the parameter.
        capturable: count steps on the device, so that a graph can capture :meth:`step`. On
            accelerators only, as in torch.
        foreach: given explicitly, True or False selects torch's own implementation.
        maximize: ascend instead of descend.
        differentiable: let autograd run through :meth:`step`; selects torch's own implementation.

    State of each parameter, each of its shape and dtype but ``step`` (a float32 scalar): ``step``,
    ``prev`` (the last gradient, 0 after a change of sign), ``step_size``. It exists from
    construction on. A ``step_size`` that nothing has used yet (``step`` is 0, ``prev`` is 0, all
    elements equal) starts from the ``lr`` in force at the first step, as in torch, where a warm-up
    may have changed it.

    Raises:
        ValueError: ``lr`` is negative or has several elements, or the factors are not
            ``0 < etaminus < 1 < etaplus``.
        TypeError: ``params`` is one tensor, or holds something else than tensors.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = tritonopt.Rprop(model.parameters(), lr=0.01)
        >>> model(torch.randn(8, 10)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    References:
        M. Riedmiller, H. Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The
        RPROP Algorithm (1993); C. Igel, M. Hüsken, Improving the Rprop Learning Algorithm (2000).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params, lr, etas, step_sizes,
            capturable=capturable, foreach=foreach, maximize=maximize,
            differentiable=differentiable,
        )  # fmt: skip

    def _rule(self, group: dict[str, Any]) -> Rule:
        keys = ("prev", "step_size")
        return Rule("Rprop", "rprop_", eager.rprop_, keys, keys)

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        etaminus, etaplus = group["etas"]
        step_size_min, step_size_max = group["step_sizes"]
        return {
            "etaminus": etaminus,
            "etaplus": etaplus,
            "step_size_min": step_size_min,
            "step_size_max": step_size_max,
            "maximize": group["maximize"],
        }

    def _initial(self, key: str, group: dict[str, Any]) -> float:
        return float(group["lr"]) if key == "step_size" else 0.0

    def _why_torch(self, group: dict[str, Any]) -> str | None:
        etaminus, etaplus = torch.tensor(group["etas"], dtype=torch.float32).tolist()
        if not 0 < etaminus < 1 < etaplus:  # possible in a group: torch validates defaults only
            return f"etas={group['etas']}"
        return super()._why_torch(group)

    def _torch_update(self, group: dict[str, Any]) -> None:
        lists: list[list[Tensor]] = [[] for _ in range(5)]
        has_complex = self._init_group(group, *lists)
        params, grads, prevs, step_sizes, steps = lists
        names = ("foreach", "differentiable", "capturable")
        rprop(
            params, grads, prevs, step_sizes, steps,
            has_complex=has_complex, **self._hyper(group), **{name: group[name] for name in names},
        )  # fmt: skip

    # The first step.

    def _is_unused(self, state: dict[str, Any]) -> bool:
        if not super()._is_unused(state):
            return False
        step_size, prev = local(state["step_size"]), local(state["prev"])
        if not step_size.numel():
            return True
        low, high = torch.aminmax(step_size)
        return bool(low == high) and not bool(prev.any())

    def _look(self, index: int, new: Sequence[Slab] = ()) -> Layout:
        layout = super()._look(index, new)
        layout.unused_step_sizes = [  # type: ignore[attr-defined]
            (param, local(entry["step_size"]), float(local(entry["step_size"]).flatten()[0]))
            for param, entry in zip(layout.params, layout.states, strict=True)
            if entry and not param.is_complex() and local(param).numel() and self._is_unused(entry)
        ]
        return layout

    @torch.no_grad()
    def _before_update(self, group: dict[str, Any], layout: Layout) -> None:
        waiting = []
        for param, step_size, value in layout.unused_step_sizes:  # type: ignore[attr-defined]
            if param.grad is None:
                waiting.append((param, step_size, value))
            elif float(torch.tensor(float(group["lr"]), dtype=step_size.dtype)) != value:
                if is_capturing(param.device):
                    raise RuntimeError(
                        "lr changed before the first step: take one step before a graph captures it"
                    )
                step_size.fill_(float(group["lr"]))
        layout.unused_step_sizes = waiting  # type: ignore[attr-defined]
