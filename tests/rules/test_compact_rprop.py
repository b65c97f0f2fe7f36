"""`Rprop(compact=True)`: torch's Rprop in half the state, to within a rounding of the step size."""

import copy
import io
import pickle

import pytest
import torch
from cases import give_gradients, parameters
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import tritonopt
from tritonopt.compact import KEY, decoded, encoded

SHAPES = [(64,), (33, 5), (2000,), (1,), (), (0,)]


def pair(device="cpu", shapes=SHAPES, **options):
    params = parameters(shapes, device=device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    if "variant" in options:
        plain = tritonopt.Rprop(copies, **options)
    else:
        plain = torch.optim.Rprop(copies, foreach=False, **options)
    return tritonopt.Rprop(params, compact=True, **options), plain, params, copies


def bits(tensor):
    return tensor.view(torch.int32)


def assert_near(ours, theirs, params, copies, steps):
    """Equal signs, and step sizes within 2 ulp per step: none may have been somewhere else."""
    for one, other in zip(params, copies, strict=True):
        if other not in theirs.state:
            assert one not in ours.state
            continue
        entry, expected = ours.state[one], theirs.state[other]
        assert entry.keys() == {"step", KEY} and entry["step"] == expected["step"]
        sign, step_size = decoded(entry[KEY].cpu())
        assert torch.equal(sign, expected["prev"].cpu().sign())
        size = expected["step_size"].cpu()
        assert bool(((step_size - size).abs() <= 2 * steps * 2**-23 * size).all())
        moved = (one - other).detach().abs()
        assert bool((moved <= steps * 2**-22 * (1 + one.detach().abs())).all())


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


# Checkpoints.


def follow_on(ours, theirs, params, copies, steps):
    for param, twin in zip(params, copies, strict=True):
        twin.data.copy_(param.data)
    for step in range(1, 6):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        assert_near(ours, theirs, params, copies, steps + step)


def test_torchs_checkpoint_is_read():
    ours, theirs, params, copies = pair()
    for _ in range(3):
        give_gradients(params, copies)
        theirs.step()
    theirs.param_groups[0]["foreach"] = None  # else it would ask for torch's code
    saved = theirs.state_dict()
    before = copy.deepcopy(saved)
    ours.load_state_dict(saved)
    assert str(before) == str(saved)  # nothing of the caller's is written to
    follow_on(ours, theirs, params, copies, 3)


def test_torchs_checkpoint_is_written():
    ours, theirs, params, copies = pair()
    for _ in range(4):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
    state = theirs.state_dict()["state"]
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for key, entry in saved["state"].items():
        assert [*entry] == [*state[key]] and torch.equal(entry["prev"], state[key]["prev"].sign())
        assert entry["step_size"].dtype == entry["prev"].dtype == torch.float32
    assert {param: [*entry] for param, entry in ours.state.items()} == {
        param: ["step", KEY] for param in params
    }
    theirs.load_state_dict(saved)
    follow_on(ours, theirs, params, copies, 4)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_nothing_is_lost_on_the_way(way):
    ours, _, params, _ = pair()
    for _ in range(3):
        give_gradients(params, params)
        ours.step()
    if way == "state_dict":
        other = tritonopt.Rprop(params, compact=True)
        other.load_state_dict(ours.state_dict())
    else:
        other = copy.deepcopy(ours) if way == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert other.compact and "compact=True" in other.describe()
    saved, expected = (optimizer.state_dict()["state"] for optimizer in (other, ours))
    assert saved.keys() == expected.keys()
    for entry, same in zip(saved.values(), expected.values(), strict=True):
        assert entry.keys() == same.keys() and entry["step"] == same["step"]
        assert torch.equal(entry["prev"], same["prev"])
        assert torch.equal(bits(entry["step_size"]), bits(same["step_size"]))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("started", [False, True], ids=["", "started"])
def test_a_distributed_checkpoint(flatten, started):
    """Flattened, torch hands over only the keys that state has: not those that it would need."""
    model = torch.nn.Linear(4, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    ours, other = (tritonopt.Rprop(model.parameters(), compact=True) for _ in range(2))
    for _ in range(3):
        give_gradients([*model.parameters()], [*model.parameters()])
        ours.step()
    saved = get_optimizer_state_dict(model, ours, options=options)
    if started:
        other.step()
    if flatten:
        model.zero_grad()  # else torch makes no state before, and then loads none
        with pytest.raises((KeyError, ValueError), match="signed_step_size|is not a plain tensor"):
            set_optimizer_state_dict(model, other, saved, options=options)
            give_gradients([*model.parameters()], [*model.parameters()])
            other.step()
        return
    set_optimizer_state_dict(model, other, saved, options=options)
    ours.step()
    other.step()
    for entry, same in zip(other.state.values(), ours.state.values(), strict=True):
        assert torch.equal(bits(entry[KEY]), bits(same[KEY]))


def test_torchs_tensors_written_into_state():
    """As ZeroRedundancyOptimizer does, and whoever knows torch's state."""
    ours, theirs, params, copies = pair(shapes=[(6,), (3, 4)])
    for _ in range(3):
        give_gradients(params, copies)
        theirs.step()
    entries = [dict(theirs.state[twin]) for twin in copies]
    for param, entry in zip(params, entries, strict=True):
        ours.state[param] = {key: value.clone() for key, value in entry.items()}
    assert "2" in ours.describe()
    follow_on(ours, theirs, params, copies, 3)


def test_torchs_tensors_written_between_steps():
    """In the place of its own. Beside it they count for nothing, as in each step before."""
    ours, theirs, params, copies = pair(shapes=[(6,), (3, 4)])
    for _ in range(2):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
    give_gradients(params, copies)
    theirs.step()
    for param, twin in zip(params, copies, strict=True):
        del ours.state[param][KEY]
        ours.state[param].update({k: v.clone() for k, v in theirs.state[twin].items()})
    follow_on(ours, theirs, params, copies, 3)
    before = ours.state_dict()["state"][0]["step_size"]
    ours.state[params[0]].update(prev=torch.ones(6), step_size=torch.ones(6))
    ours._units.forget()
    assert torch.equal(ours.state_dict()["state"][0]["step_size"], before)
    del params[0].grad, copies[0].grad
    ours.step()
    assert torch.equal(ours.state_dict()["state"][0]["step_size"], before)


@pytest.mark.parametrize("key", ["prev", "step_size"])
def test_torchs_tensors_of_another_shape(key):
    """Which would spread over all elements."""
    ours, theirs, params, copies = pair(shapes=[(6,)])
    give_gradients(params, copies)
    theirs.step()
    ours.state[params[0]] = {**theirs.state[copies[0]], key: torch.ones(1)}
    with pytest.raises(KeyError, match="signed_step_size"):
        ours.step()


def test_state_that_lacks_something():
    ours, theirs, params, copies = pair(shapes=[(6,), (3, 4)])
    give_gradients(params, copies)
    theirs.step()
    theirs.param_groups[0]["foreach"] = None
    saved = copy.deepcopy(theirs.state_dict())
    del saved["state"][1]["prev"]
    saved["state"]["global_step"] = 3
    ours.load_state_dict(saved)
    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyError, match="signed_step_size"):
        ours.step()
    assert all(map(torch.equal, params, before)) and ours.state["global_step"] == 3


def test_a_model_that_is_another_one_for_a_while():
    """In fp64 there is no step, in another memory layout there is."""
    model = torch.nn.Conv2d(3, 4, 3)
    twin = copy.deepcopy(model)
    ours = tritonopt.Rprop(model.parameters(), compact=True)
    theirs = torch.optim.Rprop(twin.parameters(), foreach=False)
    params, copies = [*model.parameters()], [*twin.parameters()]
    for step in range(1, 5):
        give_gradients(params, copies)
        if step == 2:
            ours.load_state_dict(ours.state_dict())
            model.double()
            with pytest.raises(ValueError, match="float64, not float32"):
                ours.step()
            model.float()
        if step == 3:
            model.to(memory_format=torch.channels_last)
        ours.step()
        theirs.step()
        assert_near(ours, theirs, params, copies, step)


def test_state_in_half_precision_has_no_room_for_a_sign():
    ours, _, params, _ = pair(shapes=[(6,)])
    give_gradients(params, params)
    ours.step()
    ours.state[params[0]][KEY] = ours.state[params[0]][KEY].bfloat16()
    with pytest.raises(ValueError, match="is to be of float32"):
        ours.step()
    with pytest.raises(ValueError, match="fp32 tensors"):
        one, half = [torch.ones(3)], [torch.ones(3, dtype=torch.bfloat16)]
        torch.ops.tritonopt.rprop_(one, one, [], half, [], compact=True)


def test_loaded_in_inference_mode():
    ours, _, params, _ = pair(shapes=[(6,)])
    give_gradients(params, params)
    ours.step()
    with torch.inference_mode():
        ours.load_state_dict(ours.state_dict())
    ours.step()


@pytest.mark.parametrize("options", [{"compact": True}, {"max_grad_norm": 1.0}], ids=str)
def test_given_to_a_group_and_to_the_constructor(options):
    """As ZeroRedundancyOptimizer does."""
    group = {"params": parameters([(3,)]), **options}
    optimizer = tritonopt.Rprop([group], **options)
    assert str(next(iter(options))) in optimizer.describe()


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


def test_hooks_see_torchs_state():
    ours, _, params, _ = pair(shapes=[(3,)])
    give_gradients(params, params)
    ours.step()
    seen = []
    ours.register_state_dict_post_hook(lambda _, saved: seen.append([*saved["state"][0]]))
    ours.state_dict()
    assert seen == [["step", "prev", "step_size"]]


def test_the_dummy_step_leaves_it_trainable():
    model = torch.nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    ours = tritonopt.Rprop(model.parameters(), lr=0.1, compact=True)
    get_optimizer_state_dict(model, ours)
    other = tritonopt.Rprop(model.parameters(), lr=0.1, compact=True)
    other.load_state_dict(ours.state_dict())
    theirs = torch.optim.Rprop(twin.parameters(), lr=0.1, foreach=False)
    params, copies = [*model.parameters()], [*twin.parameters()]
    for step in range(1, 4):
        give_gradients(params, copies)
        other.step()
        theirs.step()
        assert_near(other, theirs, params, copies, step)


# What it refuses, and what it tells.


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
