"""What an index would get: both distributions, their content, and what is installed from them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import scd
from tests.test_structure import ROOT, files_below

STEM = f"separable_causal_diffusion-{scd.__version__}"
"""Beginning of the names of both files."""


def tree() -> set[str]:
    """Paths of the project's files, as a checkout has them."""
    return {path.relative_to(ROOT).as_posix() for path in files_below(ROOT)} - {".git"}


def run(*words: str | Path, **given: str) -> subprocess.CompletedProcess[str]:
    """Run a program without what this environment says about imports."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        words, env=environment | given, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the source distribution, and with the wheel that was built from that."""
    # A copy, since building leaves folders behind; without isolation, since the pinned setuptools
    # is here.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tree():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    assert build.returncode == 0, build.stdout + build.stderr
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which pip installed the wheel alone."""
    target = tmp_path_factory.mktemp("installed")
    words = ("pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target")
    pip = run(sys.executable, "-m", *words, target, built / f"{STEM}-py3-none-any.whl")
    assert pip.returncode == 0, pip.stderr
    return target


def test_a_tag_of_this_commit_names_its_version():
    git = run("git", "-C", ROOT, "tag", "--points-at", "HEAD", "v*")
    tags = git.stdout.split()
    if git.returncode or not tags:
        pytest.skip("no release: no tag v* points at this commit, or git is not here")
    assert tags == [f"v{scd.__version__}"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## {scd.__version__}" in changes, "no heading names this version"


def test_both_distributions_pass_the_check_of_an_index(built):
    names = sorted(path.name for path in built.iterdir())
    assert names == [f"{STEM}-py3-none-any.whl", f"{STEM}.tar.gz"]
    check = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    assert check.returncode == 0 and check.stdout.count("PASSED") == 2, check.stdout


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built / f"{STEM}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        metadata = Parser().parsestr(wheel.read(f"{STEM}.dist-info/METADATA").decode())
        commands = wheel.read(f"{STEM}.dist-info/entry_points.txt").decode().split("\n")
    held = {name for name in names if not name.startswith(f"{STEM}.dist-info/")}
    assert held == {name for name in tree() if name.startswith("scd/")}
    assert metadata["Name"] == "separable-causal-diffusion"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{STEM}.dist-info/licenses/LICENSE" in names
    assert "scd = scd.cli:main" in commands


def test_the_source_distribution_is_the_whole_project(built):
    with tarfile.open(built / f"{STEM}.tar.gz") as archive:
        names = {one.name.removeprefix(f"{STEM}/") for one in archive if one.isfile()}
    hidden = {
        name
        for name in tree()
        if name.startswith(".") and not name.startswith((".ci/", ".dockerignore"))
    }
    assert tree() - hidden <= names
    made = {name for name in names - tree() if ".egg-info/" not in name}
    assert made == {"PKG-INFO", "setup.cfg"}


def test_an_installed_wheel_streams_its_world(installed, tmp_path):
    made = run(installed / "bin" / "scd", "demo", "--out", tmp_path, PYTHONPATH=str(installed))
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("command", [("demo", "--out", "made"), ("play", "--no-browser")])
def test_a_wheel_without_its_worlds_says_so(installed, tmp_path, monkeypatch, command):
    bare = tmp_path / "bare"
    shutil.copytree(installed / "scd", bare / "scd", ignore=shutil.ignore_patterns("worlds"))
    monkeypatch.chdir(tmp_path)
    asked = run(sys.executable, "-m", "scd", *command, PYTHONPATH=str(bare))
    assert asked.returncode == 2
    assert "has no shipped world" in asked.stderr and str(bare) in asked.stderr
    assert "Traceback" not in asked.stderr and not (tmp_path / "made").exists()
