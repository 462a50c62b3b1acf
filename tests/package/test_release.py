"""The wheel and the sdist: what is in them, and that the wheel alone runs the README; and the workflows' commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
TOP = {"src", "tests", "docs", "examples", ".github", "README.md", "LICENSE", "Makefile"}
TOP |= {"pyproject.toml", ".zensical.toml"}

needs_build = pytest.mark.skipif(
    any(find_spec(tool) is None for tool in ("build", "hatchling", "twine")), reason="needs the extra dev"
)


def run(*command: str | Path, **options) -> str:
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **options)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@needs_build
def test_twine_accepts_both(built):
    files = sorted(built.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    run(sys.executable, "-m", "twine", "check", "--strict", *files)


@needs_build
def test_the_wheel_holds_the_packages_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(wheel(built)).namelist() if ".dist-info/" not in name}
    there = {str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*") if file.is_file()}
    assert names == {name for name in there if "__pycache__" not in name}
    assert "rank_experts/py.typed" in names


@needs_build
def test_the_sdist_holds_the_tracked_files(built):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout")
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
    # Files that are new and not ignored will be tracked.
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    tracked = {name for name in listed if name.partition("/")[0] in TOP and (ROOT / name).exists()}
    assert names - {"PKG-INFO", ".gitignore"} == tracked


@needs_build
def test_the_wheel_alone_runs_the_readme(built, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin/python"
    # The dependencies come from this environment, behind the wheel. The .pth files there are not read, so that an
    # editable installation of the source tree is out of reach.
    own = Path(sysconfig.get_paths(vars={"base": str(environment), "platbase": str(environment)})["purelib"])
    (own / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel(built))
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks) + "\nimport rank_experts\nprint(rank_experts.__file__)\n")
    shown = run(python, script, cwd=tmp_path, env=clean)
    assert Path(shown.splitlines()[-1]).is_relative_to(own)
    assert "train" in run(environment / "bin/rank-experts", "--help", cwd=tmp_path, env=clean)


def workflows() -> dict[str, dict]:
    return {file.name: YAML(typ="safe").load(file.read_text()) for file in (ROOT / ".github/workflows").glob("*.yml")}


def steps() -> list[dict]:
    return [step for flow in workflows().values() for job in flow["jobs"].values() for step in job["steps"]]


def test_workflows_run_targets_that_there_are():
    assert set(workflows()) == {"ci.yml", "release.yml"}
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {word for step in steps() for line in step.get("run", "").splitlines() for word in line.split()[1:]}
    assert {"check", "docs", "build"} <= used <= targets
    assert all(line.startswith("make ") for step in steps() for line in step.get("run", "").splitlines())


def test_actions_are_pinned_by_a_tag():
    uses = [step["uses"] for step in steps() if "uses" in step]
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", each) for each in uses)


def test_every_requirement_of_dev_is_pinned():
    """`make install` takes what the suite was last run with."""
    if sys.version_info < (3, 11):
        pytest.skip("reads pyproject.toml with tomllib")
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.match(r"[\w.-]+", line)[0] for extra in ("dev", "train", "report", "serve") for line in extras[extra]}
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "tests/constraints.txt").read_text(), re.MULTILINE))
    assert names - {"rank-experts"} <= pinned


def test_the_version_is_in_the_changelog():
    """A release has a section of its own; until then the version is the next release's."""
    from rank_experts import __version__

    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", __version__)
    sections = re.findall(r"^## (\S+)", (ROOT / "docs/changelog.md").read_text(), re.MULTILINE)[1:]  # after Versions
    assert sections[0] == "Unreleased"
    tag = os.environ.get("TAG")
    if tag is not None:
        assert tag == f"v{__version__}"
        assert sections[1:2] == [__version__], "move what is under Unreleased into a section of its own"
