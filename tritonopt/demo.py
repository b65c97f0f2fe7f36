"""Trains a network on handwritten digits with tritonopt's optimizers and, beside them, torch's."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import tritonopt
from tritonopt.device import path

LR = 1e-3
OPTIONS: dict[str, dict[str, Any]] = {
    "RMSprop": {"lr": LR},
    "Rprop": {"lr": LR, "step_sizes": (1e-6, 1e-2)},  # longer steps leave the minimum again
}
BATCH = {"RMSprop": 128, "Rprop": None}  # Rprop compares signs from step to step: all digits

ULPS = {"RMSprop": 2.0, "Rprop": 0.0}
"""What a kernel may differ by, per step, in units of the last place of the largest parameter.

torch rounds RMSprop otherwise on some devices (other multiply-adds fused, a square root that is one
unit off), and what was rounded differently stays. An update has about the size of `LR`, so that
its error counts less than the parameter's own rounding.
"""


class Digits(NamedTuple):
    """8 x 8 pixels from 0 to 1 in rows of 64, and the digits that they show."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass
class Training:
    """A network, its optimizer, and the loss and the seconds of each step."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def loss(self, digits: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(digits), labels)
        self.losses.append(loss.item())
        return loss

    def step(self, synchronize: Callable[[], None]) -> None:
        synchronize()
        start = time.perf_counter()
        self.optimizer.step()
        synchronize()
        self.times.append(time.perf_counter() - start)

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        guesses = self.network(digits.test).argmax(dim=1)
        return (guesses == digits.test_labels).float().mean().item()


class Result(NamedTuple):
    """What the table says of one optimizer."""

    name: str
    device: torch.device
    trainings: dict[str, Training]  # "tritonopt", "torch" and, on accelerators, "torch's default"
    independent: bool  # each network had its own gradients
    accuracies: dict[str, float]
    difference: float  # the largest of any parameter at any step, to torch's for-loop
    allowed: float

    @property
    def same(self) -> bool:
        return self.difference <= self.allowed  # not if either is NaN

    def seconds(self, label: str) -> float:
        return statistics.median(self.trainings[label].times)


def run(
    names: Sequence[str], device: torch.device, steps: int, seed: int, plot_to: Path | None = None
) -> int:
    """Trains, prints the table and draws the plot. Returns the exit code, 1 if any differs."""
    console = Console(highlight=False)
    digits = load(device, seed)
    columns = (
        TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn(),
    )  # fmt: skip
    results = []
    with Progress(*columns, console=console, auto_refresh=False) as progress:  # no thread: we time
        for name in names:
            bar = progress.add_task(name, total=steps, loss=float("nan"))

            def show(step: int, loss: float, bar: Any = bar) -> None:
                progress.update(bar, completed=step, loss=loss, refresh=step % 10 == 0)

            results.append(train(name, digits, device, steps, seed, show))
    console.print(table(results))
    for result in results:
        verdict = "the same training as" if result.same else "DIFFERS from"
        console.print(f"{result.name}: {verdict} torch's", style="" if result.same else "bold red")
    if plot_to is not None:
        plot(results, plot_to)
        console.print(f"Loss curves: {plot_to}", soft_wrap=True)
    return 0 if all(result.same for result in results) else 1


def load(device: torch.device, seed: int) -> Digits:
    """scikit-learn's 1797 digits, which come with it; a fifth of each digit is for the test."""
    pixels, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        pixels / 16, labels, test_size=0.2, random_state=seed, stratify=labels
    )
    return Digits(
        torch.tensor(train, dtype=torch.float32, device=device),
        torch.tensor(train_labels, device=device),
        torch.tensor(test, dtype=torch.float32, device=device),
        torch.tensor(test_labels, device=device),
    )


def train(
    name: str,
    digits: Digits,
    device: torch.device,
    steps: int,
    seed: int,
    show: Callable[[int, float], None],
) -> Result:
    """Trains from the same start on the same batches with our optimizer and with torch's."""
    kind = path(device)[0]
    independent = device.type == "cpu" and kind == "eager"
    trainings = _trainings(name, device, seed)
    ours, theirs = trainings["tritonopt"], trainings["torch"]
    largest = torch.zeros((), device=device)
    order = list(trainings.values())
    batches = _batches(name, len(digits.train), seed)
    for step in range(1, steps + 1):
        batch = next(batches)
        inputs = digits.train[batch], digits.train_labels[batch]
        _gradients(list(trainings.values()), inputs, independent)
        for training in order:
            training.step(lambda: _synchronize(device))
        order.reverse()  # neither always comes second
        for a, b in zip(ours.network.parameters(), theirs.network.parameters(), strict=True):
            largest = torch.maximum(largest, (a.detach() - b.detach()).abs().max())
        show(step, ours.losses[-1])

    size = max(p.detach().abs().max().item() for p in theirs.network.parameters())
    ulps = ULPS[name] * steps if kind == "kernel" else 0.0
    return Result(
        name=name,
        device=device,
        trainings=trainings,
        independent=independent,
        accuracies={label: t.accuracy(digits) for label, t in trainings.items()},
        difference=largest.item(),
        allowed=ulps * torch.finfo(torch.float32).eps * size,
    )


