"""`Rprop(compact=True)`: torch's Rprop in half the state, to within a rounding of the step size."""

import pickle

import pytest
import torch
from cases import give_gradients, parameters
from compact_cases import SHAPES, assert_near, bits, pair

import tritonopt
from tritonopt.compact import KEY, decoded, encoded


@pytest.mark.parametrize(
    "options",
    [{}, {"maximize": True}, {"etas": (0.3, 1.7)}, {"step_sizes": (1e-3, 0.1)}, {"lr": 1e-7},
     {"variant": "rprop-"}, {"variant": "rprop+"}],
    ids=str,
)  # fmt: skip
def test_two_hundred_steps(options, device):
    ours, theirs, params, copies = pair(device, **options)
    steps = 40 if tritonopt.device.INTERPRET else 200
    for step in range(1, steps + 1):
        give_gradients(params, copies, {step % 7})
        for param, twin in zip(params, copies, strict=True):
            if param.grad is not None and step % 3 == 0 and param.dim():
                param.grad[..., :1] = twin.grad[..., :1] = 0.0
        ours.step()
        theirs.step()
        assert_near(ours, theirs, params, copies, step)


def test_irprop_plus():
    ours, theirs, params, copies = pair(variant="irprop+")
    for step in range(1, 20):
        give_gradients(params, copies)
        loss = float(torch.randn(()))
        ours.step(lambda loss=loss: loss)
        theirs.step(lambda loss=loss: loss)
        assert_near(ours, theirs, params, copies, step)


def test_the_same_bits_compiled_and_as_op():
    ours, _, params, _ = pair(shapes=[(300,), (5, 7)])
    compiled, _, copies, _ = pair(shapes=[(300,), (5, 7)])
    compiled.compile()
    compiled_too = [p.detach().clone() for p in params]
    codes = [torch.full_like(p, ours.initial(KEY, ours.param_groups[0])) for p in params]
    steps = [torch.zeros(()) for _ in params]
    for param, twin in zip(params, copies, strict=True):
        twin.data.copy_(param)

    @torch.compile(fullgraph=True, dynamic=False)
    def op(*lists):
        torch.ops.tritonopt.rprop_(*lists, compact=True, step_size_max=50)

    for _ in range(5):
        give_gradients(params, copies)
        ours.step()
        compiled.step()
        op(compiled_too, [p.grad for p in params], [], codes, steps)
        for i, (one, other) in enumerate(zip(params, copies, strict=True)):
            code = ours.state[one][KEY]
            assert torch.equal(one, other) and torch.equal(one, compiled_too[i])
            assert torch.equal(bits(code), bits(compiled.state[other][KEY]))
            assert torch.equal(bits(code), bits(codes[i]))


def test_the_op_refuses_what_it_would_ignore():
    one, op = [torch.ones(3)], torch.ops.tritonopt.rprop_
    with pytest.raises(ValueError, match="prevs to be empty"):
        op(one, one, [torch.ones(3)], [torch.ones(3)], [], compact=True)
    with pytest.raises(ValueError, match="fp32 tensors"):
        op([torch.ones(3).double()], one, [], [torch.ones(3)], [], compact=True)


def test_a_product_that_underflows_has_a_sign():
    """In torch two gradients of 1e-30 agree on nothing: their product is 0."""
    ours, theirs, params, copies = pair(shapes=[(3,)])
    for _ in range(2):
        for param in (*params, *copies):
            param.grad = torch.full((3,), 1e-30)
        ours.step()
        theirs.step()
    (entry,), (expected,) = ours.state.values(), theirs.state.values()
    torch.testing.assert_close(decoded(entry[KEY])[1], torch.full((3,), 0.012))
    torch.testing.assert_close(expected["step_size"], torch.full((3,), 0.01))


def test_numbers_at_the_ends():
    """Zero, subnormal, the largest, infinite, NaN; each with each sign."""
    values = torch.tensor([0.0, 1e-45, 1e-38, 1.0, 50.0, 3.4e38, float("inf"), float("nan")])
    for sign in (-1.0, 0.0, 1.0):
        code = encoded(torch.full_like(values, sign), values)
        signs, sizes = decoded(code)
        assert torch.equal(signs, torch.full_like(values, sign))
        number = values < 3e38
        assert (bits(sizes) - bits(values)).abs()[number].max() <= 2
        assert sizes[-2] == float("inf") and sizes[-1].isnan()


def test_it_is_said_once():
    optimizer = tritonopt.Rprop(parameters([(3,)]))
    with pytest.raises(AttributeError):
        optimizer.compact = True
    with pytest.raises(TypeError, match="compact is to be True or False"):
        tritonopt.Rprop(parameters([(3,)]), compact="no")


def test_gradients_in_half_precision():
    """State is in fp32, also of a copy; in torch, step sizes have the gradient's dtype."""
    (param,) = parameters([(3,)])
    ours = pickle.loads(pickle.dumps(tritonopt.Rprop([param], compact=True)))
    (param,) = ours.param_groups[0]["params"]
    param.grad_dtype = torch.bfloat16
    param.grad = torch.ones(3, dtype=torch.bfloat16)
    ours.step()
    assert ours.state[param][KEY].dtype == torch.float32
    torch.testing.assert_close(ours.state_dict()["state"][0]["step_size"], torch.full((3,), 0.01))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = tritonopt.Rprop([param], compact=True)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="compact=True is not in torch's.*it is "):
        optimizer.step()
    assert not optimizer.state and torch.equal(param, torch.ones_like(param))


@pytest.mark.parametrize("options", [{"foreach": True}, {"differentiable": True}], ids=str)
def test_refused_with_torchs_code(options):
    with pytest.raises(ValueError, match="compact=True is not in torch's code"):
        tritonopt.Rprop(parameters([(3,)]), compact=True, **options)


def test_not_of_one_group():
    with pytest.raises(ValueError, match="compact concerns all param groups"):
        tritonopt.Rprop([{"params": parameters([(3,)]), "compact": True}])


def test_what_it_moves():
    ours = tritonopt.Rprop(parameters([(100,)]), compact=True)
    lines = ours.describe().splitlines()
    assert lines[1].split()[-1] == "2,000" and "all groups: compact=True" in lines


def test_scaled_and_clipped():
    """The factor that clips leaves every sign: the same training, but for gradients of NaN."""
    params, copies = parameters(SHAPES), parameters(SHAPES)
    for param, twin in zip(params, copies, strict=True):
        twin.data.copy_(param.data)
    one = tritonopt.Rprop(params, compact=True, max_grad_norm=0.1, fused_amp=True)
    other = tritonopt.Rprop(copies, compact=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for turn in range(4):
        for param, twin in zip(params, copies, strict=True):
            twin.grad = torch.randn_like(twin)
            param.grad = twin.grad * 2 if turn != 2 else torch.full_like(twin, torch.inf)
        scaler.scale(torch.zeros(()))
        scaler.step(one)
        scaler.update(2.0)
        if turn != 2:
            other.step()
        for param, twin in zip(params, copies, strict=True):
            assert torch.equal(param, twin)
