"""RMSprop: `torch.optim.RMSprop` in one kernel per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.rmsprop import rmsprop

from tritonopt import eager, traced
from tritonopt.layout import Rule
from tritonopt.optimizer import SlabOptimizer


class RMSprop(SlabOptimizer, torch.optim.RMSprop):
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
        lr: learning rate :math:`\gamma`; a float, or a tensor with one element, which a kernel
            reads on the device.
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

    State of each parameter, each of its shape and dtype but ``step`` (a float32 scalar): ``step``,
    ``square_avg``, ``momentum_buffer`` if ``momentum`` is positive, ``grad_avg`` if ``centered``.

    Raises:
        ValueError: a hyperparameter is negative, or a tensor ``lr`` has several elements.
        TypeError: ``params`` is one tensor, or holds something else than tensors.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = tritonopt.RMSprop(model.parameters(), lr=0.01, momentum=0.9)
        >>> model(torch.randn(8, 10)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    References:
        G. Hinton, Neural Networks for Machine Learning, lecture 6e (2012); centered: A. Graves,
        Generating Sequences With Recurrent Neural Networks (2013), https://arxiv.org/abs/1308.0850.
    """

    _lists = 6

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered,
            capturable, foreach, maximize, differentiable,
        )  # fmt: skip

    def _rule(self, group: dict[str, Any]) -> Rule:
        keys = ["square_avg"]
        if group["momentum"] > 0:
            keys.append("momentum_buffer")
        if group["centered"]:
            keys.append("grad_avg")
        order = ("square_avg", "grad_avg", "momentum_buffer")
        return Rule("RMSprop", "rmsprop_", eager.rmsprop_, tuple(keys), order)

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        names = ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")
        return {name: group[name] for name in names}

    def _torch_update(self, group: dict[str, Any]) -> None:
        lists: list[list[Tensor]] = [[] for _ in range(6)]
        self._functional(group, lists, self._init_group(group, *lists))

    def _functional(self, group: dict[str, Any], lists: Any, has_complex: bool) -> None:
        params, grads, square_avgs, momentum_buffers, grad_avgs, steps = lists
        names = (*self._hyper(group), "centered", "foreach", "differentiable", "capturable")
        rmsprop(
            params, grads, square_avgs, grad_avgs, momentum_buffers, steps,
            has_complex=has_complex, **{name: group[name] for name in names},
        )  # fmt: skip

    def _traced_update(
        self, group: dict[str, Any], native: Any, rest: Any, has_complex: bool
    ) -> None:
        if native[0]:
            hyper = traced.live(self._hyper(group))
            torch.ops.tritonopt.rmsprop_.tensor_hyper(*native, **hyper)
        if rest[0]:
            self._functional(group, rest, has_complex)
