"""torch.compile(opt.step) and opt.compile(): equal to eager whatever happens between steps."""

import copy

import pytest
import torch
from cases import OURS
from compile_cases import (
    BACKENDS,
    KWARGS,
    NAMES,
    SCHEDULERS,
    assert_close,
    fresh,
    give_gradients,
    graphs,
    optimizers,
    pairs,
    parameters,
    skip_interpreted,
)  # fmt: skip

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted


# Entrance 1: the traced step. It runs the very code that eager runs: equal to the last bit.


@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks", "fullgraph"])
@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
@pytest.mark.parametrize(("name", "kwargs"), [(n, k) for n in NAMES for k in KWARGS[n]], ids=str)
def test_compiled_step(name, kwargs, backend, fullgraph, device):
    ours, theirs = optimizers(name, parameters(device=device), **kwargs)
    step = torch.compile(ours.step, backend=backend, fullgraph=fullgraph)
    for _ in range(3):
        give_gradients(ours, theirs)
        step()
        theirs.step()
    assert_close(ours, theirs)
    assert graphs() == 1


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize(
    ("name", "backend"), [("RMSprop", "inductor"), ("RMSprop", "aot_eager"), ("Rprop", "aot_eager")]
)
def test_float_lr_needs_two_graphs(name, backend, schedule):
    kwargs = {"momentum": 0.9} if name == "RMSprop" and schedule == "one cycle" else {}
    ours, theirs = optimizers(name, parameters(), lr=0.01, **kwargs)
    schedulers = [SCHEDULERS[schedule](o) for o in (ours, theirs)]
    step = torch.compile(ours.step, backend=backend, fullgraph=True)
    for _ in range(50):
        give_gradients(ours, theirs)
        step()
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_close(ours, theirs)
    assert graphs() <= 2


@pytest.mark.parametrize("name", NAMES)
def test_tensor_lr_needs_one_graph(name):
    ours, theirs = optimizers(name, parameters(), lr=torch.tensor(0.01))
    theirs.param_groups[0]["lr"] = ours.param_groups[0]["lr"].clone()
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (ours, theirs)]
    step = torch.compile(ours.step, fullgraph=True)
    for _ in range(50):
        give_gradients(ours, theirs)
        step()
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_close(ours, theirs)
    assert graphs() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_reads_before_see_the_old_values_and_after_the_new(name, backend):
    ours, theirs = optimizers(name, parameters())

    def read_step_read(optimizer):
        params = optimizer.param_groups[0]["params"]
        before = [p * 2 for p in params]
        optimizer.step()
        return before, [p * 2 for p in params]

    with torch.no_grad():
        for _ in range(2):
            give_gradients(ours, theirs)
            result = torch.compile(read_step_read, backend=backend, fullgraph=True)(ours)
            expected = read_step_read(theirs)
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_reads_of_step_before_and_after(name, backend):
    ours, theirs = optimizers(name, parameters(((3,), (2,))))

    def read_step_read(optimizer):
        steps = [optimizer.state[p]["step"] for p in optimizer.param_groups[0]["params"]]
        before = [1 - 0.9**step for step in steps]
        optimizer.step()
        return before, [step * 2 for step in steps]

    with torch.no_grad():
        for _ in range(2):
            give_gradients(ours, theirs)
            result = torch.compile(read_step_read, backend=backend, fullgraph=True)(ours)
            torch.testing.assert_close(result, read_step_read(theirs))
    assert_close(ours, theirs)


