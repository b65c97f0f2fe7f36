"""Every kernel, compiled ahead of time: no spills, and 128-bit accesses on the aligned path."""

import re
import subprocess
import sys
from itertools import product

import pytest

pytest.importorskip("triton")
from tritonopt.device import INTERPRET

if INTERPRET:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from machine_code import (
    DTYPES,
    KERNELS,
    QUICK,
    TARGETS,
    MachineCode,
    compile_kernel,
    is_of,
    machine_code,
    main,
    most,
    parse,
)

from tritonopt.kernels import arithmetic, launch


def cases(*axes, fast):
    """All combinations; the fast part of the suite has those whose values are all in `fast`."""
    return [
        pytest.param(*case, marks=[] if fast.issuperset(case) else pytest.mark.slow)
        for case in product(*axes)
    ]


ALL = cases(KERNELS, DTYPES, TARGETS, fast={*QUICK, "fp32", "sm_90", "gfx942"})
SOME = [
    case for case in ALL
    if (case.values[0] in QUICK or case.values[2] in ("sm_90", "gfx942"))
    and is_of(*case.values[:2])
]  # fmt: skip
"""For the other targets a few kernels do: `python -m perf.machine_code` compiles all."""


@pytest.mark.parametrize("name, dtype, target", SOME)
def test_kernel(name, dtype, target):
    code = machine_code(KERNELS[name], dtype, target)
    assert code.problems(dtype, KERNELS[name], most(name, dtype, target)) == []


@pytest.mark.parametrize("target, fewest", [("sm_90", 10), ("gfx942", 16)])
def test_blocks_that_a_multiprocessor_holds(target, fewest):
    assert machine_code(KERNELS["rmsprop"], "fp32", target).blocks >= fewest


def test_blocks_are_those_of_the_compiler():
    kernel = KERNELS["irprop+, scaled"]
    code = machine_code(kernel, "fp64", "gfx942")
    text = compile_kernel(kernel, kernel.types("fp64"), TARGETS["gfx942"]).asm["amdgcn"]
    waves = int(re.findall(r"Occupancy: (\d+)", text)[0])  # of 64 threads, on each of 4 parts
    assert code.blocks == waves * 4 * 64 // launch.THREADS < 16


def test_a_narrow_access_is_a_problem():
    kernel = KERNELS["rmsprop"]
    code = machine_code(kernel, "fp32", "sm_90")
    for counts in (code.loads, code.stores):
        counts[32] += 1
        assert len(code.problems("fp32", kernel)) == 1
        counts[32] -= 1
    assert code._replace(stack=8).problems("fp32", kernel) == ["spills 8 bytes"]
    assert code.problems("fp32", kernel, code.registers) == []
    assert len(code.problems("fp32", kernel, code.registers - 1)) == 1


def test_exit_codes(monkeypatch, capsys):
    chosen = parse(["--dtypes", "fp32", "--targets", "sm_90", "--quick"])
    assert chosen == {"kernels": QUICK, "dtypes": ["fp32"], "targets": ["sm_90"]}
    chosen["kernels"] = ("norm",)
    assert main(**chosen) == 0
    assert "No spills" in capsys.readouterr().out
    monkeypatch.setattr(MachineCode, "problems", lambda *_: ["spills 8 bytes"])
    assert main(**chosen) == 1
    assert "1 with problems" in capsys.readouterr().out


ACCESSES = {
    "cuda": ("ptx", r"\b(ld|st)\.global\.(?:\w+\.)*[bv]|\b(bar)\.sync"),
    "hip": ("amdgcn", r"\b(?:global|buffer)_(load|store)_|\bs_(barrier)\b"),
}


@pytest.mark.parametrize(
    "name, dtypes, target",
    cases(
        ["rmsprop, all of torch", "rprop", "rprop-", "rprop+", "irprop+"],
        ["bf16 bf16 fp32", "bf16 fp16 fp32", "fp32 bf16 fp16"],
        ["sm_90", "gfx942"],
        fast={"rprop", "bf16 bf16 fp32", "sm_90"},
    ),
)
def test_no_thread_stores_what_others_have_yet_to_load(name, dtypes, target):
    """Where dtypes differ, a thread may load some elements of a tensor and store others."""
    backend = TARGETS[target].backend
    form, pattern = ACCESSES[backend]
    kernel, (param, grad, state) = KERNELS[name], dtypes.split()
    columns = zip(kernel.written, (param, state, state, state), strict=False)
    types = [grad, *(kind if used else None for used, kind in columns)]
    text = compile_kernel(kernel, types, TARGETS[target]).asm[form]
    found = ["".join(filter(None, match))[0] for match in re.findall(pattern, text)]
    order = "".join(found).replace("st", "s")
    assert not re.search("ls", order), order
    assert re.search("lb+s", order)


