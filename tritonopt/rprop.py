"""Rprop: `torch.optim.Rprop` in one kernel per step."""

from array import array
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from tritonopt import eager
from tritonopt.compact import KEY, compact_rprop_, compressed, encoded, expanded
from tritonopt.device import is_capturing
from tritonopt.eager import VARIANTS, Variant
from tritonopt.eligible import is_plain
from tritonopt.optimizer import FusedOptimizer
from tritonopt.plan import Rule
from tritonopt.precision import OPTIONS, Master
from tritonopt.shard import local

STATE = ("prev", "step_size")


class Rprop(FusedOptimizer, torch.optim.Rprop):
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
        capturable, foreach, maximize, differentiable, fused_amp, max_grad_norm, compile,
            state_dtype, master, stochastic_rounding, rounding_seed: as of
            :class:`tritonopt.RMSprop`.
        variant: what happens to an element whose gradient changes its sign, besides that its step
            size shrinks. Torch has only the first: the others raise where only its code can step.

            - ``"irprop-"``, torch's: it stays put for one step (Igel & Hüsken 2000).
            - ``"rprop-"``: it takes the smaller step (Riedmiller 1994).
            - ``"rprop+"``: its last update is taken back (Riedmiller & Braun 1993).
            - ``"irprop+"``: likewise, but only if the loss rose since the last step, else it stays
              put (Igel & Hüsken 2000). The loss is what the closure given to :meth:`step` returns;
              the last one is ``last_loss`` of the param group. With ``maximize``: if it fell.
        compact: 4 bytes of state an element in place of 8, and 20 bytes moved by a step in place of
            28; fp32 only. ``signed_step_size`` has the step size, with the sign of ``prev`` in its
            two lowest bits: do not write to it. Each step rounds by 2 ulp at most.
            Where the product of two gradients underflows, torch counts 0, and this its sign.
            Checkpoints are torch's in both directions, written with a ``prev`` of -1, 0 or 1, which
            takes 8 bytes an element. To load one that was flattened raises an error.

    State is made, as in torch, at the first step at which a parameter has a gradient: ``step`` (a
    float32 scalar), and of the parameter's shape ``prev`` (the last gradient, 0 after a change of
    sign) and ``step_size`` (in the gradient's dtype). In torch, ``get_optimizer_state_dict`` before
    the first step ruins training: it takes one step with an ``lr`` of 0. Here that step makes state
    and does nothing else: where ``step`` and all step sizes are 0, they start from the ``lr`` in
    force at the first gradient.

    Raises:
        ValueError: ``lr`` is negative or has several elements, the factors are not
            ``0 < etaminus < 1 < etaplus``, ``max_grad_norm`` is not positive, there is no such
            ``variant``, or ``foreach`` or ``differentiable`` is given with ``compact`` or another
            option that torch does not have; for bf16, what :class:`tritonopt.RMSprop` raises.
        RuntimeError: ``fused_amp`` is given with ``differentiable``.

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

    _names = ("last_loss",)
    _stock = torch.optim.Rprop
    _options = {**OPTIONS, "variant": "irprop-"}

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50), *, capturable: bool = False,
        foreach: bool | None = None, maximize: bool = False, differentiable: bool = False,
        variant: Variant = "irprop-", fused_amp: bool = False, max_grad_norm: float | None = None,
        compile: bool | dict[str, Any] = False, compact: bool = False,
        state_dtype: torch.dtype | None = None, master: Master | None = None,
        stochastic_rounding: bool = False, rounding_seed: int = 0,
    ) -> None:  # fmt: skip
        if not isinstance(compact, bool):
            raise TypeError(f"compact is to be True or False, not {compact!r}")
        if compact:
            self._compact = True
        super().__init__(
            params, lr, etas, step_sizes,
            capturable=capturable, foreach=foreach, maximize=maximize,
            differentiable=differentiable, options={"variant": variant},
            fused_amp=fused_amp, max_grad_norm=max_grad_norm, compile=compile,
            state_dtype=state_dtype, master=master,
            stochastic_rounding=stochastic_rounding, rounding_seed=rounding_seed,
        )  # fmt: skip

    @property
    def compact(self) -> bool:
        return getattr(self, "_compact", False)

    @property
    def _like_gradient(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.compact else ("step_size",)

    def rule(self, group: dict[str, Any]) -> Rule:
        return COMPACT if self.compact else PLAIN

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        names = "etaminus", "etaplus", "step_size_min", "step_size_max"
        hyper = dict(zip(names, map(float, (*group["etas"], *group["step_sizes"])), strict=True))
        variant = self._option(group, "variant")
        return {**hyper, "maximize": group["maximize"], "variant": variant, "loss_rose": False}

    def initial(self, key: str, group: dict[str, Any]) -> float:
        start = float(group["lr"]) if key in ("step_size", KEY) else 0.0
        if key == KEY:  # without what would be a sign
            size = torch.tensor(start, dtype=torch.float32, device="cpu")
            start = float(encoded(torch.zeros_like(size), size))
        return start

    def _of_all_groups(self) -> dict[str, Any]:
        return {**super()._of_all_groups(), "compact": self.compact}

    def _beyond_torch(self, group: dict[str, Any]) -> str:
        options = super()._beyond_torch(group)
        return ", ".join(filter(None, ("compact=True" if self.compact else "", options)))

    def _why_not_native(self, param: Tensor) -> str | None:
        if self.compact and param.dtype != torch.float32:
            return f"is {param.dtype}, not float32".replace("torch.", "")
        return super()._why_not_native(param)

    def _fitted(self, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        return compressed(entry, param) if self.compact else entry

    def _torchs(self, entry: Any) -> Any:
        return expanded(entry) if self.compact else entry

    def _check(self, group: dict[str, Any]) -> None:
        if self._option(group, "variant") not in VARIANTS:
            raise ValueError(f"Invalid variant: {group['variant']!r}, not one of {VARIANTS}")
        for name in ("etas", "step_sizes"):
            if not hasattr(group[name], "__len__") or len(group[name]) != 2:
                raise ValueError(f"Invalid {name} value: {group[name]!r}, not two numbers")
        super()._check(group)
        if self._option(group, "variant") == "irprop+":
            group.setdefault("last_loss", None)

    def _why_torch(self, group: dict[str, Any]) -> str | None:
        etaminus, etaplus = array("f", map(float, group["etas"]))  # as kernels round them
        # Possible in a group, as torch validates defaults only; or compared in their own dtype.
        if not 0 < etaminus < 1 < etaplus or any(getattr(e, "ndim", 0) for e in group["etas"]):
            return f"etas={group['etas']}"
        if any(s is None or getattr(s, "ndim", 0) for s in group["step_sizes"]):
            return f"step_sizes={group['step_sizes']}"
        return super()._why_torch(group)

    def _is_untrained(self, entry: Any) -> bool:
        key = KEY if entry and KEY in entry else "step_size"
        if not entry or not entry.keys() >= {"step", key}:
            return False
        step, step_size = entry["step"], local(entry[key])
        if not all(isinstance(t, Tensor) and is_plain(t) for t in (step, step_size)):
            return False
        return bool(step.numel() == 1 and step == 0 and not step_size.any())

    def _start(self, group: dict[str, Any], entry: Any) -> None:
        key = KEY if KEY in entry else "step_size"
        lr = self.initial(key, group)
        entry[key].fill_(complex(lr, lr) if entry[key].is_complex() else lr)

    def _loss_value(self, loss: Any) -> float | None:
        if all(self._option(group, "variant") != "irprop+" for group in self.param_groups):
            return None
        if loss is None:
            raise ValueError("variant='irprop+' needs the loss: step(closure) must return it")
        if isinstance(loss, Tensor) and is_capturing(loss.device):
            raise RuntimeError("variant='irprop+' compares losses on the host: no graph can do it")
        try:
            return float(loss.detach() if isinstance(loss, Tensor) else loss)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"variant='irprop+' needs the loss as a number: {loss!r}") from error

    def _see_loss(self, value: float) -> None:
        for found in self._units.groups.values():
            for group in found.groups:
                if self._option(group, "variant") == "irprop+":
                    last, sign = group.get("last_loss"), -1 if group["maximize"] else 1
                    found.hyper["loss_rose"] = last is not None and sign * value > sign * last
                    group["last_loss"] = value  # distributed checkpoints keep groups alone


def launcher() -> Any:
    return import_module("tritonopt.kernels.launch").rprop_


PLAIN = Rule("Rprop", eager.rprop_, launcher, STATE, STATE)
COMPACT = Rule("Rprop", compact_rprop_, launcher, (KEY,), (KEY,))
