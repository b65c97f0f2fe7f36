"""What was moved or loaded is packed once, not at every step."""

import copy
import gc

from cases import OURS, TORCH, follow, is_packed, lists, network, pair, set_data

from tritonopt import slab


def test_moved_parameters_are_packed_once(name):
    model = network()
    ours, theirs, twin = pair(name, model)
    set_data(model)
    follow(ours, theirs, *lists(model, twin), 3)
    assert is_packed(ours, model.parameters())
    addresses = [p.data_ptr() for p in model.parameters()]
    follow(ours, theirs, *lists(model, twin), 3)
    assert addresses == [p.data_ptr() for p in model.parameters()]


def test_parameters_that_move_at_every_step_are_not_packed_at_every_step(name, monkeypatch):
    model = network()
    ours, theirs, twin = pair(name, model)
    allocations = []
    allocate = slab.allocate

    def counted(*args, **kwargs):
        allocations.append(args)
        return allocate(*args, **kwargs)

    monkeypatch.setattr(slab, "allocate", counted)
    follow(ours, theirs, *lists(model, twin), 1)
    allocations.clear()  # of the first step
    for _ in range(6):
        set_data(model)
        follow(ours, theirs, *lists(model, twin), 1)
    assert not allocations


def test_loaded_state_is_packed_once(name, monkeypatch):
    model = network()
    ours, theirs, twin = pair(name, model)
    follow(ours, theirs, *lists(model, twin), 2)
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    follow(ours, theirs, *lists(model, twin), 3)
    assert is_packed(ours, model.parameters())
    monkeypatch.setattr(slab, "allocate", None)
    follow(ours, theirs, *lists(model, twin), 3)


def test_two_optimizers_over_the_same_parameters(name):
    model = network()
    ours, theirs, twin = pair(name, model, lr=0.1)
    ours2 = OURS[name](model.parameters(), lr=0.01)
    theirs2 = TORCH[name](twin.parameters(), lr=0.01, foreach=False)
    follow(ours, theirs, *lists(model, twin), 2)
    addresses = [p.data_ptr() for p in model.parameters()]
    for _ in range(4):
        follow(ours, theirs, *lists(model, twin), 1)
        follow(ours2, theirs2, *lists(model, twin), 1)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    del ours
    gc.collect()
    follow(ours2, theirs2, *lists(model, twin))
