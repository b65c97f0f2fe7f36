"""What torch.optim promises beside the numbers: signatures, errors, hooks, schedulers, imports."""

import copy
import inspect
import os
import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from cases import INFO, OURS, TORCH, assert_follows, follow, give_gradients, parameters, twins
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tritonopt.device import path

SHAPES = [(3, 5), (40,), (), (64,)]


def one_step(optimizer, params):
    give_gradients(params, params)
    optimizer.step()


# Signatures and types.


def test_signature(name):
    """torch's, argument by argument; what more there is can be given by keyword only."""
    ours, theirs = (inspect.signature(kinds[name]).parameters for kinds in (OURS, TORCH))
    shared = [ours[key].replace(annotation=p.annotation) for key, p in theirs.items()]
    assert shared == list(theirs.values())
    more = [p for key, p in ours.items() if key not in theirs]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in more)
    assert [key for key in ours if key in theirs] == list(theirs)


@pytest.mark.parametrize("method", ["step", "zero_grad", "add_param_group", "load_state_dict"])
def test_method_signatures(name, method):
    ours, theirs = (inspect.signature(getattr(k[name], method)) for k in (OURS, TORCH))
    assert list(ours.parameters) == list(theirs.parameters)
    for mine, other in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert (mine.default, mine.kind) == (other.default, other.kind)


def test_types(name):
    optimizer = OURS[name](parameters(SHAPES))
    assert isinstance(optimizer, TORCH[name]) and isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ == name
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_defaults(name):
    params = parameters(SHAPES)
    ours, theirs = OURS[name](params), TORCH[name](params)
    assert {k: ours.defaults[k] for k in theirs.defaults} == theirs.defaults
    for key, value in theirs.param_groups[0].items():
        if key != "params":
            assert ours.param_groups[0][key] == value


def test_repr_names_every_option(name):
    params = parameters(SHAPES)
    ours, theirs = repr(OURS[name](params)), repr(TORCH[name](params))
    assert set(theirs.splitlines()) <= set(ours.splitlines())


def test_a_subclass(name):
    class Half(OURS[name]):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = 0.125
            return super().step(closure)

    params = parameters(SHAPES)
    _, theirs, copies = twins(name, params, lr=0.125)
    follow(Half(params, lr=1.0), theirs, params, copies)


# Errors.


