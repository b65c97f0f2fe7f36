"""What the compilers make of the kernels: registers, stack, loads and stores by width.

    python -m perf.machine_code
    python -m perf.machine_code --quick
    python -m perf.machine_code --kernels rprop --dtypes fp32 --targets sm_90

No GPU is needed. Exit code 1 if a kernel spills, takes more registers than MOST allows, or if its
aligned path reads or writes a tensor by less than 128 bits.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

try:
    import triton
except ImportError:
    sys.exit("perf.machine_code needs triton: pip install triton")
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritonopt.kernels.counts import count_sum_kernel
from tritonopt.kernels.launch import BLOCK, NORM_BLOCK, REGISTERS, THREADS, options
from tritonopt.kernels.norm import square_sum_kernel
from tritonopt.kernels.rmsprop import rmsprop_kernel
from tritonopt.kernels.rprop import rprop_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
DTYPES = ("fp16", "bf16", "fp32", "fp64")
NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
BITS = {"fp16": 16, "bf16": 16, "int16": 16, "uint16": 16, "fp32": 32, "fp64": 64}
ALL = {"factor_ptr": "*fp32", "skip_ptr": "*fp32", "noise_ptr": "*i64"}
OPTIONAL = {**ALL, "lr_ptr": "*fp32", "gain_ptr": "*fp64"}
TWICE = {"mean_ptr": "*fp64", "counts_ptr": "*fp32"}  # of a rule that counts before it updates
"""Arguments that may be absent. On the device, of all kernels: what gradients are multiplied by,
whether the step is skipped, by what random bits are drawn; the learning rate, and the gains of bias
correction."""
_TORCH = ("MAXIMIZE", "DECAY", "CENTERED", "MOMENTUM")
_MORE = ("EPS_IN_SQRT", "LR_IN_MOMENTUM", "NESTEROV", "DECOUPLED", "NAN_SAFE", "BIAS_CORRECTION")


class Kernel(NamedTuple):
    """A kernel with constants; whether it writes the parameter, and each state that it may have."""

    function: Any
    constants: dict[str, Any]
    written: tuple[bool, ...] = ()
    block: int = BLOCK
    reads: bool = True  # whether it reads gradients
    stores: bool = True
    split: bool = False  # whether the parameter has lower halves, and fp32 state
    quantized: bool = False  # whether the average of squares are codes, with scales

    def types(self, dtype: str) -> list[str | None]:
        """Of each tensor: the gradient, and those that are written."""
        state = "fp32" if self.split else dtype
        first = "uint8" if self.quantized else state
        columns = zip(self.written, (dtype, first, state, state), strict=False)
        more = ["fp32"] * self.quantized + ["int16"] * self.split
        written = [of if used else None for used, of in columns]
        if "noise_ptr" not in self.constants and not self.quantized:
            written = ["uint16" if of == "bf16" else of for of in written]  # AT_RANDOM
        return [dtype if self.reads else None, *written, *more]

    def vectors(self, dtype: str) -> list[int]:
        """Accesses of 128 bits that a thread needs for each tensor; of codes and scales, none."""
        names = [name for name in self.types(dtype) if name and name != "uint8"]
        names = names[: len(names) - self.quantized]
        return [-(-self.block * BITS[name] // (128 * THREADS)) for name in names]


def _rmsprop(*on: str, split: bool = False, quantized: bool = False) -> Kernel:
    on = (*on, "noise_ptr") if quantized else on  # codes are drawn
    constants = {name: None for name in (*OPTIONAL, *TWICE) if name not in on}
    constants.update({name: name in on for name in (*_TORCH, *_MORE, "CAUTIOUS")})
    written = True, True, "CENTERED" in on, "MOMENTUM" in on
    stores = "counts_ptr" not in on
    return Kernel(
        rmsprop_kernel, constants, written, stores=stores, split=split, quantized=quantized
    )


def _rprop(variant: str, *on: str, split: bool = False) -> Kernel:
    constants = {name: None for name in ALL if name not in on}
    constants.update({name: name in on for name in ("COMPACT", "MAXIMIZE")}, VARIANT=variant)
    written = True, True, *[True] * ("COMPACT" not in on)
    return Kernel(rprop_kernel, constants, written, split=split)


KERNELS: dict[str, Kernel] = {
    "rmsprop": _rmsprop(),
    "rmsprop, momentum": _rmsprop("MOMENTUM"),
    "rmsprop, centered": _rmsprop("CENTERED"),
    "rmsprop, all of torch": _rmsprop(*_TORCH),
    "rmsprop, eps in sqrt": _rmsprop("EPS_IN_SQRT"),
    "rmsprop, bias correction": _rmsprop("BIAS_CORRECTION"),
    "rmsprop, centered, nan safe": _rmsprop("CENTERED", "NAN_SAFE"),
    "rmsprop, decoupled": _rmsprop("DECAY", "DECOUPLED"),
    "rmsprop, lr in momentum": _rmsprop("MOMENTUM", "LR_IN_MOMENTUM"),
    "rmsprop, nesterov": _rmsprop("MOMENTUM", "NESTEROV"),
    "rmsprop, cautious": _rmsprop("DECAY", "MOMENTUM", "CAUTIOUS", "mean_ptr"),
    "rmsprop, cautious, count": _rmsprop("DECAY", "MOMENTUM", "CAUTIOUS", "counts_ptr"),
    "rmsprop, scaled": _rmsprop("factor_ptr", "skip_ptr"),
    "rmsprop, split": _rmsprop(split=True),
    "rmsprop, quantized": _rmsprop(quantized=True),
    "rmsprop, stochastic": _rmsprop("noise_ptr"),
    "rmsprop, all": _rmsprop(*_TORCH, *_MORE, *(OPTIONAL.keys() - {"noise_ptr"})),
    "rprop": _rprop("irprop-"),
    "rprop, maximize": _rprop("irprop-", "MAXIMIZE"),
    "rprop-": _rprop("rprop-"),
    "rprop+": _rprop("rprop+"),
    "irprop+": _rprop("irprop+"),
    "rprop, compact": _rprop("irprop-", "COMPACT"),
    "irprop+, compact": _rprop("irprop+", "COMPACT"),
    "rprop, split": _rprop("irprop-", split=True),
    "rprop, stochastic": _rprop("irprop-", "noise_ptr"),
    "rprop, scaled": _rprop("irprop-", "factor_ptr", "skip_ptr"),
    "irprop+, scaled": _rprop("irprop+", "factor_ptr", "skip_ptr"),
    "norm": Kernel(square_sum_kernel, {}, block=NORM_BLOCK, stores=False),
    "counts": Kernel(count_sum_kernel, {"WIDTH": 5}, reads=False, stores=False),
}
QUICK = ("rmsprop", "rprop", "norm")
MOST = {
    "rmsprop": {"cuda": (48, 48, 96), "hip": (48, 56, 64)},
    "rmsprop, all of torch": {"cuda": (72, 72, 128), "hip": (56, 64, 112)},
    "rmsprop, all": {"cuda": (80, 88, 152), "hip": (64, 64, 128)},
    "rprop": {"cuda": (48, 48, 88), "hip": (48, 56, 72)},
    "norm": {"cuda": (48, 48, 80), "hip": (48, 56, 80)},
}
"""Registers of a thread at most, in halves, fp32 and fp64: what triton 3.6 to 3.8 take, rounded up
to 8, as a multiprocessor gives them away. Other kernels may take REGISTERS."""
PARTS = {"cuda": (4, 32, 2**14), "hip": (4, 64, 2**15)}
"""Of a multiprocessor: how many; threads that run together; registers. Each holds 512 threads."""


class MachineCode(NamedTuple):
    """One kernel for one target. What is counted is the aligned path's: the instructions from its
    first access of 128 bits to its last, and its loads and stores by width in bits."""

    registers: int
    blocks: int  # of THREADS that a multiprocessor holds at a time
    stack: int  # bytes of registers spilled
    loads: Counter[int]
    stores: Counter[int]
    instructions: int

    def problems(self, dtype: str, kernel: Kernel, most: int = REGISTERS) -> list[str]:
        """Spills, too many registers, and accesses of tensors by less than 128 bits."""
        read = sum(kernel.vectors(dtype))
        written = read - kernel.vectors(dtype)[0] if kernel.stores else 0
        names = set(kernel.function.arg_names) - kernel.constants.keys()
        scalars = len(names & {*OPTIONAL, "mean_ptr"})  # one value each
        few = 8 if kernel.quantized else 0  # codes and scales
        found = [f"spills {self.stack} bytes"] if self.stack else []
        if self.registers > most:
            found.append(f"{most} registers expected")
        if self.loads[128] != read or self.loads.total() > self.loads[128] + scalars + few:
            found.append(f"{read} loads of 128 bits expected")
        if self.stores[128] != written or self.stores.total() > self.stores[128] + few:
            found.append(f"{written} stores of 128 bits expected")
        return found


class Driver(NamedTuple):
    """In the place of a GPU's: kernels ask what they are compiled for."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_kernel(kernel: Kernel, dtypes: Sequence[str | None], target: GPUTarget) -> Any:
    """For a gradient, a parameter and its state of these dtypes; None: no such state."""
    names = kernel.function.arg_names
    types = tuple(name and getattr(tl, NAMES.get(name, name)) for name in dtypes)
    constants = {**kernel.constants, "TYPES": types, "BLOCK": kernel.block}
    pointers = {**OPTIONAL, **TWICE, "sums_ptr": "*fp64" if types[0] == tl.float64 else "*fp32"}
    kinds = {n: pointers.get(n, "*i64" if n.endswith("_ptr") else "fp64") for n in names}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    aligned: Any = {(index,): [["tt.divisibility", 16]] for index in range(2)}
    source = ASTSource(kernel.function, signature, constexprs=constants, attrs=aligned)
    triton.runtime.driver.set_active(Driver(target))
    try:
        return triton.compile(source, target=target, options=options(target, THREADS, types))
    finally:
        triton.runtime.driver.set_active(None)  # the machine's own, if it has one


