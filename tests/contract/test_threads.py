"""Threads that step optimizers of their own, or one, with and without a lock."""

import sys
import threading

import pytest
import torch
from cases import (
    OURS,
    TORCH,
    assert_follows,
)
from torch import nn

from tritonopt import sweep
from tritonopt.device import INTERPRET


def test_threads_share_no_scratch():
    places, ready = [], threading.Barrier(3)

    def rule(param, grad, scratch):
        places.append({scratch.first.data_ptr(), scratch.second.data_ptr()})
        ready.wait()

    def work():
        sweep.Sweep(rule, [torch.zeros(100)], [])([torch.zeros(100)], {})

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*map(len, places)] == [2, 2, 2]
    assert len(set().union(*places)) == sum(map(len, places))


@pytest.mark.skipif(INTERPRET, reason="triton's interpreter is for one thread")
@pytest.mark.parametrize("shared", [False, True], ids=["own optimizers", "one optimizer"])
def test_threads(name, shared):
    """Of one optimizer without a lock, an update may be lost, but none is of the wrong size."""
    interval, scales = sys.getswitchinterval(), [1e-4, 1e4] * 2
    models = [[nn.Parameter(torch.zeros(60, 60)) for _ in scales] for _ in range(3)]
    if shared:
        models = models[:1] * 3
    for params in models:
        for param, scale in zip(params, scales, strict=True):
            param.grad = torch.full_like(param, scale)
    optimizers = [OURS[name](params, lr=1e-3) for params in models]
    if shared:
        optimizers = optimizers[:1] * 3
        optimizers[0].step()
    errors = []

    def work(optimizer):
        try:
            for _ in range(20):
                optimizer.step()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[optimizer]) for optimizer in optimizers]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    steps = 61 if shared else 20
    if name == "RMSprop":  # the first step is of 10 lr, later ones are smaller
        largest = 1e-2 * steps
    else:  # of the largest step size, as a race may lose an update, and not its growth
        largest = steps * 1e-3 * 1.2 ** (steps - 1)
    for params in models:
        for param in params:
            assert param.isfinite().all() and (param < 0).all() and param.min() >= -1.0001 * largest
    if not shared:
        copies = [nn.Parameter(torch.zeros(60, 60)) for _ in scales]
        for twin, scale in zip(copies, scales, strict=True):
            twin.grad = torch.full_like(twin, scale)
        theirs = TORCH[name](copies, lr=1e-3, foreach=False)
        for _ in range(20):
            theirs.step()
        for params, optimizer in zip(models, optimizers, strict=True):
            assert_follows(optimizer, theirs, params, copies)
