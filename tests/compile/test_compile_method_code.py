"""After `optimizer.compile()`, Inductor's loop suits its size, and no number is computed in it."""

import pytest
from compile_cases import (
    assert_close,
    fresh,
    give_gradients,
    optimizers,
    parameters,
    skip_interpreted,
)  # fmt: skip
from torch._inductor.utils import run_and_get_code

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted


@pytest.mark.slow
def test_bias_correction_is_a_number_of_the_loop():
    """Inductor would compute its power for every element."""
    ours, theirs = optimizers("RMSprop", parameters(((2**17,),)), bias_correction=True)
    ours.compile()
    for _ in range(3):
        give_gradients(ours, theirs)
        _, code = run_and_get_code(ours.step)
        theirs.step()
        assert not any("pow(" in text for text in code)
    assert_close(ours, theirs, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(100, 2**20), (2**20, 100)], ids=str)
def test_the_size_compiled_first_does_not_decide_about_threads(sizes):
    """Inductor's graph of a dynamic size has the loop that suits the first one."""
    parallel = {}
    for size in sizes:
        ours, theirs = optimizers("Rprop", parameters(((size,),)))
        ours.compile()
        give_gradients(ours, theirs)
        _, (code,) = run_and_get_code(ours.step)
        parallel[size] = "#pragma omp parallel" in code
        theirs.step()
        assert_close(ours, theirs)
    assert parallel == {100: False, 2**20: True}
