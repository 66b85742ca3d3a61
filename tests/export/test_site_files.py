"""What a site consists of, what is refused, and its noise, which is Python's."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from scd.cli import main
from scd.export.onnx_web import runtime_files
from scd.export.site import OWN, PIECE_BYTES, _cut
from scd.streaming.noise import frame_noise, step_noise


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_noise_of_the_page_is_that_of_python():
    code = f"""
    import {{ frameNoise, stepNoises }} from "{(OWN / "noise.js").as_uri()}";
    const drawn = [
      frameNoise(7, 20, "frame", 12288), frameNoise(2 ** 52 + 1, 3, "context", 72),
      ...stepNoises(7, 20, 2, 100),
    ];
    console.log(JSON.stringify(drawn.map((values) => [...values])));
    """
    words = ["node", "--input-type=module", "--eval", code]
    run = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    wanted = [
        frame_noise(7, 20, "frame", (3, 64, 64)),
        frame_noise(2**52 + 1, 3, "context", (6, 12)),
        *step_noise(7, 20, 2, (100,)),
    ]
    for ours, theirs in zip(wanted, json.loads(run.stdout), strict=True):
        assert torch.allclose(ours.flatten(), torch.tensor(theirs), atol=3e-6)


def test_large_files_are_cut(tmp_path: Path):
    data = bytes(range(256)) * ((PIECE_BYTES + 1024) // 256)
    (tmp_path / "large.bin").write_bytes(data)
    told = _cut(tmp_path, "large.bin")
    assert [piece["bytes"] for piece in told["pieces"]] == [PIECE_BYTES, len(data) - PIECE_BYTES]
    joined = b"".join((tmp_path / piece["file"]).read_bytes() for piece in told["pieces"])
    assert joined == data and not (tmp_path / "large.bin").exists()


def test_what_a_site_needs_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refused(*more: str) -> str:
        assert main(["export", "web", "doom", "--out", str(tmp_path / "site"), *more]) == 2
        assert not (tmp_path / "site").exists()
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    said = refused("--ort", str(tmp_path / "empty"))
    assert "is no onnxruntime-web" in said and runtime_files()[0] in said
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused()
    assert "there is none here" in said and "--ort" in said
    with pytest.raises(SystemExit):
        refused("--serve", "high")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine.txt").write_text("keep\n", encoding="utf-8")
    assert main(["export", "web", "doom", "--out", str(tmp_path / "site")]) == 2
    assert (tmp_path / "site" / "mine.txt").is_file()
