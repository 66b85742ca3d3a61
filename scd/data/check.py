"""`scd data check`: what there is of a collection, what is missing, and where it comes from."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from scd.data import dmlab, minecraft, ucf101
from scd.data.folder import open_source
from scd.data.latents import INFO_FILE, is_latents
from scd.data.manifest import CARD_FILE, MANIFEST_FILE
from scd.data.published import parse_published
from scd.data.source import EmptySplit, Source, Split
from scd.data.teco import Listing
from scd.data.ucf101 import UCF101Config, UCF101Source

Layout = Literal["folder", "minecraft", "ucf101", "dmlab"]
"""Layouts that can be checked."""

ORIGINS: dict[Layout, str] = {
    "folder": "scd record, scd encode, or docs/your-clips.md",
    "minecraft": minecraft.ORIGIN,
    "ucf101": ucf101.ORIGIN,
    "dmlab": dmlab.ORIGIN,
}
"""Where each collection comes from."""

PUBLISHED_COUNTS: dict[Layout, dict[str, int]] = {
    "minecraft": {"train": 194_051},
    "ucf101": {"trainlist03": 9_624, "testlist03": 3_696},
}
"""Episodes of the published collections, where they are known. Source: paper, section 4."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Look at a collection of clips: exit status 2 if something that is needed is missing."""

    path: Annotated[str, tyro.conf.Positional]
    """The folder. For a published collection settings may follow: PATH?protocol=latte."""
    layout: Annotated[Layout, tyro.conf.arg(name="as")] = "folder"
    """What it should be: a folder of episodes or of their latents, or a published collection."""


@dataclass(kw_only=True)
class Findings:
    """What a check found."""

    there: list[str] = field(default_factory=list)
    """What is there."""
    notes: list[str] = field(default_factory=list)
    """What is odd, but does not keep anybody from using it."""
    missing: list[str] = field(default_factory=list)
    """What is missing or wrong."""


def check(config: CheckConfig) -> Findings:
    """Look at a collection: every header, every list, every actions file.

    Raises:
        ValueError: settings that this collection does not have.
    """
    findings = Findings()
    path = Path(config.path.partition("?")[0])
    if not path.is_dir():
        findings.missing.append(f"{path}: no such folder")
        return findings
    if config.layout == "folder":
        _check_folder(path, findings)
        return findings
    data = f"{config.layout}:{config.path}"
    published = parse_published(data)
    assert published is not None
    if isinstance(published.config, UCF101Config):
        _check_ucf101(path, published.config, findings)
    else:
        _check_teco(path, config.layout, findings)
    if not findings.missing:
        _open_splits(data, ("train", "test", "val"), findings, whole=True)
    return findings


def readable(config: CheckConfig, findings: Findings) -> str:
    """Return what was found, for people."""
    lines = [f"{config.path} as {config.layout}"]
    lines += [f"  there    {line}" for line in findings.there]
    lines += [f"  note     {line}" for line in findings.notes]
    lines += [f"  missing  {line}" for line in findings.missing]
    if findings.missing:
        lines.append(f"  get it   {ORIGINS[config.layout]}")
    return "\n".join(lines)


def refusal(config: CheckConfig, findings: Findings) -> str:
    """Return in one line what is missing and where it comes from; empty if nothing is."""
    if not findings.missing:
        return ""
    more = f" (and {len(findings.missing) - 1} more)" if len(findings.missing) > 1 else ""
    return f"{config.path}: {findings.missing[0]}{more}; {ORIGINS[config.layout]}"


def _check_folder(path: Path, findings: Findings) -> None:
    if is_latents(path):
        findings.there.append(f"{INFO_FILE}: stored latents")
        _open_splits(str(path), get_args(Split), findings, latents=True)
        return
    needed = (CARD_FILE, MANIFEST_FILE)
    findings.missing += [str(path / name) for name in needed if not (path / name).is_file()]
    if not findings.missing:
        _open_splits(str(path), get_args(Split), findings)


def _open_splits(
    data: str,
    splits: Sequence[Split],
    findings: Findings,
    latents: bool = False,
    whole: bool = False,
) -> None:
    found = 0
    for split in splits:
        with _warnings(findings):
            try:
                source = open_source(data, split, latents=latents, whole=whole)
            except EmptySplit:
                findings.notes.append(f"{split}: no episodes")
                continue
            except (ValueError, OSError) as error:
                findings.missing.append(f"{split}: {error}")
                continue
        found += 1
        findings.there.append(f"{split}: {_summary(source)}")
        _note_oddities(source, split, findings)
    if not found and not findings.missing:
        findings.missing.append("no episodes in any split")


