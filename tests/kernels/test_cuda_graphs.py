"""CUDA graphs: on a GPU captures and replays; without one, what makes a capture safe.

The invariants run on the real host path with the kernels in Triton's interpreter.
"""

import copy
import gc

import pytest
import torch
from cases import OURS

from tritonopt.device import INTERPRET, is_capturing

two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
interpreted = pytest.mark.skipif(not INTERPRET, reason="needs the interpreter")
names = pytest.mark.parametrize("name", sorted(OURS))


@pytest.fixture
def capture(monkeypatch):
    """A switch: while it is on, every stream says that it records."""
    state = {"on": False}
    for module in ("device", "group", "ops", "rprop", "kernels.launch"):
        monkeypatch.setattr(f"tritonopt.{module}.is_capturing", lambda device: state["on"])
    return state


def optimizer_and_launch(name, **kwargs):
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 1500)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = OURS[name](params, **kwargs)
    optimizer.step()
    (part,) = next(iter(optimizer._units.groups.values())).plan.parts
    return optimizer, part.update


@interpreted
@names
def test_interpreted_capture_reads_nothing(name, capture, monkeypatch):
    """A value cannot be waited for, nor a copy."""
    optimizer, launch = optimizer_and_launch(name, lr=torch.tensor(0.01))
    to = torch.Tensor.to

    def refuse(*args, **kwargs):
        raise AssertionError("not during a capture")

    def copy_without_waiting(*args, non_blocking=False):
        return to(*args, non_blocking=True) if non_blocking else refuse()

    with monkeypatch.context() as during:
        during.setattr("tritonopt.slab.allocate", refuse)
        during.setattr(torch.cuda, "synchronize", refuse)
        for method in ("item", "__float__", "__bool__", "tolist", "cpu"):
            during.setattr(torch.Tensor, method, refuse)
        during.setattr(torch.Tensor, "to", copy_without_waiting)
        capture["on"] = True
        ((known, grads),) = optimizer._units.look(None)
        known.plan._count(known.lists[-1], None, None)
        launch.tables(grads)


@interpreted
@names
def test_interpreted_tables_of_captures_are_never_written_again(name, capture):
    optimizer, launch = optimizer_and_launch(name)
    captured = []
    for _ in range(4):
        capture["on"] = True
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        table, _ = launch.tables([p.grad for p in optimizer.param_groups[0]["params"]])
        captured.append((table, table.clone()))
        capture["on"] = False
        for _ in range(10):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn_like(p)
            optimizer.step()
    assert len({table.data_ptr() for table, _ in captured}) == 4
    assert all(torch.equal(table, then) for table, then in captured)


@interpreted
@names
def test_interpreted_captures_need_a_step_before(name, capture):
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = OURS[name]([param])
    capture["on"] = True
    with pytest.raises(RuntimeError, match="take one step before a graph captures it"):
        optimizer.step()
    assert torch.equal(param, torch.ones(5))
    assert not optimizer.state


@interpreted
def test_interpreted_op_needs_a_call_before(capture):
    arguments = [[torch.ones(3)], [torch.ones(3)], [torch.zeros(3)], [], [], []]
    capture["on"] = True
    with pytest.raises(NotImplementedError, match="must have run once"):
        torch.ops.tritonopt.rmsprop_(*arguments)


@interpreted
@names
def test_interpreted_replays_equal_eager(name, capture):
    """A replay is the recorded launch: the same table, and lr from where it lies."""
    lr = torch.tensor(0.01)
    optimizer, launch = optimizer_and_launch(name, lr=lr)
    params = optimizer.param_groups[0]["params"]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    eager = OURS[name](copies, lr=float(lr))
    eager.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    eager.param_groups[0]["lr"] = float(lr)

    capture["on"] = True
    tables = launch.tables([p.grad for p in params])
    hyper = optimizer.hyper(optimizer.param_groups[0])
    capture["on"] = False
    for number in range(20):
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad.normal_().clone()
        lr.fill_(0.01 * 0.97**number)
        launch.pointers = *tables, *launch.pointers[2:]
        launch.rule(launch, **hyper)
        eager.param_groups[0]["lr"] = float(lr)
        eager.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def on_cuda(name, **options):
    """Parameters and copies of them, an optimizer of each, and their common lr."""
    lr = torch.tensor(0.01, device="cuda")
    params = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (5, 1500)]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    options = {"lr": lr, "capturable": True, **options}
    ours, theirs = (OURS[name](some, **options) for some in (params, copies))
    return params, copies, ours, theirs, lr


CAUTIOUS = {"momentum": 0.9, "cautious": True, "bias_correction": True, "max_grad_norm": 9.0}


@cuda
@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in sorted(OURS)), ("RMSprop", CAUTIOUS)]
)
def test_whole_step_in_a_cuda_graph(name, options):
    params, copies, captured, eager, lr = on_cuda(name, **options)
    for p, q in zip(params, copies, strict=True):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    captured.step(), eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for number in range(100):
        for p, q in zip(params, copies, strict=True):
            q.grad.copy_(p.grad.normal_())
        lr.fill_(0.01 * 0.97**number)
        graph.replay()
        eager.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    assert float(captured.state[params[0]]["step"]) == 101


@cuda
@names
def test_what_a_graph_needs_lives_as_long_as_it(name):
    params, copies, captured, eager, _ = on_cuda(name)
    for p, q in zip(params, copies, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    captured.step(), eager.step()
    state = {p: dict(entry) for p, entry in captured.state.items()}  # as addresses, the user's care
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph):
        for _ in range(4):
            captured.step()
    del captured
    gc.collect()  # its tables are gone
    for _ in range(3):
        graph.replay()
        written = [torch.full((n,), 7).pin_memory().cuda() for n in (3, 20, 2000) for _ in range(9)]
        for _ in range(4):
            eager.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    del graph, state, written
    gc.collect()
    assert torch.cuda.memory_allocated() < before


@cuda
@names
def test_reduce_overhead(name):
    params, copies, ours, theirs, lr = on_cuda(name)
    step = torch.compile(ours.step, mode="reduce-overhead")
    for number in range(100):
        for p, q in zip(params, copies, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        lr.fill_(0.01 * 0.97**number)
        step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


@two
def test_cuda_streams_of_each_device_are_asked():
    """Not that of the current one."""
    first, second = (torch.device("cuda", index) for index in (0, 1))
    ones = [torch.ones(3, device=device) for device in (first, second)]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(second)
    with torch.cuda.device(second), torch.cuda.graph(graph, stream=stream):
        with torch.cuda.device(first):
            assert is_capturing(second)
            assert not is_capturing(first)
        ones[1].add_(1)


@two
@names
def test_cuda_parameters_on_two_devices(name):
    params = [torch.nn.Parameter(torch.randn(n, device=f"cuda:{n % 2}")) for n in (4, 5, 1500, 7)]
    copies = [torch.nn.Parameter(p.detach().cpu()) for p in params]
    ours, theirs = OURS[name](params, max_grad_norm=0.5), OURS[name](copies, max_grad_norm=0.5)
    for _ in range(3):
        for p, q in zip(params, copies, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.to(p.device)
        ours.step(), theirs.step()
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p.cpu(), q)
