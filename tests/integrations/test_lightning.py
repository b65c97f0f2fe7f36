"""Training in Lightning: with our optimizers every run equals torch's to the last bit."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cases import OURS, TORCH

from tritonopt.device import INTERPRET

lightning = pytest.importorskip("lightning")
import lightning_cases
from lightning.fabric import Fabric
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningCLI
from lightning_cases import (
    QUIET,
    Early,
    Frozen,
    FrozenFirst,
    Judged,
    Manual,
    Module,
    Monitored,
    Scheduled,
    Skipping,
    Unlogged,
    assert_equal,
    loader,
    outcome,
)

from tritonopt.lightning import FusedOptimizers

# The interpreter rounds RMSprop's square roots otherwise: there, Rprop in a few rows.
names = pytest.mark.parametrize("name", ["Rprop"] if INTERPRET else OURS)
eager = pytest.mark.skipif(INTERPRET, reason="as on the eager path; other rows are interpreted")
RESUMES_SAFELY = "weights_only" in inspect.signature(lightning.Trainer.fit).parameters
INTERPRETED = ("alone", "scheduler", "64-true", "manual", "frozen", "built early")


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    warnings.filterwarnings("ignore", module="lightning")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny layers: more only wait for each other
    yield
    torch.set_num_threads(threads)


def average():
    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("came with Lightning 2.6")
    average_fn = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    return [callbacks.WeightAveraging(multi_avg_fn=average_fn)]


def stochastic():
    return [callbacks.StochasticWeightAveraging(swa_lrs=0.001, swa_epoch_start=1)]


SCENARIOS = {
    "alone": (Module, {}),
    "scheduler": (Scheduled, {}),
    "monitor": (Monitored, {}),
    "clip by norm": (Module, {"gradient_clip_val": 0.1}),
    "clip by value": (Module, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "accumulation": (Module, {"accumulate_grad_batches": 4}),
    "SWA": (Module, {"callbacks": stochastic}),
    "EMA": (Module, {"callbacks": average}),
    "64-true": (Module, {"precision": "64-true"}),
    "bf16-mixed": (Module, {"precision": "bf16-mixed"}),
    "manual": (Manual, {}),
    "frozen": (Frozen, {}),
    "frozen at first": (FrozenFirst, {}),
    "None from training_step": (Skipping, {}),
    "built early": (Early, {}),
    "built early, 64-true": (Early, {"precision": "64-true"}),
}
"""Class of the module, options of the trainer."""
scenarios = pytest.mark.parametrize(
    "scenario",
    [pytest.param(row, marks=[] if row == "scheduler" else pytest.mark.slow) for row in SCENARIOS],
)


def fit(make, kind=Module, fits=1, wrap=lambda module: module, **options):
    made = options.pop("callbacks", list)()
    trainer = lightning.Trainer(**{**QUIET, **options, "callbacks": made})
    module = kind(make)
    for _ in range(fits):
        trainer.fit(wrap(module), loader())
        trainer.fit_loop.max_epochs += 1
    return outcome(trainer, module)


@scenarios
@names
def test_as_torch(name, scenario):
    kind, options = SCENARIOS[scenario]
    assert_equal(fit(OURS[name], kind, **options), fit(TORCH[name], kind, **options))


@scenarios
@names
def test_the_callback(name, scenario):
    kind, options = SCENARIOS[scenario]
    expected = fit(TORCH[name], kind, **options)
    others = options.get("callbacks", list)
    seen = Witness()
    options = {**options, "callbacks": lambda: [FusedOptimizers(), seen, *others()]}
    assert_equal(fit(TORCH[name], kind, **options), expected)
    assert seen.classes == {OURS[name]}


class Witness(callbacks.Callback):
    def on_train_start(self, trainer, pl_module):
        self.classes = {type(o) for o in trainer.optimizers}


@pytest.mark.slow
@eager
@names
def test_half_precision(name):
    """Every step is torch's fp32 step rounded once; torch's own in bf16 round several times."""
    runs = [fit(make[name], Judged, precision="bf16-true") for make in (OURS, TORCH)]
    assert_equal(runs[0]["logged"], runs[1]["logged"], rtol=0.1)
    assert runs[0]["module"]["net.0.weight"].dtype == torch.bfloat16


@pytest.mark.slow
@names
def test_fitted_twice(name):
    assert_equal(fit(OURS[name], fits=2), fit(TORCH[name], fits=2))


@pytest.mark.slow
@eager
@names
def test_compiled(name):
    def wrap(module):
        return torch.compile(module, backend="aot_eager")

    assert_equal(*[fit(make[name], Unlogged, wrap=wrap) for make in (OURS, TORCH)])


class Swapped(dict):
    """torch's classes, which the callback turns into ours."""


