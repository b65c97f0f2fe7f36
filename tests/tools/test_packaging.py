"""What is installed: wheel, sdist and editable install, and what importing it brings along."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(*command, cwd=None, **kwargs):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "source"
    copy.mkdir()
    for name in ("tritonopt", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    run("-m", "build", "--no-isolation", "--outdir", folder, cwd=copy)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_the_wheel_has_each_file_once(distributions):
    names = zipfile.ZipFile(distributions[0]).namelist()
    assert "tritonopt/kernels/launch.py" in names and "tritonopt/py.typed" in names
    assert not [name for name in names if name.startswith("kernels/")]
    assert len(names) == len(set(names))


def test_the_sdist_can_be_built_again(distributions, tmp_path):
    with tarfile.open(distributions[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, cwd=source)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert sorted(names) == sorted(zipfile.ZipFile(distributions[0]).namelist())


def test_the_wheel_works_alone(distributions, tmp_path):
    zipfile.ZipFile(distributions[0]).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, '.'); import tritonopt, tritonopt.kernels.launch, torch;"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3);"
        "tritonopt.Rprop([p]).step(); print(tritonopt.kernels.__file__, p.tolist())"
    )
    out = run("-c", code, cwd=tmp_path)
    assert str(tmp_path) in out and "0.99" in out


def test_what_a_registry_shows(distributions):
    """Its page has no other files: links of the README must be whole."""
    archive = zipfile.ZipFile(distributions[0])
    metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
    head, _, readme = archive.read(metadata).decode().partition("\n\n")
    for line in ("Author: ", "Project-URL: Homepage, https://", "Classifier: Typing :: Typed"):
        assert f"\n{line}" in head
    assert "Description-Content-Type: text/markdown" in head and readme.startswith("# tritonopt")
    links = re.findall(r"\]\(([^)]*)\)", readme)
    assert links and all(link.startswith("https://") for link in links)
    repository = re.search(r"Project-URL: Homepage, (\S+)", head)[1]
    ours = [link for link in links if link.startswith(repository)]
    assert ours and all((ROOT / link.partition("/blob/main/")[2]).is_file() for link in ours)