def errors(name):
    torch.manual_seed(0)
    rows = INFO[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    return [pytest.param(name, row, id=f"{name}-{row.optimizer_error_input.desc}") for row in rows]


@pytest.mark.parametrize("name, row", errors("RMSprop") + errors("Rprop"))
def test_torchs_error_inputs(name, row):
    given = row.optimizer_error_input
    params = [nn.Parameter(torch.randn(1))] if given.params is None else given.params
    kwargs = given.kwargs
    if issubclass(row.error_type, Warning):
        with pytest.warns(row.error_type, match=row.error_regex):
            OURS[name](params, **kwargs)
    else:
        with pytest.raises(row.error_type, match=row.error_regex):
            OURS[name](params, **kwargs)


NAN = float("nan")
BAD = {
    "RMSprop": [
        {"lr": -1.0}, {"lr": NAN}, {"eps": -1.0}, {"eps": NAN}, {"momentum": -1.0},
        {"momentum": NAN}, {"weight_decay": -1.0}, {"alpha": -0.1}, {"alpha": NAN},
        {"lr": torch.ones(2)}, {"lr": torch.ones(0)}, {"lr": torch.tensor(-1.0)}, {"lr": "1"},
        {"fused": True},
    ],
    "Rprop": [
        {"lr": -1.0}, {"lr": NAN}, {"etas": (0.5, 0.9)}, {"etas": (1.1, 1.2)}, {"etas": (0, 1.2)},
        {"etas": (NAN, 1.2)}, {"etas": (-0.5, 1.2)}, {"lr": torch.ones(2)}, {"lr": "1"},
        {"weight_decay": 0.1}, {"etas": (0.5,)},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "name, kwargs", [pytest.param(n, k, id=f"{n}-{k}") for n, rows in BAD.items() for k in rows]
)
def test_bad_options_raise_as_in_torch(name, kwargs):
    raised = []
    for kinds in (OURS, TORCH):
        params = parameters([(3,)])
        before = params[0].data_ptr()
        with pytest.raises(Exception) as error:
            kinds[name](params, **kwargs)
        raised.append((error.type, str(error.value).replace("SlabOptimizer", name)))
        assert params[0].data_ptr() == before
    assert raised[0] == raised[1]


PARAMS = {
    "empty": lambda: [],
    "a tensor": lambda: torch.zeros(3),
    "not a leaf": lambda: [nn.Parameter(torch.zeros(3)) * 2],
    "not tensors": lambda: [1, 2],
    "a group with a set": lambda: [{"params": set(parameters([(3,)]))}],
}


@pytest.mark.parametrize("make", PARAMS.values(), ids=PARAMS)
def test_bad_params_raise_as_in_torch(name, make):
    raised = []
    for kinds in (OURS, TORCH):
        torch.manual_seed(0)
        with pytest.raises(Exception) as error:
            kinds[name](make())
        raised.append((error.type, re.sub(r"0x\w+", "", str(error.value))))
    assert raised[0][0] == raised[1][0]
    assert raised[0][1][:60] == raised[1][1][:60]


def test_empty_groups(name):
    params = parameters(SHAPES)
    ours = OURS[name]([{"params": []}, {"params": params}])
    one_step(ours, params)
    assert ours.state[params[0]]["step"] == 1 and "group" in ours.describe()


@pytest.mark.parametrize("before", [0, 2])
def test_capturable_on_a_cpu_raises_as_in_torch_and_changes_nothing(name, before):
    texts = []
    for kinds in (OURS, TORCH):
        params = parameters(SHAPES)
        optimizer = kinds[name](params)
        for _ in range(before):
            one_step(optimizer, params)
        optimizer.param_groups[0]["capturable"] = True
        values = [p.detach().clone() for p in params]
        state = copy.deepcopy([dict(optimizer.state[p]) for p in params])
        with pytest.raises(AssertionError) as error:
            one_step(optimizer, params)
        texts.append(str(error.value))
        assert all(map(torch.equal, params, values))
        for param, entry in zip(params, state, strict=True):
            for key, value in entry.items():
                assert torch.equal(optimizer.state[param][key], value)
    assert texts[0] == texts[1]
    with pytest.raises(AssertionError):
        one_step(OURS[name](params, capturable=True), params)


def test_a_gradient_of_a_wrong_shape_raises_as_in_torch(name):
    """It can come from `p.data = smaller` after the gradient was set."""
    for kinds in (OURS, TORCH):
        params = parameters([(4,), (40,)])
        optimizer = kinds[name](params)
        one_step(optimizer, params)
        give_gradients(params, params)
        params[0].data = torch.zeros(3)
        with pytest.raises(RuntimeError, match="size"):
            optimizer.step()


# Hooks.


def test_all_hooks(name):
    calls = []

    def note(what):
        return lambda *args, **kwargs: calls.append((what, args[0]))

    params = parameters(SHAPES)
    ours = OURS[name](params)
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        ours.register_step_pre_hook(note("pre")),
        ours.register_step_post_hook(note("post")),
        ours.register_state_dict_pre_hook(note("state pre")),
        ours.register_state_dict_post_hook(note("state post")),
        ours.register_load_state_dict_pre_hook(note("load pre")),
        ours.register_load_state_dict_post_hook(note("load post")),
    ]
    one_step(ours, params)
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    for handle in handles:
        handle.remove()
    one_step(ours, params)
    ours.state_dict()
    expected = ["global pre", "pre", "post", "global post", "state pre", "state post", "load pre",
                "load post"]  # fmt: skip
    assert sorted(what for what, _ in calls) == sorted(expected)
    assert all(who is ours for _, who in calls)


STEP_HOOKS = {
    "global pre": lambda _, hook: register_optimizer_step_pre_hook(hook),
    "global post": lambda _, hook: register_optimizer_step_post_hook(hook),
    "pre": lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
    "post": lambda optimizer, hook: optimizer.register_step_post_hook(hook),
}


@pytest.mark.parametrize("register", STEP_HOOKS.values(), ids=STEP_HOOKS)
def test_a_step_hook_alone(name, register):
    params = parameters(SHAPES)
    ours = OURS[name](params)
    one_step(ours, params)
    calls = []
    handle = register(ours, lambda optimizer, args, kwargs: calls.append(optimizer))
    one_step(ours, params)
    handle.remove()
    one_step(ours, params)
    assert calls == [ours]


def test_a_profiler_sees_the_step(name):
    params = parameters(SHAPES)
    ours = OURS[name](params)
    with torch.profiler.profile() as profile:
        one_step(ours, params)
    assert f"Optimizer.step#{name}.step" in {event.key for event in profile.key_averages()}


def test_a_pre_hook_that_changes_everything(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)

    def change(optimizer, args, kwargs):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = param.grad * -2
            param.data = param.data.clone()

    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(change)
    follow(ours, theirs, params, copies)


def test_a_pre_hook_that_gives_a_closure(name):
    params = parameters(SHAPES)
    ours = OURS[name](params)
    ours.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 2.5), {}))
    give_gradients(params, params)
    assert ours.step() == 2.5