CALLBACK = Swapped(TORCH)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Scheduled, Monitored, Module, Manual], ids=lambda k: k.__name__)
@pytest.mark.parametrize(
    "first, then",
    [
        pytest.param(OURS, OURS, id="ours"),
        pytest.param(OURS, TORCH, id="ours to torch"),
        pytest.param(TORCH, OURS, id="torch to ours"),
        pytest.param(CALLBACK, CALLBACK, id="callback"),
        pytest.param(CALLBACK, TORCH, id="callback to torch"),
        pytest.param(TORCH, CALLBACK, id="torch to callback"),
        pytest.param(OURS, CALLBACK, id="ours to callback"),
    ],
)
@names
def test_resumed(name, first, then, kind):
    def trainer(classes, epochs):
        made = [FusedOptimizers()] if classes is CALLBACK else []
        return lightning.Trainer(**{**QUIET, "max_epochs": epochs, "callbacks": made})

    expected = fit(TORCH[name], kind, max_epochs=5)
    begun = trainer(first, 2)
    begun.fit(kind(first[name]), loader())
    begun.save_checkpoint("checkpoint.ckpt")
    resumed, module = trainer(then, 5), kind(then[name])
    safely = {"weights_only": True} if RESUMES_SAFELY else {}
    resumed.fit(module, loader(), ckpt_path="checkpoint.ckpt", **safely)
    assert_equal(outcome(resumed, module), expected)
    assert {type(o) for o in resumed.optimizers} == {(TORCH if then is TORCH else OURS)[name]}


@eager
@pytest.mark.parametrize("compile", [False, True, {"backend": "aot_eager"}])
def test_the_callback_compiles(compile, monkeypatch):
    calls = []
    monkeypatch.setattr(OURS["Rprop"], "compile", lambda self, **kwargs: calls.append(kwargs))
    callback = FusedOptimizers(compile)
    trainer = lightning.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": [callback]})
    trainer.fit(Module(TORCH["Rprop"]), loader())
    expected = [] if compile is False else [{} if compile is True else compile]
    assert calls == expected
    trainer = lightning.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": [callback]})
    trainer.fit(Module(OURS["Rprop"]), loader())  # which is ours already
    assert calls == expected * 2


@eager
def test_clipping_by_lightning_and_by_the_step_are_not_mixed():
    """Its message is Lightning's; our own clipping takes its place."""

    def make(params, lr):
        return OURS["RMSprop"](params, lr=lr, fused_amp=True)

    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(make, precision="bf16-mixed", gradient_clip_val=0.1)


@pytest.mark.slow
@eager
def test_two_processes():
    script = Path(lightning_cases.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@names
def test_fabric(name):
    def train(make):
        fabric = Fabric(accelerator="cpu", devices=1)
        model = Module(make).net
        model, optimizer = fabric.setup(model, make(model.parameters(), lr=0.01))
        for x, y in fabric.setup_dataloaders(loader()):
            optimizer.zero_grad()
            fabric.backward((model(x) - y).square().mean())
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
        fabric.save("fabric.ckpt", {"model": model, "optimizer": optimizer})
        fabric.load("fabric.ckpt", {"model": model, "optimizer": optimizer})
        optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    assert_equal(train(OURS[name]), train(TORCH[name]))


class Configurable(Module):
    """Without an optimizer of its own: the command line adds one."""

    def __init__(self, width: int = 16):
        super().__init__(None)

    configure_optimizers = lightning.LightningModule.configure_optimizers


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return loader()


@pytest.mark.slow
@names
def test_command_line(name):
    """With the arguments of the recipe's command."""
    page = (Path(__file__).parent / "README.md").read_text()
    command = next(line for line in page.splitlines() if line.startswith("python train.py "))
    fit, *arguments = command.split()[2:]

    def run(library):
        options = [f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()]
        given = [a.replace("tritonopt.RMSprop", f"{library}.{name}") for a in arguments]
        assert f"{library}.{name}" in given
        schedule = ["--lr_scheduler=torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size=1"]
        cli = LightningCLI(
            Configurable, Data, args=[fit, *options, *given, *schedule],
            save_config_callback=None, seed_everything_default=0,
        )  # fmt: skip
        (optimizer,) = cli.trainer.optimizers
        assert isinstance(optimizer, (OURS if library == "tritonopt" else TORCH)[name])
        return outcome(cli.trainer, cli.model)

    assert_equal(run("tritonopt"), run("torch.optim"))
