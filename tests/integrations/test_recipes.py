"""The recipes of this folder's README run as they stand, and train as with torch's optimizers."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from cases import OURS, TORCH, assert_same, take_steps
from torch import multiprocessing, nn

import tritonopt
from tritonopt.device import INTERPRET

PAGE = (Path(__file__).parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
LIBRARIES = "timm", "transformers", "stable_baselines3", "deepxde", "lightning"

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter rounds square roots otherwise")


def run(number):
    for library in LIBRARIES:
        if f"import {library}\n" in BLOCKS[number]:
            pytest.importorskip(library, exc_type=ImportError)
    torch.manual_seed(0)
    found = {"__name__": "recipe"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(BLOCKS[number], found)
    return found


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    yield
    torch.set_default_device(None)  # which DeepXDE sets where there is a GPU


def recipe_of(title):
    return next(i for i, block in enumerate(BLOCKS) if title in block)


def test_no_recipe_is_long():
    for block in BLOCKS:
        lines = [line for line in block.splitlines() if line and "import" not in line]
        assert len(lines) <= 10


def test_timm():
    found = run(recipe_of("OptimInfo"))
    ours, model = found["optimizer"], found["model"]
    twin = copy.deepcopy(model)
    theirs = found["timm"].optim.create_optimizer_v2(twin, "rmsproptf", lr=0.01, momentum=0.9)
    inputs = torch.randn(2, 3, 64, 64)
    for _ in range(3):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()
    assert type(ours) is tritonopt.RMSprop
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_transformers_by_class_and_arguments():
    trainer = run(recipe_of("optimizer_cls_and_kwargs"))["trainer"]
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is tritonopt.RMSprop and optimizer.param_groups[0]["alpha"] == 0.9


def test_transformers_by_override():
    found = run(recipe_of("create_optimizer(self"))
    arguments = found["transformers"].TrainingArguments("out", report_to=[])
    trainer = found["Trainer"](nn.Linear(4, 2), arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    assert type(trainer.optimizer) is tritonopt.Rprop
    assert trainer.lr_scheduler.optimizer is trainer.optimizer


def test_lightning():
    """The callback is the recipe's; what a trainer writes is left out."""
    callback = run(recipe_of("FusedOptimizers"))["trainer"].callbacks[0]
    import lightning_cases

    trainer = lightning_cases.lightning.Trainer(**lightning_cases.QUIET, callbacks=[callback])
    trainer.fit(lightning_cases.Module(TORCH["RMSprop"]), lightning_cases.loader())
    assert type(trainer.optimizers[0]) is tritonopt.RMSprop
    wrapped = trainer.lightning_module.optimizers()
    assert wrapped.describe() == wrapped.optimizer.describe() == trainer.optimizers[0].describe()


def test_stable_baselines3():
    """The agent's weights are those that it has with torch's RMSprop, which it has by default."""
    block = BLOCKS[recipe_of("policy_kwargs")]
    agent = run(recipe_of("policy_kwargs"))["agent"]
    assert type(agent.policy.optimizer) is tritonopt.RMSprop
    stock = block.replace("policy_kwargs=chosen, ", "")
    weights = []
    for text in (block, stock):
        found = {}
        text = text.replace('device="cpu")\nagent.learn', 'device="cpu", seed=0)\nagent.learn')
        exec(text, found)
        weights.append(found["agent"].policy.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(map(torch.equal, *[each.values() for each in weights]))


@pytest.mark.slow
def test_deepxde():
    found = run(recipe_of("deepxde.Model"))
    losses = found["model"].losshistory.loss_train
    assert type(found["model"].opt) is tritonopt.Rprop and losses[-1].sum() < losses[0].sum()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS)
def test_a_process_trains_what_is_shared(kind):
    """A step in another process is seen here, in parameters and state, and equals torch's."""
    model = run(recipe_of("share_memory()"))["model"]
    twin = copy.deepcopy(model)
    ours, theirs = OURS[kind](model.parameters()), TORCH[kind](twin.parameters())
    take_steps(model, ours, 1)
    for entry in ours.state.values():
        for tensor in entry.values():
            tensor.share_memory_()
    process = multiprocessing.get_context("spawn").Process(target=take_steps, args=(model, ours, 3))
    process.start()
    process.join(100)
    assert process.exitcode == 0
    take_steps(twin, theirs, 4)
    assert_same(ours, theirs, [*model.parameters()], [*twin.parameters()])