def test_hooks_that_change_checkpoints(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    ours.register_state_dict_post_hook(lambda opt, state: {**state, "more": 1})
    assert ours.state_dict()["more"] == 1
    kept = copy.deepcopy(theirs.state_dict())
    ours.register_load_state_dict_pre_hook(lambda opt, state: copy.deepcopy(kept))
    theirs.load_state_dict(copy.deepcopy(kept))
    ours.load_state_dict({"param_groups": [], "state": {}})
    follow(ours, theirs, params, copies, 3)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(name, to_none):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    for _ in range(3):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        for optimizer in (ours, theirs):
            optimizer.zero_grad(set_to_none=to_none)
            optimizer.step()
        assert_follows(ours, theirs, params, copies)
        assert all((p.grad is None) == to_none for p in params)


# Paths.


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}], ids=str)
def test_foreach_is_torchs(name, options):
    params = parameters(SHAPES)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = OURS[name](params, **options), TORCH[name](copies, **options)
    follow(ours, theirs, params, copies, 4)
    text = ours.describe()
    assert f"4 left to torch: {next(iter(options))}={options['foreach']}" in text


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(name, dtype):
    params = parameters([(5,), (3, 3)], dtype) + parameters([(7,)])
    ours, theirs, copies = twins(name, params)
    left = f"2 left to torch: is {str(dtype)[6:]}"
    assert left in ours.describe()  # before their first gradient, too
    follow(ours, theirs, params, copies, 4)
    assert left in ours.describe()


def test_complex_and_real_of_one_storage(name):
    """Views of one storage: updated in torch's order."""
    params, copies = [], []
    values = torch.randn(5, dtype=torch.complex64)
    for some in (params, copies):
        base = values.clone()
        some += [nn.Parameter(base), nn.Parameter(torch.view_as_real(base))]
    ours, theirs = OURS[name](params), TORCH[name](copies, foreach=False)
    follow(ours, theirs, params, copies, 4)


def test_describe_counts(name):
    params = parameters([(3, 5), (40,), (7,)])
    params.append(nn.Parameter(torch.randn(20)[3:9]))
    params.append(nn.Parameter(torch.randn(4, 6)[:, ::2]))
    params.append(nn.Parameter(torch.randn(4, dtype=torch.complex64)))
    held = params[1].detach()
    ours = OURS[name]([{"params": params[:4]}, {"params": params[4:]}])
    one_step(ours, params)
    text = ours.describe()
    rows = [line.split() for line in text.splitlines()]
    header = "group device dtype path packed in place torch elements bytes/step".split()
    assert rows[0] == header
    kind = path(torch.device("cpu"))[1].split()
    nbytes = (20 if name == "RMSprop" else 28) * 68
    assert rows[1] == ["0", "cpu", "float32", *kind, "2", "2", "0", "68", f"{nbytes:,}"]
    assert ["1", "cpu", "float32", "torch", "0", "0", "1", "12", "-"] in rows
    assert ["1", "cpu", "complex64", "torch", "0", "0", "1", "4", "-"] in rows
    for note in [
        "group 0: 1 in place: shares its storage with another tensor",
        "group 0: 1 in place: is a view of a larger storage",
        "group 1: 1 left to torch: is not dense",
        "group 1: 1 left to torch: is complex64",
    ]:
        assert note in text
    assert torch.equal(held, params[1])