@pytest.mark.parametrize(
    "name", cases(["rmsprop, all", "irprop+, scaled", "norm"], fast={"rmsprop, all"})
)
def test_nothing_is_approximated_or_flushed(name):
    text = compile_kernel(KERNELS[name], KERNELS[name].types("fp32"), TARGETS["sm_90"]).asm["ptx"]
    assert not re.search(r"\.(approx|ftz|full)\b", text)
    assert len(re.findall(r"\b(?:sqrt|div)\.rn\.f32", text)) >= (name == "rmsprop, all")


@pytest.mark.skipif(not arithmetic.TINY_ROOTS_FAIL.value, reason="of triton 3.6 alone")
@pytest.mark.parametrize("target, scaled", [("gfx942", True), ("gfx950", True), ("sm_90", False)])
def test_tiny_numbers_are_scaled_for_their_root_where_they_must_be(target, scaled):
    kernel = KERNELS["rmsprop"]
    text = compile_kernel(kernel, kernel.types("fp32"), TARGETS[target]).asm["ttir"]
    assert ("1.84467441E+19" in text) == scaled  # 2**64


LAUNCH = """
import torch, triton, types
import triton.language as tl
from triton.backends.compiler import GPUTarget

launched, jitted, compiled = [], [], []

class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        launched.append((function, (x, y, z), args))

class Driver:
    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 200000},
        load_binary=lambda name, kernel, shared, device: (name, kernel, 0, 0, 1024),
    )
    launcher_cls = Launcher
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

triton.runtime.driver.set_active(Driver())
from tritonopt.kernels import launch

class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            jitted.append(self.kernel)
            compiled.append(self.kernel[grid](*args, **kwargs))
            return compiled[-1]
        return run

launch.rmsprop_kernel = Recorder(launch.rmsprop_kernel)
launch.rprop_kernel = Recorder(launch.rprop_kernel)
launch.square_sum_kernel = Recorder(launch.square_sum_kernel)
params, grads, *columns = ([torch.zeros(3000), torch.zeros(5)] for _ in range(5))
one, unaligned = torch.ones(()), torch.ones(2)[1]

def seen(update, *args, **hyper):
    "Launches anew and again: the same arguments must arrive, past the JIT."
    counts = []
    for _ in range(2):
        update(grads, hyper, *args)
        counts.append(len(jitted))
    (function, grid, first), (_, _, second) = launched[-2:]
    assert launched[-1][:2] == launched[-2][:2] and len(first) == len(second)
    assert all(a is b if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second))
    assert grid == (4, 1, 1) and counts[0] == counts[1]
    return second

rmsprop = dict(alpha=0.9, eps=0, weight_decay=1, momentum=0.5, maximize=False)
update = launch.Launch(launch.rmsprop_, params, columns)
assert seen(update, lr=0.01, **rmsprop)[9] == 0.01
assert seen(update, lr=1, **rmsprop)[9:15] == (1, 0.9, 0, 1, 0.5, 1) and len(jitted) == 1
assert seen(update, lr=one, **rmsprop)[5] is one and len(jitted) == 2
assert seen(update, lr=unaligned, **rmsprop)[5] is unaligned and len(jitted) == 3
assert seen(update, lr=0.01, **{**rmsprop, "maximize": True})[15] is True and len(jitted) == 4
rprop = dict(etaminus=0.5, etaplus=1.2, step_size_min=1e-6, step_size_max=50, maximize=True)
update = launch.Launch(launch.rprop_, params, columns[:2])
seen(update, **rprop)
assert seen(update, one, one.clone(), **rprop)[2] is one and len(jitted) == 6
assert seen(update, **rprop)[2] is None and len(jitted) == 6
grads = [grad.bfloat16() for grad in grads]
assert tl.bfloat16 in seen(update, **rprop)[13] and len(jitted) == 7
launch.square_sum(grads, [3000, 5], torch.float32, torch.device("cpu"))
assert compiled[-1].metadata.num_warps == 4 and not compiled[-1].metadata.enable_fp_fusion
for kernel in compiled:
    signature = next(line for line in kernel.asm["ttir"].splitlines() if "tt.func" in line)
    print(*map(signature.count, (": f64", "!tt.ptr<i64>", "!tt.ptr<f32>")))
"""


@pytest.mark.slow
def test_launches_bind_their_arguments():
    """Through the JIT's own binder, and past it, with a driver that has a target and no device."""
    done = subprocess.run([sys.executable, "-c", LAUNCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # fp64 scalars, tables, pointers (to a tensor lr, to factor and skip, to sums)
    rmsprop, rprop = ["6 2 0", "6 2 1", "6 2 1", "6 2 0"], ["5 2 0", "5 2 2", "5 2 0"]
    assert done.stdout.split("\n")[:-1] == [*rmsprop, *rprop, "0 2 1"]
