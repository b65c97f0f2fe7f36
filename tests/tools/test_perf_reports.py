"""perf: the READMEs and tables say what was found, and nothing else."""

import json
import shutil

from perf_cases import ROOT

from perf import cpu, report, run, tables


def measure(*arguments):
    return run.command(cpu.plan, 0, "cpu", arguments)


def test_quick_results_do_not_replace_others(tmp_path, capsys):
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"machine": {}, "quick": False, "host": []}))
    assert measure("--quick", "--only", "host", "--out", str(tmp_path)) == 2
    assert "more than --quick measures" in capsys.readouterr().out


def test_results_of_another_run_are_not_lost(tmp_path, capsys):
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"machine": {}, "quick": True, "host": [], "memory": []}))
    before = file.read_text()
    assert measure("--only", "host", "--out", str(tmp_path)) == 2
    assert "has memory: name another folder" in capsys.readouterr().out
    assert file.read_text() == before


def test_the_readme_says_what_was_measured():
    assert report.main(["--check"]) == 0


def test_other_figures_are_noticed(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "perf" / "results", tmp_path / "perf" / "results")
    names = ("README.md", "perf/README.md")
    for name in names:
        shutil.copy(ROOT / name, tmp_path / name)
    drawn = []
    monkeypatch.setattr(report, "draw", lambda file: drawn.append(file.stem))
    assert report.main(["--check"], tmp_path) == 0
    file = tmp_path / "perf" / "results" / "cpu.json"
    results = json.loads(file.read_text())
    results["machine"]["device"] += " of another kind"
    file.write_text(json.dumps(results))
    assert report.main(["--check"], tmp_path) == 1
    assert report.main([], tmp_path) == 0 and sorted(drawn) == ["bf16", "cpu", "options"]
    assert report.main(["--check"], tmp_path) == 0
    assert all((tmp_path / name).read_text() != (ROOT / name).read_text() for name in names)
    next(file.parent.glob("*.png")).unlink()
    assert report.main(["--check"], tmp_path) == 1


def test_no_results(tmp_path):
    for found in (None, {"machine": {}, "quick": False}):
        if found:
            (tmp_path / "cpu.json").write_text(json.dumps(found))
        for part in ("host", "summary", "plots"):
            text = f"<!-- perf:cpu {part} -->\n<!-- /perf -->"
            assert "\nNot measured.\n" in report.fill(text, tmp_path)


def test_what_is_missing_is_neither_drawn_nor_tabulated(tmp_path):
    late = {"job": "Rprop, foreach, 50", "missing": "no time was left"}
    found = {"optimizer": "RMSprop", "implementation": "foreach", "tensors": 50,
             "first_step_s": 1.5, "graphs": 2}  # fmt: skip
    results = {"machine": {}, "compile": [found, late], "host": [late], "curve": [late]}
    file = tmp_path / "some.json"
    file.write_text(json.dumps(results))
    report.draw(file)
    assert list(tmp_path.iterdir()) == [file] and not list(report.block(file, "plots"))
    table = tables.table(results, "compile").splitlines()
    assert not tables.measured(results, "host") and tables.measured(results, "compile")
    assert table[2] == "| foreach | 50 | 1.5 s, 2 |"
    assert table[-1] == "Not measured: Rprop, foreach, 50: no time was left."
    assert tables.table(results, "host") == table[-1]


def test_plots_are_drawn(tmp_path):
    step = {"optimizer": "Rprop", "elements": 10, "least_bytes": 280, "device_us": None,
            "wall_us": {"median": 2.0}, "bandwidth_bytes_per_s": 1e10}  # fmt: skip
    records = [{**step, "implementation": name} for name in ("tritonopt", "abandoned")]
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"curve": records}))
    report.draw(file)
    (text,) = report.block(file, "plots")
    for name in ("some-roofline", "some-size"):
        assert f"![{name}](results/{name}.png)" in text and (tmp_path / f"{name}.png").exists()


