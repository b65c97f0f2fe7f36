"""RMSprop: `torch.optim.RMSprop` in one kernel per step."""

from importlib import import_module
from itertools import repeat
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _to_scalar

from tritonopt import eager
from tritonopt.libraries import TIMM_ALONE, from_timm
from tritonopt.optimizer import FusedOptimizer
from tritonopt.plan import Rule
from tritonopt.precision import OPTIONS, Master
from tritonopt.quantized import CODE, SCALE, expanded

_HYPER = ("alpha", "eps", "weight_decay", "momentum", "maximize")
_SWITCHES = (
    "eps_in_sqrt", "lr_in_momentum", "nesterov", "decoupled_weight_decay", "nan_safe", "cautious",
)  # fmt: skip
_BEYOND_TORCH = ("initial_scale", "bias_correction", "quantized", *_SWITCHES)
STATE = ("square_avg", "grad_avg", "momentum_buffer")


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""Drop-in for :class:`torch.optim.RMSprop`: same signature, state, checkpoints and results.

    .. math::
        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma \, g_t / (\sqrt{v_t} + \epsilon)

    with :math:`g_t` the gradient, plus :math:`\lambda \theta_{t-1}` under weight decay. With
    ``centered``, :math:`v_t` is reduced by the square of the running mean of the gradient. With
    ``momentum``, :math:`b_t = \mu b_{t-1} + g_t / (\sqrt{v_t} + \epsilon)` and :math:`\theta_t =
    \theta_{t-1} - \gamma b_t`.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts that define param groups. Any shape and
            strides; float16, bfloat16, float32 and float64 take the fast paths.
        lr: learning rate :math:`\gamma`; a float, or a tensor with one element.
        alpha: smoothing constant of the squared gradient's running average.
        eps: added to the denominator after the square root.
        weight_decay: L2 penalty :math:`\lambda`.
        momentum: momentum factor :math:`\mu`.
        centered: normalize by the estimated variance instead of the second moment.
        capturable: count steps on the device, so that a graph can capture :meth:`step`. On
            accelerators only, as in torch.
        foreach: given explicitly, True or False selects torch's own implementation.
        maximize: ascend instead of descend.
        differentiable: let autograd run through :meth:`step`; selects torch's own implementation.
        fused_amp: let :class:`torch.amp.GradScaler` hand over its scale and whether gradients are
            infinite, instead of writing the gradients. A step with infinite ones changes nothing.
            Only the step that makes state waits for the device. In mixed precision, Lightning
            refuses `gradient_clip_val` then.
        max_grad_norm: the step counts gradients as if they had first been clipped to this 2-norm
            over all param groups, without writing them. From the first step that is not skipped
            on, :attr:`grad_norm` is a tensor with the norm before: of all ranks under FSDP2, of
            this rank's parameters under FSDP1 and ZeRO.
        compile: True, or a dict of arguments: calls :meth:`compile` with them.
        eps_in_sqrt: the denominator is :math:`\sqrt{v_t + \epsilon}`.
        lr_in_momentum: :math:`b_t = \mu b_{t-1} + \gamma g_t / (\sqrt{v_t} + \epsilon)` and
            :math:`\theta_t = \theta_{t-1} - b_t`: a new ``lr`` leaves earlier updates as they were.
        initial_scale: what ``square_avg`` starts from.
        nesterov: the step has :math:`\mu b_t` plus the last summand of :math:`b_t` for it.
        bias_correction: :math:`v_t` and the running mean of the gradient are divided by
            :math:`1 - \alpha^t`, where :math:`t` counts the parameter's steps. If ``centered``,
            the first one divides by rounding errors and ``eps``: one gradient has no variance.
        decoupled_weight_decay: :math:`\theta` is multiplied by :math:`1 - \gamma \lambda` before
            the update, and the gradient left as it is.
        nan_safe: with ``centered``, a variance that rounding makes negative counts as 0: ``eps``
            alone divides then. In torch it gives NaN, to which a constant gradient leads.
        state_dtype: ``torch.float32``: the state of parameters in half precision is of fp32.
        master: ``"split"``: what bf16 parameters lack of fp32 is kept in the state, in 2 bytes an
            element. The rest of the state is of fp32 then. Both halves together are trained as an
            fp32 parameter is, to the last bit, without a copy of it. What somebody else writes to a
            parameter counts to within half a unit in its last place.
        stochastic_rounding: bf16 parameters and bf16 state are rounded to one of their two nearest
            values at random, which is right on average: rounded to nearest, an update of less than
            half a unit in the last place is lost. Which one depends on the seed, the place in the
            param groups and the step: replicas and all paths do the same.
        rounding_seed: from 0 to 2^31 - 1: of these bits, and of those that ``quantized`` draws.
        quantized: the average of squares takes 1 byte an element: the greatest one of a block of
            256, and for each how many eighths of a power of 2 it lies below, at most 31.75 powers.
            Each step takes one of the two next codes at random, which is right on average, and
            off by 4.4 % of a root at most. Over many steps with an ``alpha`` of 0.99 that adds up
            to 10 % (one standard deviation). What lies further below has smaller steps.
            ``square_avg_code`` and ``square_avg_scale`` are in the state; checkpoints have torch's
            ``square_avg``, in fp32. An infinity or NaN spreads to its block. For large parameters
            on GPUs: a CPU takes 17 to 80 times as long as for a plain step.
        cautious: with ``momentum``, elements whose update has not the sign of their gradient (as
            ``weight_decay`` and ``maximize`` have made it) stay put. The others move further: by
            one over their share in the parameter, which counts as 0.001 at the least. The buffer
            keeps all updates; with ``nesterov``, its step has the sign that counts. A GPU reads
            gradient and state twice, a CPU those of more than 2^19 elements. The share is that of
            all ranks under FSDP2, and of this rank's flat part under FSDP1.

    Options from ``fused_amp`` on are not torch's; from ``eps_in_sqrt`` on they change the rule, and
    raise where only torch's code can step. A checkpoint without them leaves them as they are.

    As in torch, a parameter gets state at the first step at which it has a gradient: ``step`` (a
    float32 scalar), and of its shape and dtype ``square_avg``, ``momentum_buffer`` if ``momentum``
    is positive, ``grad_avg`` if ``centered``; and ``remainder`` with ``master``, whose bits are an
    int16's: no number of its dtype.

    Raises:
        ValueError: a hyperparameter is negative, a tensor ``lr`` has several elements,
            ``nesterov``, ``lr_in_momentum`` or ``cautious`` has no ``momentum`` (with
            ``eps_in_sqrt`` and an ``initial_scale`` of 1, as in timm, the latter two wait for one),
            ``nan_safe`` is given without ``centered``, ``quantized`` with ``centered`` or
            ``cautious``, ``bias_correction`` has an ``alpha`` of 1 or more, ``max_grad_norm`` is
            not positive, ``stochastic_rounding`` meets ``master`` or a float16 parameter,
            ``master`` one that is not of bfloat16, ``quantized`` one of float64, or an option that
            changes the rule ``foreach`` or ``differentiable``.
        RuntimeError: ``fused_amp`` is given with ``differentiable``.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = tritonopt.RMSprop(model.parameters(), lr=0.01, momentum=0.9)
        >>> model(torch.randn(8, 10)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    References:
        G. Hinton, Neural Networks for Machine Learning, lecture 6e (2012); centered: A. Graves,
        Generating Sequences With Recurrent Neural Networks (2013), https://arxiv.org/abs/1308.0850;
        cautious: K. Liang et al., Cautious Optimizers (2024), https://arxiv.org/abs/2411.16085.
    """

    _stock = torch.optim.RMSprop
    _options = {**OPTIONS, **dict.fromkeys(_BEYOND_TORCH, False), "initial_scale": 0.0}

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
        weight_decay: float = 0, momentum: float = 0, centered: bool = False,
        capturable: bool = False, foreach: bool | None = None, maximize: bool = False,
        differentiable: bool = False, *, eps_in_sqrt: bool = False, lr_in_momentum: bool = False,
        initial_scale: float = 0.0, nesterov: bool = False, bias_correction: bool = False,
        decoupled_weight_decay: bool = False, nan_safe: bool = False, cautious: bool = False,
        fused_amp: bool = False, max_grad_norm: float | None = None,
        compile: bool | dict[str, Any] = False, state_dtype: torch.dtype | None = None,
        master: Master | None = None, stochastic_rounding: bool = False, rounding_seed: int = 0,
        quantized: bool = False,
    ) -> None:  # fmt: skip
        options = dict(
            eps_in_sqrt=eps_in_sqrt, lr_in_momentum=lr_in_momentum, initial_scale=initial_scale,
            nesterov=nesterov, bias_correction=bias_correction,
            decoupled_weight_decay=decoupled_weight_decay, nan_safe=nan_safe, cautious=cautious,
            quantized=quantized,
        )  # fmt: skip
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered,
            capturable, foreach, maximize, differentiable, options=options,
            fused_amp=fused_amp, max_grad_norm=max_grad_norm, compile=compile,
            state_dtype=state_dtype, master=master,
            stochastic_rounding=stochastic_rounding, rounding_seed=rounding_seed,
        )  # fmt: skip

    def rule(self, group: dict[str, Any]) -> Rule:
        used = ["square_avg"]
        if group["momentum"] > 0:
            used.append("momentum_buffer")
        if group["centered"]:
            used.append("grad_avg")
        takes_step = bool(self._option(group, "bias_correction"))
        takes_mean = bool(self._option(group, "cautious")) and group["momentum"] > 0
        rule = Rule("RMSprop", eager.rmsprop_, launcher, STATE, tuple(used), takes_step)
        rule = rule._replace(takes_mean=takes_mean)
        return rule.with_codes() if self._option(group, "quantized") else rule

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        hyper = dict(zip(_HYPER, itemgetter(*_HYPER)(group), strict=True))
        hyper["lr"] = _to_scalar(group["lr"])
        hyper["weight_decay"] = hyper["weight_decay"] or 0  # not a tensor that holds 0
        hyper.update(zip(_SWITCHES, map(group.get, _SWITCHES, repeat(False)), strict=True))
        return hyper

    def initial(self, key: str, group: dict[str, Any]) -> float:
        start = float(self._option(group, "initial_scale"))
        if key == CODE:
            return 255.0 if start else 0.0
        return start if key in ("square_avg", SCALE) else 0.0

    def _torchs(self, entry: Any) -> Any:
        return expanded(entry)

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = state.get("param_groups", [])
        groups[:] = map(from_timm, groups)
        super().__setstate__(state)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not 0.0 <= self._option(group, "initial_scale"):
            raise ValueError(f"Invalid initial_scale value: {group['initial_scale']}")
        for name, ours in TIMM_ALONE.items():
            if group.get(name):
                raise ValueError(f"{name} is timm's: tritonopt has {ours}")
        # With timm's other options it is timm's rule, which may wait for a momentum.
        waits = self._option(group, "eps_in_sqrt") and self._option(group, "initial_scale") == 1
        names = "nesterov", *(() if waits else ("lr_in_momentum", "cautious"))
        for name in names:
            if self._option(group, name) and group["momentum"] <= 0:
                raise ValueError(f"{name}=True requires a momentum")
        if self._option(group, "nan_safe") and not group["centered"]:
            raise ValueError("nan_safe=True requires centered=True")
        if self._option(group, "quantized") and group["centered"]:
            raise ValueError("quantized=True leaves no variance for centered=True: leave one out")
        if self._option(group, "quantized") and self._option(group, "cautious"):
            raise ValueError("quantized=True does not go with cautious=True: leave one out")
        if self._option(group, "bias_correction") and not group["alpha"] < 1:
            raise ValueError("bias_correction=True requires an alpha below 1")


def launcher() -> Any:
    return import_module("tritonopt.kernels.launch").rmsprop_