def _trainings(name: str, device: torch.device, seed: int) -> dict[str, Training]:
    torch.manual_seed(seed)
    start = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    ours, theirs = getattr(tritonopt, name), getattr(torch.optim, name)
    options = OPTIONS[name]
    makers = {
        "tritonopt": lambda params: ours(params, **options),
        "torch": lambda params: theirs(params, **options, foreach=False),
    }
    if device.type != "cpu":  # there, what torch runs unasked is not the for-loop
        makers["torch's default"] = lambda params: theirs(params, **options)
    trainings = {}
    for label, make in makers.items():
        network = copy.deepcopy(start).to(device)
        trainings[label] = Training(network, make(network.parameters()))
    return trainings


def _batches(name: str, count: int, seed: int) -> Iterator[Tensor | slice]:
    generator = torch.Generator().manual_seed(seed)
    size = BATCH[name]
    while True:
        if size is None:
            yield slice(None)
        else:
            yield from torch.randperm(count, generator=generator).split(size)


def _gradients(
    trainings: Sequence[Training], inputs: tuple[Tensor, Tensor], independent: bool
) -> None:
    """Each network its own, or all the first one's.

    Networks whose parameters differ in the last place soon differ in everything; given the same
    gradients, what differs is the optimizers' doing.
    """
    first = trainings[0]
    for training in trainings:
        training.optimizer.zero_grad()
        with torch.set_grad_enabled(independent or training is first):
            loss = training.loss(*inputs)
        if loss.requires_grad:
            loss.backward()
        else:
            pairs = zip(training.network.parameters(), first.network.parameters(), strict=True)
            for param, source in pairs:
                assert source.grad is not None
                param.grad = source.grad.clone()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def table(results: Sequence[Result]) -> Table:
    """One column per optimizer."""
    view = Table(title="64-256-256-10 network on handwritten digits", caption=_notes(results[0]))
    view.add_column("")
    for result in results:
        view.add_column(result.name, justify="right")

    def row(label: str, cell: Callable[[Result], str]) -> None:
        view.add_row(label, *map(cell, results))

    row("device", lambda r: str(r.device))
    row("path", lambda r: _path_name(r.device))
    row("steps x batch", _work)
    row("final accuracy", lambda r: f"{r.accuracies['tritonopt']:.2%}")
    row("  with torch's optimizer", lambda r: f"{r.accuracies['torch']:.2%}")
    row("largest difference to torch", lambda r: f"{r.difference:.3g}")
    row("  allowed", lambda r: f"{r.allowed:.3g}")
    row("step time, tritonopt", lambda r: _microseconds(r.seconds("tritonopt")))
    for label in list(results[0].trainings)[1:]:
        title = "torch (foreach=False)" if label == "torch" else label
        view.add_row(f"step time, {title}", *[_microseconds(r.seconds(label)) for r in results])
        view.add_row("  ratio to tritonopt", *[_ratio(r, label) for r in results])
    return view


def _notes(result: Result) -> str:
    kind, name = path(result.device)
    notes = ["Each network has its own gradients."]
    if not result.independent:
        notes = ["torch's networks are given the gradients of tritonopt's."]
    if kind == "kernel":
        notes += ["RMSprop is allowed 2 ulp of the largest parameter per step, Rprop nothing."]
    notes += ["Step time: median of optimizer.step() alone."]
    if "interpreted" in name:
        notes += ["An interpreted kernel's says nothing of the kernel's."]
    return " ".join(notes)


def _path_name(device: torch.device) -> str:
    kind, name = path(device)
    return name if kind else f"torch: {name}"


def _work(result: Result) -> str:
    return f"{len(result.trainings['torch'].losses)} x {BATCH[result.name] or 'all'}"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"


def _ratio(result: Result, label: str) -> str:
    return f"{result.seconds(label) / result.seconds('tritonopt'):.3g}x"


def plot(results: Sequence[Result], file: Path) -> None:
    """Draws the loss of every step, torch's dashed over tritonopt's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        axes.set(title=result.name, xlabel="step", ylabel="training loss", yscale="log")
        for label, style in (("tritonopt", "-"), ("torch", "--")):
            losses = result.trainings[label].losses
            axes.plot(range(1, len(losses) + 1), losses, style, label=label)
        axes.legend()
    figure.savefig(file)
