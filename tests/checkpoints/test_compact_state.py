"""The state of `Rprop(compact=True)`: made, loaded, written, saved as torch does, found again."""

import copy
import io
import pickle

import pytest
import torch
from cases import give_gradients, parameters
from compact_cases import assert_near, bits, follow_on, pair
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import tritonopt
from tritonopt.compact import KEY


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
