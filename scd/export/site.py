"""`scd export web`: a world as a folder that any web server plays, without a server of its own.

The page is that of `scd play`; in the place of its connection stands a worker that runs the model
(`scd/export/web`). Large files are cut into pieces, as many hosts want, and `world.json` has the
hash of each.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from scd.common.files import refuse_used, written_aside
from scd.engine.plain import PlainEngine
from scd.export.onnx_web import RUNTIMES, runtime_files, runtime_folder, write_notices
from scd.export.onnx_world import DESCRIPTION, refuse_others, world_name, write_onnx
from scd.export.settings import WebConfig
from scd.models.about import read_about
from scd.models.checkpoint import World, load
from scd.serving.host import world_info

FORMAT = "scd-web-1"
"""Of the folder."""

PAGE = Path(__file__).resolve().parent.parent / "serving/web"
"""What `scd play` serves."""

OWN = Path(__file__).resolve().parent / "web"
"""What stands beside it, or in its place."""

PIECE_BYTES = 20 * 2**20
"""Of the files of a site at most: some hosts take 25 MB."""

SHELL = (".html", ".css", ".js", ".svg")
"""Endings of the files of the page itself."""

VERSION = "VERSION_OF_SITE"
"""Where the version of a site stands in its files: a hash of all of them."""

CLIPS = "clips.bin"
"""The clips that a world carries: latents, or pixels where these are fewer bytes."""

SMALLEST_NOISE = 16
"""Values of a latent frame: torch draws fewer in another way, which the page does not know."""

SPEED = 50e6 / 8
"""Bytes per second of the connection for which a time is told: 50 Mbit/s."""

START_S = 2.0
"""Seconds from the last byte to the first frame of a shipped world, on two threads of a CPU."""


def export_web(config: WebConfig) -> dict[str, Any]:
    """Write a site; return what `world.json` says, and its sizes as "bytes" and "compressed".

    Raises:
        FileNotFoundError: no such world, or no runtime for browsers.
        FileExistsError: the folder holds something else than a site.
        ValueError: a kind of world that cannot be exported; says why.
    """
    target = Path(config.out)
    if not _is_site(target):
        refuse_used(target)
    world = load(config.run)
    refuse_others(world, config.run)
    size = prod(world.model.shape.shape)
    if size < SMALLEST_NOISE:
        raise ValueError(f"a site needs latent frames of {SMALLEST_NOISE} values, got {size}")
    with runtime_folder(config.ort) as runtime, written_aside(target) as aside:
        return _write(world, config, runtime, aside)


def _is_site(folder: Path) -> bool:
    """Whether a site was written here before."""
    path = folder / "world.json"
    return path.is_file() and f'"format": "{FORMAT}"' in path.read_text("utf-8")[:200]


def _write(world: World, config: WebConfig, runtime: Path, folder: Path) -> dict[str, Any]:
    for source in (PAGE, OWN):
        for file in source.iterdir():
            shutil.copyfile(file, folder / file.name)
    (folder / "ort").mkdir()
    for name in runtime_files():
        shutil.copyfile(runtime / name, folder / "ort" / name)
    write_notices(folder / "ort")
    (folder / "model").mkdir()
    name = world_name(config.run)
    model = write_onnx(world, name, config.weights, folder / "model")
    (folder / "model" / DESCRIPTION).unlink()
    model_files = [model["weights"], *model["graphs"].values()]
    for file in model_files:
        file["file"] = f"model/{file['file']}"
    clips = _write_clips(world, folder / CLIPS)
    wasm = [f"ort/{stem}.wasm" for _, stem in RUNTIMES.values()]
    fetched = [*(file["file"] for file in model_files), *([CLIPS] if clips else []), *wasm]
    about = read_about(world.folder) if world.folder else None
    info = world_info(world, PlainEngine(world.model), name, world.clips, about)
    site = {
        "format": FORMAT,
        "world": info.model_dump(mode="json"),
        "limits": {
            "max_steps": len(model["schedules"]),
            "max_fps": 240,
            "history_frames": 2048,
            "max_upload_bytes": 32 * 2**20,
        },
        "model": model,
        "model_files": [file["file"] for file in model_files],
        "clips": clips,
        "runtimes": {
            kind: {
                "script": f"ort/{script}",
                "loader": f"ort/{stem}.mjs",
                "wasm": f"ort/{stem}.wasm",
            }
            for kind, (script, stem) in RUNTIMES.items()
        },
        "files": {file: _cut(folder, file) for file in fetched},
    }
    text = json.dumps(site, indent=1, allow_nan=False) + "\n"
    (folder / "world.json").write_text(text, encoding="utf-8")
    _finish_page(folder)
    return {**site, **_sizes(folder)}


def _write_clips(world: World, path: Path) -> dict[str, Any] | None:
    """Write a world's clips; say what they are. None: it carries none."""
    clips = world.clips
    if not len(clips):
        return None
    frames = rearrange(clips.frames.numpy(), "n t c h w -> n t h w c")
    kind, written = "pixels", frames
    if frames[0, 0].nbytes > 4 * prod(world.model.shape.shape):
        # So the page need not encode them, which takes as long as to load a model.
        with torch.no_grad():
            latents = [world.autoencoder.encode(clip.frames[None])[0] for clip in clips]
        kind, written = "latents", torch.stack(latents).float().numpy()
    path.write_bytes(written.tobytes())
    count, length = frames.shape[:2]
    return {
        "file": path.name,
        "kind": kind,
        "count": count,
        "frames": length,
        "size": int(written[0, 0].nbytes),
        "actions": clips.actions.tolist(),
    }