def test_describe_changes_nothing(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    for _ in range(4):
        assert ours.describe() == ours.describe()
        follow(ours, theirs, params, copies, 1)


def test_no_kernel_for_a_device(name, monkeypatch):
    """Then torch's own implementation runs."""
    monkeypatch.setattr("tritonopt.eligible.path", lambda device: (None, f"no kernel for {device}"))
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    assert not ours.state
    follow(ours, theirs, params, copies, 3)
    assert "4 left to torch: no kernel for cpu" in ours.describe()


def test_autocast(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    for _ in range(3):
        give_gradients(params, copies)
        with torch.autocast("cpu"):
            ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def test_grad_scaler(name):
    """It skips a step of which a gradient is infinite."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    for step in range(4):
        give_gradients(params, copies)
        for scaler, optimizer, some in zip(scalers, (ours, theirs), (params, copies), strict=True):
            scaler.scale(torch.ones(()))
            if step == 1:
                some[1].grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        assert_follows(ours, theirs, params, copies)
    assert ours.state[params[0]]["step"] == 3


# Schedulers.

SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.3),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.5, total_steps=12, cycle_momentum=isinstance(o, torch.optim.RMSprop)
    ),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(
        o, 0.01, 0.3, step_size_up=3, cycle_momentum=isinstance(o, torch.optim.RMSprop)
    ),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.ConstantLR(o, 0.1, 3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        milestones=[4],
    ),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(name, make, lr):
    params = parameters(SHAPES)
    ours, _, copies = twins(name, params, lr=copy.deepcopy(lr))
    theirs = TORCH[name](copies, lr=copy.deepcopy(lr), foreach=False)
    schedulers = [make(optimizer) for optimizer in (ours, theirs)]
    for _ in range(10):
        follow(ours, theirs, params, copies, 1)
        for scheduler in schedulers:
            scheduler.step()
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_reduce_on_plateau(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0) for o in (ours, theirs)]
    for _ in range(5):
        follow(ours, theirs, params, copies, 1)
        for scheduler in schedulers:
            scheduler.step(1.0)


def test_averaged_models(name):
    model = nn.Linear(5, 3)
    twin = copy.deepcopy(model)
    ours = OURS[name](model.parameters())
    theirs = TORCH[name](twin.parameters(), foreach=False)
    means = [torch.optim.swa_utils.AveragedModel(net) for net in (model, twin)]
    for _ in range(4):
        follow(ours, theirs, [*model.parameters()], [*twin.parameters()], 1)
        for mean, net in zip(means, (model, twin), strict=True):
            mean.update_parameters(net)
    for mine, other in zip(*(mean.parameters() for mean in means), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-6)


# Imports.


def run(code, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAIN = """
    import torch, tritonopt
    for kind in (tritonopt.RMSprop, tritonopt.Rprop):
        model = torch.nn.Linear(4, 3)
        optimizer = kind(model.parameters(), lr=0.1)
        before = model.weight.detach().clone()
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(before, model.weight)
        print(optimizer.describe())
"""


def test_importing_imports_no_triton():
    run("import sys, tritonopt; assert not [m for m in sys.modules if m.startswith('triton.')]")


def test_stepping_on_a_cpu_imports_no_kernel():
    """torch itself imports triton with its first optimizer."""
    check = "assert not [m for m in sys.modules if m.startswith('tritonopt.kernels')]"
    run(textwrap.dedent(TRAIN) + f"import sys; {check}")


BLOCKED = """
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Blocker())
"""


def test_without_triton():
    assert "eager" in run(textwrap.dedent(BLOCKED) + textwrap.dedent(TRAIN))


def test_interpreter_asked_for():
    pytest.importorskip("triton")
    assert "triton, interpreted" in run(TRAIN, TRITON_INTERPRET="1")


def test_no_warnings(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = parameters(SHAPES)
        ours = OURS[name](params)
        one_step(ours, params)
        ours.load_state_dict(ours.state_dict())
        one_step(ours, params)
        copy.deepcopy(ours)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_parameters_without_memory(name, kind):
    """Their steps compute shapes, as torch's do."""
    mode = torch.device("meta") if kind == "meta" else FakeTensorMode()
    for cls in (OURS[name], TORCH[name]):
        with mode:
            (param,) = parameters([(3, 5)], device=kind if kind == "meta" else "cpu")
            optimizer = cls([param])
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert optimizer.state[param].keys() >= {"step"}


class Plain(torch.Tensor):
    pass


def test_state_has_the_type_of_a_subclass(name):
    types = []
    for cls in (OURS[name], TORCH[name]):
        param = torch.randn(3).as_subclass(Plain).requires_grad_()
        optimizer = cls([param])
        param.grad = torch.ones_like(param)
        optimizer.step()
        types.append({key: type(value) for key, value in optimizer.state[param].items()})
    assert types[0] == types[1]


def test_the_layout_of_a_sparse_parameter_is_the_reason(name):
    param = torch.nn.Parameter(torch.eye(3).to_sparse())
    assert "left to torch: is sparse_coo" in OURS[name]([param]).describe()
