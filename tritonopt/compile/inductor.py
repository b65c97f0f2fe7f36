"""Torch's default compiler, called directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule


def check(mode: str | None, options: dict[str, Any] | None) -> None:
    """Raises what `torch.compile` raises where Inductor does not know a mode or an option."""
    torch._TorchCompileInductorWrapper(mode, options, None)


def inductor(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """What `torch.compile` does with a graph of dynamo if no backend is named."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    given = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    patches = {**(list_mode_options(mode) if mode else {}), **given}
    return compile_fx(module, inputs, config_patches=patches)  # type: ignore[return-value,arg-type]


def trust_processor() -> None:
    """Spares Inductor what torch knows: that it can use the processor's AVX instructions.

    Inductor would compile a program against torch's headers for each set of them: without its
    cache on disk that is 4 of the 10 s to the first step. Extensions of the sets it still tries.
    """
    from torch._inductor import config, cpu_vec_isa

    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if known and config.cpp.vec_isa_ok is None:
        with config.patch({"cpp.vec_isa_ok": True}):
            cpu_vec_isa.valid_vec_isa_list()  # remembered for the process