def machine_code(kernel: Kernel, dtype: str, target: str) -> MachineCode:
    compiled = compile_kernel(kernel, kernel.types(dtype), TARGETS[target])
    if TARGETS[target].backend == "hip":
        return _amd(compiled.asm["amdgcn"])
    return _nvidia(compiled.asm["cubin"])


def is_of(name: str, dtype: str) -> bool:
    """Whether there is such a kernel: a sign has its place in fp32 alone, the rest is of bf16."""
    if "compact" in name or name == "counts":
        return dtype == "fp32"
    if "quantized" in name:
        return dtype != "fp64"
    return dtype == "bf16" or not any(word in name for word in ("split", "stochastic"))


def most(name: str, dtype: str, target: str) -> int:
    """Registers that a kernel may take."""
    if name not in MOST:
        return REGISTERS
    return MOST[name][TARGETS[target].backend][{"fp32": 1, "fp64": 2}.get(dtype, 0)]


def _blocks(registers: int, backend: str) -> int:
    count, together, file = PARTS[backend]
    threads = min(512, file // (-(-registers // 8) * 8)) // together * together
    return count * threads // THREADS


def _nvidia(cubin: bytes) -> MachineCode:
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    widths = {"": 32, "64": 64, "128": 128, "U16": 16, "U8": 8}
    lines = re.findall(r"^\s+/\*\w{4}\*/\s+(.*)", sass, re.M)
    counts = _aligned(lines, widths, r"\b(LDG|STG)\.E(?:\.(\w+))?")
    return MachineCode(registers, _blocks(registers, "cuda"), stack, *counts)


def _aligned(
    lines: list[str], widths: dict[str, int], pattern: str
) -> tuple[Counter[int], Counter[int], int]:
    """Loads and stores by width, and the lines, from the first access of 128 bits to the last."""
    found = [(index, re.search(pattern, line)) for index, line in enumerate(lines)]
    accesses = [(i, m[1], widths[m[2] or ""]) for i, m in found if m]
    wide = [index for index, _, width in accesses if width == 128] or [0]
    loads, stores = Counter[int](), Counter[int]()
    for index, kind, width in accesses:
        if wide[0] <= index <= wide[-1]:
            (loads if kind in ("LDG", "load") else stores)[width] += 1
    return loads, stores, wide[-1] - wide[0] + 1


def _amd(text: str) -> MachineCode:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[0])

    widths = {"ushort": 16, "short": 16, "short_d16": 16, "short_d16_hi": 16, "dword": 32,
              "ubyte": 8, "byte": 8, "byte_d16_hi": 8,
              "dwordx2": 64, "dwordx4": 128}  # fmt: skip
    stack = field("private_segment_fixed_size") + 4 * field("vgpr_spill_count")
    lines = re.findall(r"^\t([a-z]\w+ .*)", text, re.M)
    pattern = r"\b(?:global|buffer)_(load|store)_(\w+)"
    registers = field("vgpr_count")
    counts = _aligned(lines, widths, pattern)
    return MachineCode(registers, _blocks(registers, "hip"), stack, *counts)