def _cut(folder: Path, name: str) -> dict[str, Any]:
    """Cut a file into pieces that hosts take; say which."""
    data = (folder / name).read_bytes()
    if len(data) <= PIECE_BYTES:
        pieces = {name: data}
    else:
        (folder / name).unlink()
        starts = range(0, len(data), PIECE_BYTES)
        pieces = {
            f"{name}.{number}": data[start : start + PIECE_BYTES]
            for number, start in enumerate(starts)
        }
    for piece, part in pieces.items():
        (folder / piece).write_bytes(part)
    told = [
        {"file": piece, "bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()}
        for piece, part in pieces.items()
    ]
    return {"bytes": len(data), "pieces": told}


def _finish_page(folder: Path) -> None:
    """Let the page begin its model early, and it and the service worker know this version."""
    index = folder / "index.html"
    page = index.read_text("utf-8")
    assert "</head>" in page
    scripts = [file.name for file in sorted(PAGE.glob("*.js"))]
    head = [
        f'<meta name="version" content="{VERSION}">',
        '<script src="opened.js"></script>',
        # Else each is asked for when the one before it has been read.
        *(f'<link rel="modulepreload" href="{name}">' for name in scripts),
        "</head>",
    ]
    index.write_text(page.replace("</head>", "\n".join(head)), encoding="utf-8")
    digest = hashlib.sha256()
    for file in _files(folder):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    page_files = ["./", *(file.name for file in sorted(folder.iterdir()) if file.suffix in SHELL)]
    page_files.remove("sw.js")
    blanks = [
        *(
            (name, VERSION, digest.hexdigest()[:16])
            for name in (index.name, "connection.js", "sw.js")
        ),
        ("sw.js", '["FILES_OF_PAGE"]', json.dumps(page_files)),
    ]
    for name, blank, value in blanks:
        text = (folder / name).read_text("utf-8")
        assert blank in text
        (folder / name).write_text(text.replace(blank, value), encoding="utf-8")


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def _sizes(folder: Path) -> dict[str, int]:
    """Sum what a browser without a GPU fetches, as it is and as hosts that compress send it."""
    unused = (*(f"{stem}." for _, stem in [RUNTIMES["webgpu"]]), RUNTIMES["webgpu"][0], "LICENSE")
    files = [
        file.read_bytes()
        for file in _files(folder)
        if not file.name.startswith((*unused, "ThirdParty"))
    ]
    return {
        "bytes": sum(map(len, files)),
        "compressed": sum(len(gzip.compress(data, 6)) for data in files),
    }


def readable_site(site: dict[str, Any]) -> str:
    """Say in words what was written, and how long it takes to come."""
    weights = site["model"]["weights"]
    whole, compressed = site["bytes"] / 1e6, site["compressed"] / 1e6
    return (
        f"{site['world']['name']}: weights of {weights['bytes'] / 1e6:.1f} MB ({weights['type']}); "
        f"a player fetches {whole:.1f} MB once, {compressed:.1f} MB from a host that compresses; "
        f"the first frame comes after about {site['compressed'] / SPEED + START_S:.0f} s at "
        "50 Mbit/s"
    )
