"""The published rules as plain fp64 loops over numbers, written from their papers' formulas.

They share nothing with the library, and keep what it derives: Rprop's last update, for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Gradient = Callable[[list[float]], tuple[float, list[float]]]
"""From parameters to the loss and its gradient."""


def rprop(
    start: Sequence[float],
    gradient: Gradient,
    steps: int,
    *,
    variant: str,
    lr: float = 0.01,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    maximize: bool = False,
) -> list[float]:
    """Igel & Hüsken, Improving the Rprop Learning Algorithm (2000), tables 1 to 4.

    `rprop+` there is Riedmiller & Braun's of 1993, `rprop-` Riedmiller's of 1994.
    """
    w = list(start)
    delta = [lr] * len(w)
    last_gradient = [0.0] * len(w)
    update = [0.0] * len(w)
    last_error = math.inf
    for _ in range(steps):
        error, g = gradient(w)
        if maximize:
            error, g = -error, [-x for x in g]
        for i in range(len(w)):
            product = g[i] * last_gradient[i]
            if product > 0:
                delta[i] = delta[i] * etas[1]
            elif product < 0:
                delta[i] = delta[i] * etas[0]
            delta[i] = min(max(delta[i], step_sizes[0]), step_sizes[1])
            last_gradient[i] = g[i]
            if product < 0 and variant != "rprop-":
                backtracks = variant == "rprop+" or (variant == "irprop+" and error > last_error)
                w[i] -= update[i] if backtracks else 0.0
                last_gradient[i] = update[i] = 0.0
            else:
                update[i] = -math.copysign(delta[i], g[i]) if g[i] else 0.0
                w[i] += update[i]
        last_error = error
    return w


def rmsprop(
    start: Sequence[float],
    gradient: Gradient,
    steps: int,
    *,
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
    eps_in_sqrt: bool = False,
    lr_in_momentum: bool = False,
    initial_scale: float = 0.0,
    nesterov: bool = False,
    bias_correction: bool = False,
    decoupled_weight_decay: bool = False,
) -> list[float]:
    """Hinton's lecture 6e; Graves (2013) for `centered`; options as in the libraries."""
    w = list(start)
    v = [initial_scale] * len(w)
    m = [0.0] * len(w)
    b = [0.0] * len(w)
    for t in range(1, steps + 1):
        _, gradients = gradient(w)
        correction = 1 - alpha**t if bias_correction else 1.0
        for i, g in enumerate(gradients):
            if maximize:
                g = -g
            if decoupled_weight_decay:
                w[i] -= lr * weight_decay * w[i]
            else:
                g += weight_decay * w[i]
            v[i] = alpha * v[i] + (1 - alpha) * g**2
            m[i] = alpha * m[i] + (1 - alpha) * g
            variance = v[i] / correction
            if centered:
                variance = max(variance - (m[i] / correction) ** 2, 0.0)
            root = math.sqrt(variance + eps) if eps_in_sqrt else math.sqrt(variance) + eps
            u = g / root
            if lr_in_momentum:
                u *= lr
            b[i] = momentum * b[i] + u
            step = u + momentum * b[i] if nesterov else b[i]
            w[i] -= step if lr_in_momentum else lr * step
    return w
