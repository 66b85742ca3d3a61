"""Dockerfile and compose file: linted, and their commands run here, without an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from scd.models.checkpoint import save_world
from scd.serving.client import Client
from scd.serving.settings import ServeConfig
from tests.servers import tiny_playable
from tests.test_structure import ROOT, files_below

TOKEN = "a token of more than sixteen characters"


def instructions() -> dict[str, str]:
    """Instructions of the last stage, by name; of several of one name the last."""
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    stage = re.split(r"^FROM ", text, flags=re.M)[-1]
    return dict(re.findall(r"^([A-Z]+) (.+)$", stage, re.M))


def service() -> dict[str, Any]:
    """The one service of the compose file."""
    return yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]["scd"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no hadolint package for it")
def test_the_dockerfile_passes_its_linter():
    linter = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run(
        [linter, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_wheel_is_built_of_what_the_image_is_given(tmp_path):
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in lines
    for name in (line[1:] for line in lines if line.startswith("!")):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path)
        else:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    assert (tmp_path / "constraints.txt").is_file()  # copied by the second stage
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, *words, "--wheel-dir", tmp_path / "wheels", tmp_path],
        check=True,
        timeout=300,
    )
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {path.relative_to(ROOT).as_posix() for path in files_below(ROOT / "scd")}


def test_both_files_speak_of_the_same_ports_users_and_folders():
    image, composed = instructions(), service()
    port = ServeConfig.port
    assert image["EXPOSE"] == str(port) and f":{port}/health" in image["HEALTHCHECK"]
    assert composed["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert image["USER"] != "root" and f"--uid {image['USER']} " in image["RUN"]
    folders = [volume.split(":")[1] for volume in composed["volumes"]]
    assert folders == [image["VOLUME"], image["WORKDIR"]]
    assert image["VOLUME"] in json.loads(image["ENTRYPOINT"]) and composed["read_only"]


def test_the_image_s_command_needs_a_token(tmp_path):
    words = json.loads(instructions()["ENTRYPOINT"])
    asked = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert asked.returncode == 2 and "--token or --token-file" in asked.stderr


def test_the_command_of_the_container_serves_answers_and_keeps_its_sessions(tmp_path):
    save_world(tiny_playable(), tmp_path / "worlds" / "small")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    image, composed = instructions(), service()
    places = {
        image["VOLUME"]: str(tmp_path / "sessions"),
        "/run/secrets/token": str(tmp_path / "token"),
    }
    words = [*json.loads(image["ENTRYPOINT"]), *composed["command"], "--run", "small"]
    words = [places.get(word, word) for word in words]
    with subprocess.Popen(
        [sys.executable, "-m", *words, "--port", "0", "--memory-gib", "0.2"],
        cwd=tmp_path / "worlds",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            found = re.search(r":(\d+)/", line)
            assert found, line + process.stderr.read()
            _, *check = json.loads(image["HEALTHCHECK"].partition("CMD ")[2])
            check[-1] = check[-1].replace(f":{ServeConfig.port}/", f":{found[1]}/")
            assert subprocess.run([sys.executable, *check], timeout=60).returncode == 0
            url = f"http://127.0.0.1:{found[1]}"
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{url}/v1/world", timeout=60)
            with Client(url, token=TOKEN) as client:
                client.create(seed=1)
                client.step(1, count=2)
            process.terminate()
            assert process.wait(60) == 143
        finally:
            process.kill()
    assert any((tmp_path / "sessions").iterdir())
