"""Every feature on the path of kernels: some tests once more, in Triton's interpreter.

It must be chosen before import. `TRITON_INTERPRET=1 pytest` runs all that concerns kernels there.
"""

import pytest

from tritonopt.device import INTERPRET

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRET, reason="is what it starts")

SOME = {
    "kernels/test_cuda_graphs.py": "captures, tables",
    "kernels/test_launches.py": "sizes, addresses, missing gradients",
    "rules/test_third_rule.py": "a rule of somebody else's",
    "rules/test_clipping_and_scaling.py::test_amp": "fused_amp, max_grad_norm",
    "rules/test_option_values.py::test_many_groups": "options",
    "rules/test_variant_formulas.py::test_rprop_kernel_has_the_bits_of_the_eager_rule": "variants",
    "rules/test_variant_formulas.py::test_rmsprop_kernel_is_near_the_eager_rule": "variants",
    "contract/test_missing_and_sparse_gradients.py::test_missing_gradients_are_skipped": "None",
    "contract/test_changed_groups.py::test_changed_groups": "groups",
    "memory/test_storages.py::test_memory_layouts": "views and strides",
}
"""Tests, and what they touch."""


def test_some_of_everything(interpreted):
    output, _ = interpreted.communicate()
    assert interpreted.returncode == 0, output[-5000:]