def test_what_is_not_known_is_left_out_and_the_last_record_counts():
    found = {"optimizer": "Rprop", "tensors": 50, "first_step_s": 1.0, "graphs": 1}
    records = [
        {**found, "implementation": "abandoned"},
        {**found, "implementation": "abandoned", "missing": "no longer there"},
        {**found, "implementation": "backend"},
        {**found, "implementation": "backend", "first_step_s": 2.0},
    ]
    results = {"machine": {}, "compile": records, "abandoned": [{"of another": "kind"}]}
    table = tables.table(results, "compile").splitlines()
    assert table[2:] == ["| backend | 50 | 2.0 s, 1 |"]


def test_options_are_shown_beside_the_plain_optimizer():
    records = [
        {"optimizer": "Rprop", "workload": "one", "implementation": name, "elements": 10,
         "least_bytes": 10 * moved, "state_bytes_per_element": state, "device_us": None,
         "wall_us": {"median": 1e3 * ms, "p10": 1e3, "p90": 9e3}}
        for name, state, moved, ms in (
            ("tritonopt", 8, 28, 4), ("compact=True", 4, 20, 3), ("compile()", 8, 28, 2))
    ]  # fmt: skip
    assert tables.table({"machine": {}, "options": records}, "options").splitlines() == [
        "| Rprop | state | moved | one, tritonopt | one, compile() |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| tritonopt | 8 | 28 | 4 (1 to 9) | 2 (1 to 9) |",
        "| `compact=True` | 4 | 20 | 3 (1 to 9), x 0.75 | - |",
    ]


def test_trainings_are_drawn_and_tabulated(tmp_path):
    ends = {"median": 0.5, "least": 0.25, "most": 1.0}
    record = {"optimizer": "RMSprop, lr=1", "implementation": "tritonopt", "steps": 4,
              "losses": [2.0, 1.0, 0.5], "loss": ends, "way": ends, "squares": ends}  # fmt: skip
    records = [{**record, "dtype": "torch.float32"}, {**record, "dtype": "torch.bfloat16"}]
    file = tmp_path / "bf16.json"
    file.write_text(json.dumps({"machine": {}, "bf16": records}))
    report.draw(file)
    assert file.with_suffix(".png").exists()
    made = report.fill("<!-- perf:bf16 bf16 -->\n<!-- /perf -->", tmp_path)
    assert f"| RMSprop, lr=1 | fp32 |{' 0.5 (0.25 to 1) |' * 3}" in made and "| bf16 |" in made


def test_every_file_of_results_is_shown(tmp_path):
    """What a GPU found replaces what the README says of none."""
    machine = {"device": "Some GPU", "cuda": "13", "threads": 1, "torch": "2", "triton": "3",
               "date": "today"}  # fmt: skip
    times = {"median": 2000.0, "p10": 1000.0, "p90": 3000.0}
    step = {"optimizer": "RMSprop", "workload": "one", "implementation": "tritonopt",
            "wall_us": times, "device_us": times, "host_us": times,
            "bandwidth_bytes_per_s": 1e12, "fraction_of_floor": 0.5}  # fmt: skip
    text = "<!-- perf:gpu all -->\n<!-- /perf -->"
    assert "Not measured on a GPU yet." in report.fill(text, tmp_path)
    results = {"machine": machine, "quick": False, "steps": [step]}
    (tmp_path / "some-gpu.json").write_text(json.dumps(results))
    made = report.fill(text, tmp_path)
    assert "Some GPU, device copy 1,000.0 GB/s" in made
    assert made.count("| one | 2 (1 to 3) | - | 50% |") == 2
    assert made.count("| one | 2 (1 to 3) | - |\n") == 1  # of the host, no floor
    assert report.fill(made, tmp_path) == made
    short = report.fill("<!-- perf:gpu summary -->\n<!-- /perf -->", tmp_path)
    assert "LSTM" not in short and "Some GPU, 1 threads" in short
