"""All that knows dynamo or Inductor: a backend, a fused loop, how the ops are compiled."""

from collections.abc import Callable
from typing import Any

from torch._C._dynamo import eval_frame


def untraced(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As `torch.compiler.disable(reason=reason)`, without the import of dynamo that it takes."""

    def mark(function: Any) -> Any:
        function._torchdynamo_disable = True
        function._torchdynamo_disable_msg = reason
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)  # of it, and of what it calls
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
        return function

    return mark
