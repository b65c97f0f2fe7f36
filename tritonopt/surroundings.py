"""What is around a backward pass: another one, or what reduces its gradients over ranks later."""

import gc
import sys
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward


def check_wrappers(params: Iterable[Tensor], modules: Iterable[Any] = ()) -> None:
    """Raises if DDP or FSDP1 hold a parameter: one of these modules, or one that exists at all."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        modules = chain(modules, gc.get_objects())
    fsdp = sys.modules.get("torch.distributed.fsdp")
    ddp = nn.parallel.DistributedDataParallel
    kinds = ddp, getattr(fsdp, "FullyShardedDataParallel", ddp)
    mine = {*map(id, params)}
    for module in modules:
        if issubclass(type(module), kinds) and not mine.isdisjoint(map(id, module.parameters())):
            raise RuntimeError(
                f"{type(module).__name__} reduces gradients after step_in_backward has used them: "
                "shard the model with fully_shard, or call step() after backward"
            )


def is_nested() -> bool:
    """Whether this backward pass runs in a backward function of another one."""
    frame: Any = sys._getframe()
    inside = False
    while frame is not None:
        inside |= frame.f_code is _engine_run_backward.__code__
        if inside and frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False