def main(kernels: Sequence[str], dtypes: Sequence[str], targets: Sequence[str]) -> int:
    row = "{:24} {:5} {:7} {:>9} {:>6} {:>6} {:>12} {:>9} {:>10}  {}"
    print("The aligned path; loads and stores of 128 bits, and instructions per element.")
    print(row.format("kernel", "dtype", "target", "registers", "blocks", "stack",
                     "instructions", "loads", "stores", "").rstrip())  # fmt: skip
    failed = 0
    for name, dtype, target in product(kernels, dtypes, targets):
        if not is_of(name, dtype):
            continue
        kernel = KERNELS[name]
        code = machine_code(kernel, dtype, target)
        problems = code.problems(dtype, kernel, most(name, dtype, target))
        failed += bool(problems)
        each = code.instructions / (kernel.block / THREADS)
        between = f"{each:.1f}" if kernel.stores else "-"  # what follows the last load is not
        counts = code.loads[128], code.stores[128], "; ".join(problems)
        shown = code.registers, code.blocks, code.stack, between, *counts
        print(row.format(name, dtype, target, *shown).rstrip())
    print(f"{failed} with problems" if failed else "No spills, no narrow access of a tensor.")
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None = None) -> dict[str, Sequence[str]]:
    """The arguments of `main`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, names in (("kernels", KERNELS), ("dtypes", DTYPES), ("targets", TARGETS)):
        parser.add_argument(f"--{option}", nargs="+", choices=names, default=list(names),
                            metavar="NAME", help=f"of {'; '.join(names)}")  # fmt: skip
    parser.add_argument("--quick", action="store_const", const=QUICK, dest="kernels",
                        help="under two minutes: the default rules and the norm")  # fmt: skip
    return vars(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main(**parse()))
