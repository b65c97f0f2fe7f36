"""`python -m tritonopt`: the table, the plot, and the exit code."""

import functools
import os
import subprocess
import sys

import pytest
import torch

import tritonopt
from tritonopt.__main__ import main
from tritonopt.device import path

pytest.importorskip("sklearn")
pytest.importorskip("rich")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def rows(output: str) -> dict[str, list[str]]:
    """The table's cells by the name of their row."""
    lines = [line for line in output.replace("┃", "│").splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    return {first: rest for first, *rest in cells}


def test_both_optimizers(device, capsys):
    assert main(["--device", str(device), "--steps", "2"]) == 0
    output = capsys.readouterr().out
    table = rows(output)
    assert "RMSprop: the same training as torch's" in output
    assert "Rprop: the same training as torch's" in output
    assert table["path"] == [path(device)[1]] * 2
    assert [cell.split(":")[0] for cell in table["device"]] == [device.type] * 2
    assert table["steps x batch"] == ["2 x 128", "2 x all"]
    assert table["largest difference to torch"][1] == table["allowed"][1] == "0"
    for name in ("step time, tritonopt", "step time, torch (foreach=False)"):
        assert all(cell.endswith(" us") for cell in table[name])
    assert all(cell.endswith("x") for cell in table["ratio to tritonopt"])


@pytest.mark.slow
@pytest.mark.skipif(path(torch.device("cpu"))[0] != "eager", reason="rounds differently")
def test_cpu_trainings_are_independent_and_agree_to_the_last_bit(capsys):
    assert main(["--device", "cpu", "--steps", "20"]) == 0
    output = capsys.readouterr().out
    table = rows(output)
    assert table["largest difference to torch"] == table["allowed"] == ["0", "0"]
    assert table["final accuracy"] == table["with torch's optimizer"]
    assert "Each network has its own gradients." in output


@pytest.mark.slow
def test_it_learns_and_a_seed_decides_everything():
    from tritonopt import demo

    cpu = torch.device("cpu")
    results = [
        demo.train("RMSprop", demo.load(cpu, seed), cpu, 10, seed, lambda step, loss: None)
        for seed in (0, 0, 1)
    ]
    losses = [result.trainings["tritonopt"].losses for result in results]
    assert losses[0] == losses[1] != losses[2]
    assert results[0].accuracies["tritonopt"] > 0.5  # of ten digits


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_interpreted_kernels():
    done = run("--device", "cpu", "--steps", "2", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(done.stdout)["path"] == ["triton, interpreted"] * 2
    assert "given the gradients of tritonopt's" in done.stdout


@pytest.mark.parametrize("name, shown", [("rmsprop", "RMSprop"), ("RPROP", "Rprop")])
def test_one_optimizer(name, shown, capsys):
    assert main(["--optimizer", name, "--device", "cpu", "--steps", "1"]) == 0
    assert rows(capsys.readouterr().out)[""] == [shown]


@pytest.mark.parametrize(
    "name, wrong",
    [
        pytest.param("RMSprop", {"alpha": 0.9901}, id="another alpha", marks=pytest.mark.slow),
        pytest.param("RMSprop", {"alpha": float("inf")}, id="NaN"),
        pytest.param("Rprop", {"etas": (0.5, 1.21)}, id="another etaplus"),
    ],
)
def test_exit_code_1_if_the_training_differs(name, wrong, device, monkeypatch, capsys):
    right = getattr(tritonopt, name)
    monkeypatch.setattr(tritonopt, name, lambda params, **options: right(params, **options | wrong))
    assert main(["--optimizer", name, "--device", str(device), "--steps", "4"]) == 1
    assert f"{name}: DIFFERS from torch's" in capsys.readouterr().out


@pytest.mark.slow
def test_exit_code_1_if_only_the_first_differs(monkeypatch):
    twice = functools.partial(tritonopt.RMSprop, momentum=0.1)
    monkeypatch.setattr(tritonopt, "RMSprop", twice)
    assert main(["--device", "cpu", "--steps", "3"]) == 1


@pytest.mark.slow
def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "losses.png"
    assert main(["--device", "cpu", "--steps", "3", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizer", "adam"], "invalid choice: 'adam'"),
        (["--steps", "0"], "'0' is not a positive integer"),
        (["--steps", "-3"], "'-3' is not a positive integer"),
        (["--steps", "many"], "'many' is not a positive integer"),
        (["--seed", "-1"], "'-1' is not an integer from 0 to"),
        (["--device", "abacus"], "'abacus' is not a device"),
        (["--device", "meta"], "meta is not available"),
        (["--device", "cuda:99"], "cuda:99 is not available"),
        (["--plot", "losses.txt"], "'losses.txt' does not end in .png"),
        (["--plot", "no/such/directory/losses.png"], "No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "package, name",
    [("sklearn", "scikit-learn"), ("rich", "rich"), ("matplotlib", "matplotlib")],
)
def test_a_missing_package_is_named(package, name, monkeypatch, tmp_path, capsys):
    block(package, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        main(["--steps", "1", "--plot", str(tmp_path / "losses.png")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"needs {name}, which is not installed" in error
    assert "pip install scikit-learn rich matplotlib\n" in error  # from anywhere, published or not
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_needed_for_the_plot_alone(monkeypatch):
    block("matplotlib", monkeypatch)
    assert main(["--device", "cpu", "--optimizer", "rprop", "--steps", "1"]) == 0


@pytest.mark.slow
def test_as_a_module():
    done = run("--device", "cpu", "--optimizer", "rmsprop", "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(done.stdout)["steps x batch"] == ["2 x 128"]
    assert done.stdout.startswith("This takes about 6 s on two cores") and not done.stderr


def block(package, monkeypatch):
    """Makes the package and what it has imported look as if it were not installed."""
    imported = [name for name in sys.modules if name.partition(".")[0] == package]
    for name in {package, *imported}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tritonopt.demo", raising=False)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tritonopt", *arguments],
        env={**os.environ, "COLUMNS": "120", "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
