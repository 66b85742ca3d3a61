"""The npm package onnxruntime-web: found in a folder, or fetched by npm."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

VERSION = "1.30.0"
"""Of the package that npm fetches, with which the site is tested."""

NPM_S = 300
"""Seconds that npm may take."""

RUNTIMES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify"),
}
"""By where a world is computed: the script that is imported, and the stem of what it loads."""

NOTICES = ("LICENSE", "ThirdPartyNotices.txt")
"""Of ONNX Runtime; its package for Python holds them, the one of npm does not."""


@contextmanager
def runtime_folder(ort: str) -> Iterator[Path]:
    """Give the folder with the files of `RUNTIMES` while it is needed.

    Args:
        ort: the package, or its dist/; empty: fetched by npm.

    Raises:
        FileNotFoundError: they are not there, or there is no npm.
        OSError: npm could not fetch the package.
    """
    if ort:
        yield _checked(Path(ort))
        return
    with TemporaryDirectory() as place:
        yield _checked(_fetched(Path(place)))


def _fetched(place: Path) -> Path:
    npm, package = shutil.which("npm"), f"onnxruntime-web@{VERSION}"
    wanted = f"`npm pack {package}` where there is one, unpack it, and give --ort its folder"
    if npm is None:
        raise FileNotFoundError(f"npm fetches {package}, and there is none here: {wanted}")
    try:
        run = subprocess.run(
            [npm, "pack", package, "--json"],
            cwd=place, capture_output=True, text=True, timeout=NPM_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise OSError(f"npm did not fetch {package} within {NPM_S} s: {wanted}") from None
    if run.returncode:
        said = (run.stderr.strip() or run.stdout.strip()).split("\n")[0]
        raise OSError(f"npm could not fetch {package} ({said}): {wanted}")
    with tarfile.open(place / json.loads(run.stdout)[0]["filename"]) as file:
        file.extractall(place, filter="data")
    return place / "package"


def _checked(folder: Path) -> Path:
    dist = folder / "dist" if (folder / "dist").is_dir() else folder
    missing = [name for name in runtime_files() if not (dist / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no onnxruntime-web {VERSION}: needed {', '.join(missing)}"
        )
    return dist


def runtime_files() -> list[str]:
    """Name all files that a site needs of the package."""
    return [
        name
        for script, stem in RUNTIMES.values()
        for name in (script, f"{stem}.mjs", f"{stem}.wasm")
    ]


def write_notices(folder: Path) -> None:
    """Put the runtime's licence and notices beside it."""
    spec = find_spec("onnxruntime")
    for name in NOTICES:
        source = Path(spec.origin).parent / name if spec and spec.origin else None
        if source is None or not source.is_file():
            raise FileNotFoundError(
                f"the site needs {name} of ONNX Runtime beside it, as the Python package has it: "
                'pip install -c constraints.txt -e ".[onnx]"'
            )
        shutil.copyfile(source, folder / name)