COPIES = {
    "clone": torch.clone,
    "clone of a view": lambda t: t.detach().view(-1).clone(),
    "cat": lambda t: torch.cat([t.view(-1)]),
    "repeat": lambda t: t.view(-1).repeat(1),
    "times 1": lambda t: t * 1,
    "plus 0": lambda t: t + torch.zeros_like(t),
    "bits": lambda t: t.detach().view(torch.int32).clone(),
}
if torch.__version__ >= "2.13":  # before, Inductor could not
    COPIES["booleans"] = lambda t: t.detach().view(torch.bool).clone()


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("name", NAMES)
def test_copies_between_steps_are_copies(name, copy):
    ours, theirs = optimizers(name, parameters(((3, 5), (7,))))

    def snapshots(optimizer):
        found = []
        for _ in range(2):
            optimizer.step()
            for param, state in optimizer.state.items():
                found += [COPIES[copy](t) for t in (param, *state.values()) if t.dim()]
        return found

    compiled = torch.compile(snapshots, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            give_gradients(ours, theirs)
            found = compiled(ours)
            torch.testing.assert_close(found, snapshots(theirs), rtol=0, atol=0)
            for tensor in found:
                tensor.zero_()
    assert_close(ours, theirs)


SCALARS = {
    "computed": lambda p, state: p[0].exp() * 2,
    "copied": lambda p, state: p[-1].clone(),
    "of state": lambda p, state: next(t for t in state.values() if t.dim())[0].exp(),
    "compared": lambda p, state: p[0] > 0.5,
    "a view": lambda p, state: p.detach()[1],
    "reduced": lambda p, state: p.mean(),
}


@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("name", NAMES)
def test_scalars_are_those_of_their_time(name, scalar):
    """Read from larger tensors, before a step and between two."""
    ours, theirs = optimizers(name, parameters(((5,),)), lr=0.5)

    def read(optimizer):
        ((param, state),) = optimizer.state.items()
        found = []
        for _ in range(2):
            found.append(SCALARS[scalar](param, state))
            optimizer.step()
        return found

    compiled = torch.compile(read, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            give_gradients(ours, theirs)
            torch.testing.assert_close(compiled(ours), read(theirs))
    assert_close(ours, theirs)


AVERAGES = {
    "average": lambda b, a, p, state: b.lerp_(p, 0.5),
    "snapshot": lambda b, a, p, state: b.copy_(p * 2),
    "of rows": lambda b, a, p, state: b.add_(p.mean(0)),
    "of state": lambda b, a, p, state: b.add_(next(t for t in state if t.dim()), alpha=2),
    "a scalar": lambda b, a, p, state: a.add_(p[0, 0] * 3),
    "one of the other": lambda b, a, p, state: a.add_(b.add_(p).norm()),
    "a part": lambda b, a, p, state: b[:2].add_(p[:2].sigmoid()),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_averaged_before_a_step_is_of_that_time(name, average):
    """Inductor would compute what is written to other tensors at the end of the graph."""
    ours, theirs = optimizers(name, parameters(((4, 3), (4, 3))))
    tensors = [[torch.zeros(4, 3), torch.zeros(())] for _ in range(2)]

    def average_and_step(optimizer, b, a):
        for _ in range(2):
            for param, state in optimizer.state.items():
                AVERAGES[average](b, a, param, state.values())
            optimizer.step()

    for param in pairs(ours, theirs):
        for one in param:
            one.grad = torch.ones_like(one)
    theirs.step()  # it makes the state
    ours.step()
    compiled = torch.compile(average_and_step, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            give_gradients(ours, theirs)
            compiled(ours, *tensors[0])
            average_and_step(theirs, *tensors[1])
            torch.testing.assert_close(*tensors)
    assert_close(ours, theirs)


def test_what_is_averaged_into_a_batch_of_any_size():
    (param,) = parameters(((3,),))
    ours, theirs = optimizers("RMSprop", [param])

    def fn(optimizer, x):
        x.add_(optimizer.param_groups[0]["params"][0] * 2)
        optimizer.step()

    compiled = torch.compile(fn, dynamic=True)
    with torch.no_grad():
        for size in (4, 5, 6):
            give_gradients(ours, theirs)
            found, expected = torch.zeros(size, 3), torch.zeros(size, 3)
            compiled(ours, found)
            fn(theirs, expected)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["inductor", "tritonopt"])
def test_copies_of_what_the_public_ops_write(backend):
    op = torch.ops.tritonopt.rmsprop_

    def fn(p, g, v, n):
        op([p], [g], [v], [], [], [n], lr=0.1)
        found = [p.clone(), p * 1, n + 0, p[0].exp(), torch.native_dropout(p, 0.0, False)[0]]
        op([p], [g], [v], [], [], [n], lr=0.1)
        return found

    def start():
        return torch.ones(4), torch.ones(4), torch.zeros(4), torch.zeros(())

    torch.testing.assert_close(torch.compile(fn, backend=backend)(*start()), fn(*start()))


def test_a_pass_of_ones_own_stays():
    """It is the only thing that copies need of Inductor, for the time of one compilation."""
    seen = []
    (param,) = parameters(((3, 5),))
    optimizer = OURS["RMSprop"]([param])
    param.grad = torch.ones_like(param)
    with torch._inductor.config.patch(joint_custom_pre_pass=seen.append):
        torch.compile(optimizer.step)()
    assert len(seen) == 1
    torch._dynamo.reset()
    torch.compile(optimizer.step)()
    assert torch._inductor.config.joint_custom_pre_pass is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_scalars_of_float64(name, backend):
    """torch.compile loses what operators of torch write there."""
    params = [torch.nn.Parameter(torch.randn((), dtype=torch.float64)) for _ in range(2)]
    ours, theirs = optimizers(name, params)
    step = torch.compile(ours.step, backend=backend, fullgraph=True)
    for _ in range(3):
        give_gradients(ours, theirs)
        step()
        theirs.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_scalars_of_float64_in_groups(name):
    """Of a later group dynamo knows before its turn comes, though nobody has read it."""
    params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((3,), (), ())]
    ours, theirs = optimizers(name, params)
    for optimizer in (ours, theirs):
        members = optimizer.param_groups[0].pop("params")
        options = optimizer.param_groups.pop()
        optimizer.param_groups += [{**options, "params": [member]} for member in members]
    step = torch.compile(ours.step, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        give_gradients(ours, theirs)
        step()
        theirs.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("group", [0, 1])
def test_scalars_of_float64_that_are_read_first(group):
    param = torch.nn.Parameter(torch.randn((), dtype=torch.float64))
    other = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    for one in (param, other):
        one.grad = torch.ones_like(one)
    both = [{"params": [param]}, {"params": [other]}]
    optimizer = OURS["RMSprop"](both if group == 0 else both[::-1])

    def read_and_step():
        before = optimizer.state[param]["square_avg"] * 2
        optimizer.step()
        return before

    with pytest.raises(Exception, match="step outside of the compiled function"):
        torch.compile(read_and_step, backend="aot_eager", fullgraph=True)()


@pytest.mark.parametrize("kwargs", [{"bias_correction": True}, {"decoupled_weight_decay": True}])
def test_tensor_lr_is_rounded_as_in_eager(kwargs):
    kwargs |= {"momentum": 0.9, "weight_decay": 0.1}
    ours, theirs = optimizers("RMSprop", parameters(), lr=torch.tensor(0.01), **kwargs)
    step = torch.compile(ours.step, backend="aot_eager", fullgraph=True)
    for _ in range(10):
        give_gradients(ours, theirs)
        step()
        theirs.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_function_with_model_and_step(name):
    def train(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        run = torch.compile(train) if compiled else train
        optimizer = OURS[name](model.parameters())
        batches = [torch.randn(6, 4) for _ in range(4)]
        losses.append([float(run(model, optimizer, x)) for x in batches])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


def test_closure():
    ours, theirs = optimizers("RMSprop", parameters(((4,),)))

    def closure(optimizer):
        (param,) = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    step = torch.compile(ours.step)
    for _ in range(3):
        loss = step(lambda: closure(ours))
        torch.testing.assert_close(loss, theirs.step(lambda: closure(theirs)))
    assert_close(ours, theirs, rtol=1e-6)


def test_backward_notices_the_step():
    (param,) = parameters(((4,),))
    optimizer = OURS["RMSprop"]([param])
    loss = (param * param).sum()
    param.grad = torch.randn(4)
    torch.compile(optimizer.step)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("momenta", [(0.9, 0.5, 0.4, 0, 0, 0.3), (0.9, 0, 0.4, 0.4)], ids=str)
def test_momentum_turned_off_and_on(momenta):
    """Without it the buffers stay as they are."""
    ours, theirs = optimizers("RMSprop", parameters(), momentum=0.9)
    step = torch.compile(ours.step, backend="aot_eager")
    for momentum in momenta:
        give_gradients(ours, theirs)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["momentum"] = momentum
        step()
        theirs.step()
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("option", "name", "values"),
    [("nesterov", "momentum", (0.9, 0.5, 0.0)), ("bias_correction", "alpha", (0.9, 0.8, 1.0))],
)
def test_options_are_checked_in_every_graph(option, name, values):
    (param,) = parameters(((4,),))
    optimizer = OURS["RMSprop"]([param], momentum=0.9, **{option: True})
    step = torch.compile(optimizer.step, backend="aot_eager")
    for value in values[:-1]:
        param.grad = torch.randn(4)
        optimizer.param_groups[0][name] = value
        step()
    optimizer.param_groups[0][name] = values[-1]
    with pytest.raises(Exception, match=f"{option}=True requires"):
        step()


def test_what_the_op_does_not_take_goes_to_torch():
    params = [*parameters(((3,),)), torch.nn.Parameter(torch.randn(2, dtype=torch.complex64))]
    base = torch.randn(6)
    params += [torch.nn.Parameter(base[:4]), torch.nn.Parameter(base[2:])]
    ours, theirs = optimizers("RMSprop", params[:2])
    step = torch.compile(ours.step, backend="aot_eager")
    for _ in range(2):
        give_gradients(ours, theirs)
        step()
        theirs.step()
    assert_close(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("kwargs", [{"foreach": True}, {"foreach": False}], ids=str)
def test_torch_on_request(kwargs):
    ours, theirs = optimizers("Rprop", parameters(((3,), (2, 2))), **kwargs)
    step = torch.compile(ours.step, backend="aot_eager")
    for _ in range(2):
        give_gradients(ours, theirs)
        step()
        theirs.step()
    assert_close(ours, theirs, rtol=1e-6)


# Between two steps, for both entrances.


def move(ours, theirs):
    for p, _ in pairs(ours, theirs):
        p.data = p.data.clone()


def move_state(ours, theirs):
    for p, _ in pairs(ours, theirs):
        ours.state[p] = {key: value.clone() for key, value in ours.state[p].items()}


def add_group(ours, theirs):
    extra = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
    theirs.add_param_group({"params": [torch.nn.Parameter(p.detach().clone()) for p in extra]})
    ours.add_param_group({"params": extra})


def load(ours, theirs):
    saved = copy.deepcopy(theirs.state_dict())
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(saved))


def clear_state(ours, theirs):
    ours.state.clear()
    theirs.state.clear()


def other_options(ours, theirs):
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["maximize"] = True


EVENTS = [move, move_state, add_group, load, clear_state, other_options]


ENTRANCES = [("torch.compile", "aot_eager"), *(("opt.compile", b) for b in BACKENDS)]


def compiled_step(optimizer, entrance):
    way, backend = entrance
    if way == "opt.compile":
        optimizer.compile(backend=backend)
        return optimizer.step
    return torch.compile(optimizer.step, backend=backend, fullgraph=True)


def tolerance(entrance):
    return 1e-4 if entrance[0] == "opt.compile" else 0.0


@pytest.mark.parametrize("entrance", ENTRANCES, ids="-".join)
@pytest.mark.parametrize("event", EVENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_between_steps(name, event, entrance):
    ours, theirs = optimizers(name, parameters())
    step = compiled_step(ours, entrance)
    for number in range(6):
        if number in (2, 4):
            event(ours, theirs)
        give_gradients(ours, theirs)
        step()
        theirs.step()
    assert_close(ours, theirs, rtol=tolerance(entrance))


@pytest.mark.parametrize("entrance", ENTRANCES, ids="-".join)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_come_and_go(name, entrance):
    ours, theirs = optimizers(name, parameters(), lr=0.1)
    step = compiled_step(ours, entrance)
    for missing in [(0, 1, 2, 3), (1,), (), (1,), (0, 3), (), (1,)]:
        give_gradients(ours, theirs, missing)
        for optimizer in (ours, theirs):  # Rprop's first step of each parameter is from this lr
            optimizer.param_groups[0]["lr"] *= 0.9
        step()
        theirs.step()
    assert_close(ours, theirs, rtol=tolerance(entrance))


def test_twenty_optimizers_do_not_fall_out_silently(caplog):
    """They share the code of `step` and with it dynamo's limit, of which dynamo warns."""
    for _ in range(20):
        ours, theirs = optimizers("RMSprop", parameters(((3,), (4,))))
        step = torch.compile(ours.step, backend="aot_eager")
        before = graphs()
        for _ in range(2):
            give_gradients(ours, theirs)
            step()
            theirs.step()
        assert_close(ours, theirs)
        assert graphs() > before or "recompile_limit" in caplog.text


def test_twenty_optimizers_stay_compiled():
    """opt.compile() gives each configuration code of its own."""
    for number in range(20):
        ours, theirs = optimizers("RMSprop", parameters(((3,), (4,))), alpha=0.9 + number / 1000)
        ours.compile(backend="aot_eager")
        for _ in range(2):
            give_gradients(ours, theirs)
            ours.step()
            theirs.step()
        assert_close(ours, theirs, rtol=1e-5)
        assert graphs() == number + 1


VARIANTS = [
    ("RMSprop", {"eps_in_sqrt": True}),
    ("RMSprop", {"momentum": 0.9, "lr_in_momentum": True, "nesterov": True}),
    ("RMSprop", {"initial_scale": 1.0, "bias_correction": True}),
    ("RMSprop", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("Rprop", {"variant": "rprop-"}),
    ("Rprop", {"variant": "rprop+"}),
    ("Rprop", {"variant": "irprop+"}),
]


@pytest.mark.parametrize("entrance", ENTRANCES, ids="-".join)
@pytest.mark.parametrize(("name", "kwargs"), VARIANTS, ids=str)
def test_variants(name, kwargs, entrance):
    ours, theirs = optimizers(name, parameters(), **kwargs)
    step = compiled_step(ours, entrance)
    for number in range(5):
        give_gradients(ours, theirs, missing={1} if number == 2 else ())
        if kwargs.get("variant") == "irprop+":
            if entrance[0] == "torch.compile":
                with pytest.raises(Exception, match="compares losses on the host"):
                    step(lambda: torch.tensor(1.0))
                return
            step(lambda loss=number % 3: float(loss))
            theirs.step(lambda loss=number % 3: float(loss))
        else:
            step()
            theirs.step()
        assert_close(ours, theirs, rtol=1e-5)
