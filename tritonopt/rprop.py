"""Rprop: `torch.optim.Rprop` in one kernel per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.rprop import rprop

from tritonopt import eager
from tritonopt.bucket import Rule
from tritonopt.device import is_capturing
from tritonopt.eager import VARIANTS
from tritonopt.first_step import FirstStep, is_as_made, is_made_with, rounded, unused
from tritonopt.groups import PATHS
from tritonopt.layout import Layout
from tritonopt.optimizer import SlabOptimizer
from tritonopt.shard import local

_DECIDING = ("variant", *PATHS)


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
        fused_amp: let :class:`torch.amp.GradScaler` hand over its scale and whether gradients are
            infinite, instead of passing over the gradients itself. Lightning refuses gradient
            clipping of its own then.
        max_grad_norm: the step counts gradients as if they had first been clipped to this 2-norm
            over all param groups, without writing them. :attr:`grad_norm` holds the norm before.
        variant: what happens to an element whose gradient changes its sign, besides that its step
            size shrinks. All but the first are not in torch: with them, what only torch can do
            raises.

            - ``"irprop-"``, torch's: it stays put for one step (Igel & Hüsken 2000).
            - ``"rprop-"``: it takes the smaller step (Riedmiller 1994).
            - ``"rprop+"``: its last update is taken back (Riedmiller & Braun 1993).
            - ``"irprop+"``: likewise, but only if the loss rose since the last step, else it stays
              put (Igel & Hüsken 2000). The loss is what the closure given to :meth:`step` returns;
              the last one is ``last_loss`` of the param group. With ``maximize``: if it fell.

    State of each parameter, each of its shape and dtype but ``step`` (a float32 scalar): ``step``,
    ``prev`` (the last gradient, 0 after a change of sign), ``step_size``. It exists from
    construction on, but of parameters that are left to torch from their first step on. A
    ``step_size`` that was made with some ``lr`` and that nothing has used yet starts from the
    ``lr`` in force at the first step, as in torch, where a warm-up may have changed it. The sign
    of ``step`` says so, -0.0, in copies and checkpoints, too. Step sizes that are given stay as
    they are: set ``step`` to 0 with them.

    Raises:
        ValueError: ``lr`` is negative or has several elements, the factors are not
            ``0 < etaminus < 1 < etaplus``, ``max_grad_norm`` is not positive, there is no such
            ``variant``, or ``foreach`` or ``differentiable`` is given with one torch does not have.
        RuntimeError: ``fused_amp`` is given with ``differentiable``.
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

    _options = {"variant": "irprop-"}
    _loss: float  # of this step, for "irprop+"
    _loss_rose = False  # since the last one, for the group that is being updated
    _lists = 5
    _made_with: frozenset[float] = frozenset()  # the lr of step sizes when they were made

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
        variant: str = "irprop-",
        fused_amp: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(
            params, lr, etas, step_sizes,
            capturable=capturable, foreach=foreach, maximize=maximize,
            differentiable=differentiable, options={"variant": variant},
            fused_amp=fused_amp, max_grad_norm=max_grad_norm,
        )  # fmt: skip

    def _rule(self, group: dict[str, Any]) -> Rule:
        keys = ("prev", "step_size")
        return Rule("Rprop", "rprop_", eager.rprop_, keys, keys)

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        numbers = {name: float(value) for name, value in _torch_limits(group).items()}
        return {
            **numbers,
            "maximize": group["maximize"],
            "variant": self._option(group, "variant"),
            "loss_rose": self._loss_rose,
        }

    def _deciding(self, group: dict[str, Any]) -> list[Any]:
        return [*map(group.get, _DECIDING), *group["etas"], *group["step_sizes"]]

    def _check(self, group: dict[str, Any]) -> None:
        if self._option(group, "variant") not in VARIANTS:
            raise ValueError(f"Invalid variant: {group['variant']!r}, not one of {VARIANTS}")
        super()._check(group)

    def _initial(self, key: str, group: dict[str, Any]) -> float:
        if key != "step_size":
            return 0.0
        lr = float(group["lr"])
        self._made_with |= {lr}
        return lr

    def _why_torch(self, group: dict[str, Any]) -> str | None:
        etaminus, etaplus = (rounded(float(eta), torch.float32) for eta in group["etas"])
        # Possible in a group, as torch validates defaults only; or compared in their own dtype.
        if not 0 < etaminus < 1 < etaplus or any(getattr(e, "ndim", 0) for e in group["etas"]):
            return f"etas={group['etas']}"
        if any(s is None or getattr(s, "ndim", 0) for s in group["step_sizes"]):
            return f"step_sizes={group['step_sizes']}"
        return super()._why_torch(group)

    def _torch_update(self, group: dict[str, Any]) -> None:
        lists: list[list[Tensor]] = [[] for _ in range(5)]
        self._functional(group, lists, bool(self._init_group(group, *lists)))

    def _functional(self, group: dict[str, Any], lists: Any, has_complex: bool) -> None:
        params, grads, prevs, step_sizes, steps = lists
        names = ("foreach", "differentiable", "capturable", "maximize")
        rprop(
            params, grads, prevs, step_sizes, steps, has_complex=has_complex,
            **_torch_limits(group), **{name: group[name] for name in names},
        )  # fmt: skip

    # The loss.

    def _begin(self, index: int) -> None:
        if self._option(self.param_groups[index], "variant") == "irprop+":
            self.param_groups[index].setdefault("last_loss", None)
        super()._begin(index)

    def _check_traced(self, group: dict[str, Any]) -> None:
        super()._check_traced(group)
        if self._option(group, "variant") == "irprop+":
            raise ValueError(
                "variant='irprop+' compares losses on the host, which torch.compile cannot trace: "
                "call optimizer.compile() and step eagerly"
            )

    def _waits(self) -> bool:
        return any(self._option(group, "variant") == "irprop+" for group in self.param_groups)

    def _see_loss(self, loss: Any) -> None:
        if not self._waits():
            return
        if loss is None:
            raise ValueError("variant='irprop+' needs the loss: step(closure) must return it")
        if isinstance(loss, Tensor) and is_capturing(loss.device):
            raise RuntimeError("variant='irprop+' compares losses on the host: no graph can do it")
        try:
            self._loss = float(loss.detach() if isinstance(loss, Tensor) else loss)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = f"a tensor of size {tuple(loss.size())}" if isinstance(loss, Tensor) else loss
            raise ValueError(
                f"variant='irprop+' needs the loss as one number: step(closure) returned {kind!r}"
            ) from error

    def _traced_conditions(self, group: dict[str, Any]) -> list[bool]:
        etaminus, etaplus = group["etas"]
        if isinstance(etaminus, Tensor) or isinstance(etaplus, Tensor):
            return []
        return [0 < etaminus, etaminus < 1, 1 < etaplus]

    def _traced_update(
        self, group: dict[str, Any], native: Any, rest: Any, has_complex: bool
    ) -> None:
        if native[0]:
            torch.ops.tritonopt.rprop_(*native, **self._hyper(group))
        if rest[0]:
            self._functional(group, rest, has_complex)

    # The first step.

    def _is_as_new(self, entry: dict[str, Any], copied: bool = False) -> bool:
        return is_as_made(entry) and (copied or self._is_made_here(entry))

    def _is_made_here(self, entry: dict[str, Any]) -> bool:
        """Else somebody has written other step sizes to state that we had made."""
        return is_made_with(self._made_with, local(entry["step_size"]))

    def _look(self, index: int) -> Layout:
        layout = super()._look(index)
        layout.first = FirstStep(layout, self._made_with)  # type: ignore[attr-defined]
        return layout

    def _settle(self, work: list[Any]) -> bool:
        lrs = [group["lr"] for group in self.param_groups]
        settled = [
            index
            for index, (layout, _) in enumerate(work)
            if layout.first.settle(lrs[index], self.state)
        ]
        for index in settled:
            self._made_with |= {float(lrs[index])}
            self._look(index)
        return bool(settled)

    def _before_update(self, group: dict[str, Any], layout: Layout) -> None:
        if self._option(group, "variant") == "irprop+":
            last, sign = group.get("last_loss"), -1 if group["maximize"] else 1
            self._loss_rose = last is not None and sign * self._loss > sign * last
            group["last_loss"] = self._loss
        may_be_skipped = vars(self).get("found_inf") is not None  # else the host has seen to it
        if layout.first.begin(group["lr"], self.state, may_be_skipped):  # type: ignore[attr-defined]
            self._made_with |= {float(group["lr"])}

    def _start_from_lr(self) -> None:
        """Now, as who copies the state does not copy what it was made with."""
        for entry in self.state.values():
            if isinstance(entry, dict) and is_as_made(entry) and not self._is_made_here(entry):
                entry["step"].zero_()  # given: no longer `packing.NEVER`
        for group in self.param_groups:
            entries = [self.state.get(param) for param in group["params"]]
            for param, value in unused(group["params"], entries, self._made_with):
                step_size, lr = local(self.state[param]["step_size"]), float(group["lr"])
                if rounded(lr, step_size.dtype) != value:
                    step_size.fill_(lr)
                    self._made_with |= {lr}
                    self._layouts.clear()  # which know the value

    def __getstate__(self) -> dict[str, Any]:
        self._start_from_lr()
        return super().__getstate__()

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        self._start_from_lr()
        return super().state_dict()


def _torch_limits(group: dict[str, Any]) -> dict[str, Any]:
    etaminus, etaplus = group["etas"]
    step_size_min, step_size_max = group["step_sizes"]
    return {
        "etaminus": etaminus,
        "etaplus": etaplus,
        "step_size_min": step_size_min,
        "step_size_max": step_size_max,
    }
