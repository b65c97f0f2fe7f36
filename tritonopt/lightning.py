"""Lightning: a callback that puts our optimizers in the place of torch's."""

from typing import Any

from tritonopt.convert import counterpart, from_torch

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:  # its older name
    from pytorch_lightning.callbacks import Callback  # type: ignore[assignment, no-redef]


class FusedOptimizers(Callback):
    """Turns each optimizer that :func:`tritonopt.from_torch` takes into ours when a fit starts.

    Neither the module nor its `configure_optimizers` changes; param groups, state, schedulers and
    the format of checkpoints stay. Other optimizers, and those wrapped by a strategy, do, too.
    `compile` is that of :class:`tritonopt.RMSprop`, also for optimizers that are ours already.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[tritonopt.lightning.FusedOptimizers()])
    """

    def __init__(self, compile: bool | dict[str, Any] = False) -> None:
        self.compile = compile

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Assigned, so that the strategy's wrappers, which imitate the optimizers' classes, follow.
        found = trainer.strategy.optimizers
        made = [from_torch(o, self.compile) if counterpart(o) else o for o in found]
        trainer.strategy.optimizers = made