def _summary(source: Source) -> str:
    lengths = [source.num_frames(episode) for episode in range(source.num_episodes)]
    card = source.card
    between = "..".join(map(str, sorted({min(lengths), max(lengths)})))
    return (
        f"{len(lengths):,} episodes, {sum(lengths):,} frames ({between} each), shown at "
        f"{card.height} x {card.width}"
    )


def _note_oddities(source: Source, split: Split, findings: Findings) -> None:
    """Count the frame rates and sizes of videos that may have any."""
    if not isinstance(source, UCF101Source):
        return
    rates = Counter(round(header.fps, 2) for header in source.headers)
    sizes = Counter((header.height, header.width) for header in source.headers)
    for what, counts in (("frame rates", rates), ("sizes", sizes)):
        if len(counts) > 1:
            listed = ", ".join(f"{value}: {number}" for value, number in counts.most_common(5))
            findings.notes.append(
                f"{split}: videos of several {what} ({listed}); frames are taken as they are stored"
                if what == "frame rates"
                else f"{split}: videos of several {what} ({listed}); all are reduced and cut"
            )


def _check_teco(path: Path, layout: Layout, findings: Findings) -> None:
    lists = {"minecraft": minecraft.list_minecraft, "dmlab": dmlab.list_dmlab}[layout]
    parts: tuple[tuple[Split, str], ...] = (
        ("train", "train/ or training/"),
        ("test", "test/ or validation/"),
    )
    for split, folders in parts:
        try:
            listing: Listing = lists(path, split)
        except (ValueError, OSError) as error:
            findings.missing.append(str(error))
            continue
        if listing.folder is None and not listing.episodes:
            findings.missing.append(f"{path}: no folder {folders}")
        elif not listing.episodes:
            findings.missing.append(f"{listing.folder}: holds no episodes with their actions")
        if missing := listing.missing:
            where = "is in the list" if listing.list_file else "belongs to a video"
            findings.notes.append(
                f"{len(missing)} files are not there; the first {where}: {missing[0]}"
            )
        if listing.list_file is None and split == "test":
            findings.notes.append(
                f"no {layout}_val.json: held-out episodes are sorted by name, so the first 256 "
                "are other ones than FAR's"
            )
        expected = PUBLISHED_COUNTS.get(layout, {}).get(split)
        if expected and listing.episodes and len(listing.episodes) != expected:
            findings.notes.append(
                f"{split}: {len(listing.episodes):,} episodes, FAR learnt from {expected:,}"
            )


def _check_ucf101(path: Path, config: UCF101Config, findings: Findings) -> None:
    missing = [one for one in ucf101.list_paths(path, config.list) if not one.is_file()]
    findings.missing += [f"{one}: no such list" for one in missing]
    videos = ucf101.video_folder(path)
    if not videos.is_dir():
        findings.missing.append(f"{videos}: no class folders with .avi videos")
    if findings.missing:
        return
    try:
        files = ucf101.find_ucf101(path, config.list)
    except (ValueError, OSError) as error:
        findings.missing.append(str(error))
        return
    findings.there.append(f"lists: {len(files.classes)} classes in {videos}")
    if len(files.classes) != ucf101.NUM_CLASSES:
        findings.notes.append(
            f"classInd.txt names {len(files.classes)} classes of {ucf101.NUM_CLASSES}"
        )
    findings.missing += files.missing_classes()
    for name, listed in (("trainlist", files.train), ("testlist", files.test)):
        name = f"{name}{config.list:02d}"
        expected = PUBLISHED_COUNTS["ucf101"].get(name)
        if expected and len(listed) != expected:
            findings.notes.append(f"{name}.txt names {len(listed):,} videos, not {expected:,}")
        gone = [one for one in listed if not (videos / one).is_file()]
        if gone:
            first = videos / gone[0]
            findings.missing.append(
                f"{len(gone)} of {len(listed)} videos of {name}.txt, the first is {first}"
            )


class _Collected(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _warnings(findings: Findings) -> Iterator[None]:
    """Note what opening warns of, such as episodes that were left out."""
    handler, parent = _Collected(), logging.getLogger("scd.data")
    parent.addHandler(handler)
    propagate, parent.propagate = parent.propagate, False
    try:
        yield
    finally:
        parent.removeHandler(handler)
        parent.propagate = propagate
        findings.notes += handler.lines
