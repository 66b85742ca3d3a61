"""`scd data check`: what there is of a collection, what is missing, and where it comes from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from scd.common.hub import is_hub_name
from scd.common.provenance import provenance, write_json
from scd.data.alignment import measure_alignment
from scd.data.settings import CheckConfig
from scd.data.source import EmptySplit, Findings, Opening, Source, find_kinds, kind_of
from scd.data.spaces import Split
from scd.data.survey import actions_in_words, count_actions, draw_sheet, sample_clips

MAX_NAMED = 20
"""Episodes that are named one by one."""

DAMAGE_HELP = "write these files again, or leave them out by --data.on-error skip"
"""What helps with files that are there, but damaged."""

AT_ONCE = 64
"""Frames that are decoded at once, so that long episodes fit in memory."""


def check(config: CheckConfig) -> Findings:
    """Look at a collection: every header, every list, every actions file.

    Raises:
        ValueError: a kind that there is not, settings that this collection does not have, or a
            preset, whose num_frames the command line looks up.
    """
    if config.preset:
        raise ValueError(f"give num_frames of preset {config.preset}, not its name")
    layout, named = _named(config)
    path = named.partition("?")[0]
    kind = _kind(config)
    if not kind.of_files and not Path(path).is_dir() and not is_hub_name(path):
        return Findings(missing=[f"{config.path}: no such folder"])
    data = named if layout == "folder" else f"{layout}:{named}"
    findings = kind.inspect(data)
    sources = [] if findings.missing else _open_splits(kind, data, findings, config)
    report = _look_into(sources, findings, config)
    if config.json:
        splits = {source.split: _counted(source) for source in sources}
        origin = {"data": config.path, "kind": layout, "splits": splits}
        write_json(provenance() | origin | report | asdict(findings), Path(config.json))
    return findings


def _look_into(
    sources: Sequence[Source], findings: Findings, config: CheckConfig
) -> dict[str, Any]:
    """Look at a sample of clips; return what a file of results says of it."""
    if not sources or not config.clips:
        return {}
    card = sources[0].card
    sampled, errors = sample_clips(sources, config.clips)
    findings.notes += [f"cannot be read: {error}" for error in errors]
    clips = [one.clip for one in sampled]
    report: dict[str, Any] = {
        "height": card.height,
        "width": card.width,
        "fps": card.fps,
        "left_out": [why for source in sources for why in source.left_out],
        "sampled_frames": sum(map(len, clips)),
        "sampled_clips": len(clips),
    }
    if card.conditions.has_actions and clips:
        counts = count_actions(card, clips)
        report["actions"] = counts
        words = actions_in_words(counts, report["sampled_frames"])
        findings.there += [f"actions of {report['sampled_frames']} frames: {one}" for one in words]
        found = measure_alignment(card.conditions, clips)
        report["alignment"] = asdict(found)
        lines = findings.notes if found.best_lag else findings.there
        lines.append(f"alignment: {found.message}")
    sheet = config.sheet or (str(Path(config.json).with_suffix(".png")) if config.json else "")
    if sheet and (config.sheet or any(not clip.encoded for clip in clips)):
        draw_sheet(card, sampled, Path(sheet))
        report["sheet"] = sheet
    return report


def _counted(source: Source) -> dict[str, Any]:
    lengths = [source.num_frames(episode) for episode in range(source.num_episodes)]
    return {
        "episodes": len(lengths),
        "frames": sum(lengths),
        "hours": sum(lengths) / source.card.fps / 3600,
        "shortest": min(lengths),
        "longest": max(lengths),
    }


def _named(config: CheckConfig) -> tuple[str, str]:
    """Return the kind, and the path with its settings, whichever way they were given."""
    name, _, path = config.path.partition(":")
    if config.layout == "folder" and path and name in find_kinds(Source):
        return name, path
    return config.layout, config.path


def _kind(config: CheckConfig) -> type[Source]:
    layout, path = _named(config)
    if layout == "folder":
        return kind_of(path)
    kinds = find_kinds(Source)
    if layout not in kinds:
        raise ValueError(f"--as must be one of {', '.join(sorted(kinds))}, got {layout!r}")
    return kinds[layout]


def readable(config: CheckConfig, findings: Findings) -> str:
    layout, path = _named(config)
    lines = [f"{path} as {layout}"]
    lines += [f"  there    {line}" for line in findings.there]
    lines += [f"  note     {line}" for line in findings.notes]
    lines += [f"  missing  {line}" for line in findings.missing]
    lines += [f"  damaged  {line}" for line in findings.damaged]
    if findings.missing:
        lines.append(f"  get it   {_kind(config).origin}")
    return "\n".join(lines)


def refusal(config: CheckConfig, findings: Findings) -> str:
    """Return in one line what is missing and where it comes from, or what is damaged; empty if
    nothing is."""
    wrong = [*findings.missing, *findings.damaged]
    if not wrong:
        return ""
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    helps = _kind(config).origin if findings.missing else DAMAGE_HELP
    return f"{config.path}: {wrong[0]}{more}; {helps}"


def _open_splits(
    kind: type[Source], data: str, findings: Findings, config: CheckConfig
) -> list[Source]:
    found: list[Source] = []
    for split in get_args(Split):
        with _warnings(findings):
            try:
                source = kind.open(data, split, Opening(latents=True, whole=True))
            except EmptySplit:
                findings.notes.append(f"{split}: no episodes")
                continue
            except (ValueError, OSError) as error:
                findings.missing.append(f"{split}: {error}")
                continue
        found.append(source)
        findings.there.append(f"{split}: {_summary(source)}")
        findings.notes += [f"{split}: {line}" for line in source.oddities()]
        if config.num_frames is not None:
            _look_for_short(source, config.num_frames, findings)
        if config.decode:
            _decode_all(source, findings)
    if not found and not findings.missing:
        findings.missing.append("no episodes in any split")
    return found


def _look_for_short(source: Source, num_frames: int, findings: Findings) -> None:
    """Name the episodes that give no clip; a split of nothing else is missing something."""
    episodes = range(source.num_episodes)
    lengths = {episode: source.num_frames(episode) for episode in episodes}
    short = [episode for episode in episodes if lengths[episode] < num_frames]
    if not short:
        return
    named = [f"{source.title(episode)} has {lengths[episode]}" for episode in short[:MAX_NAMED]]
    if len(short) > MAX_NAMED:
        named.append(f"and {len(short) - MAX_NAMED} more")
    line = f"{source.split}: {len(short)} of {len(lengths)} episodes are shorter than {num_frames}"
    if len(short) < len(lengths):
        findings.notes.append(f"{line} frames and give no clip: {'; '.join(named)}")
    else:
        findings.missing.append(f"{line} frames, all of them: {'; '.join(named)}")


def _decode_all(source: Source, findings: Findings) -> None:
    """Read every frame of a split, and name what cannot be read."""
    for episode in range(source.num_episodes):
        length = source.num_frames(episode)
        try:
            for start in range(0, length, AT_ONCE):
                source.read(episode, start, min(AT_ONCE, length - start))
        except (ValueError, OSError) as error:
            findings.damaged.append(f"{source.split} episode {episode}: {error}")


def _summary(source: Source) -> str:
    lengths = [source.num_frames(episode) for episode in range(source.num_episodes)]
    card = source.card
    between = "..".join(map(str, sorted({min(lengths), max(lengths)})))
    hours = sum(lengths) / card.fps / 3600
    return (
        f"{len(lengths):,} episodes, {sum(lengths):,} frames ({between} each), shown at "
        f"{card.height} x {card.width}, {card.fps:g} frames/s: {hours:.2g} h"
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
