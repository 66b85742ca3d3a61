"""A sample of a collection's clips, looked at: how often which action, pictures with actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from scd.common.files import file_aside
from scd.data.actions import parts_of
from scd.data.clip import Clip, frames_to_pixels
from scd.data.reduce import reduce_pictures
from scd.data.source import DataCard, Source
from scd.data.spaces import ActionPart

CLIP_FRAMES = 48
"""Frames of a clip of the sample, at most."""

MAX_PIXELS = 2**27
"""Pixels that are read in all, at most: of large pictures there are fewer clips."""

BINS = 10
"""Bins of the histogram of a number."""

SHOWN = 8
"""Clips of a sheet, frames of each, and actions of a line."""

PICTURE = 128
"""Columns of a picture on a sheet, about."""

LINE = 12
"""Rows of a line of text on a sheet, in pixels."""

MAX_LINES = 4
"""Lines under a picture, at most."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A clip of the sample."""

    title: str
    start: int
    """Number of its first frame in its episode."""
    clip: Clip


def sample_clips(sources: Sequence[Source], num_clips: int) -> tuple[list[Sampled], list[str]]:
    """Read clips that do not overlap, from all over the episodes.

    Returns:
        The clips, and why others of the sample could not be read.
    """
    episodes = [(source, at) for source in sources for at in range(source.num_episodes)]
    lengths = [source.num_frames(at) for source, at in episodes]
    # Clips of each episode, and of those before it.
    ends = np.cumsum([max(1, length // CLIP_FRAMES) for length in lengths])
    pixels = sources[0].card.height * sources[0].card.width * CLIP_FRAMES if sources else 1
    total = int(ends[-1]) if episodes else 0
    number = min(num_clips, total, max(1, MAX_PIXELS // pixels))
    found, errors = [], []
    for index in range(number):
        place = index * total // number
        which = int(np.searchsorted(ends, place, side="right"))
        (source, episode), size = episodes[which], min(CLIP_FRAMES, lengths[which])
        start = (place - (int(ends[which - 1]) if which else 0)) * size
        try:
            clip = source.read(episode, start, size)
        except (ValueError, OSError) as error:
            errors.append(str(error))
            continue
        found.append(Sampled(title=source.title(episode), start=start, clip=clip))
    return found, errors


def count_actions(card: DataCard, clips: Sequence[Clip]) -> dict[str, Any]:
    """Count the actions of clips, by part.

    Returns:
        By the part's name (`action` if it has none): of choices and keys how many frames have each,
        of numbers the least, mean, greatest, and `BINS` equal bins between.
    """
    rows = [clip.actions.numpy() for clip in clips if clip.actions is not None]
    if not rows or not card.conditions.has_actions:
        return {}
    values, first, found = np.concatenate(rows), 0, {}
    values = values.reshape(len(values), -1)
    for part in parts_of(card.conditions):
        own, first = values[:, first : first + part.size], first + part.size
        found[part.name or "action"] = _count(part, own, _names(card, part, first - part.size))
    return found


def _names(card: DataCard, part: ActionPart, first: int) -> Sequence[str]:
    """Return the names of a part's choices, if it is one choice, or of its entries."""
    if card.conditions.num_actions:
        return card.action_names
    if part.space == "Discrete":
        return part.names or [str(number) for number in range(part.choices[0])]
    return card.action_names[first : first + part.size]


def _count(part: ActionPart, values: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    if part.space == "Discrete":
        counts = Counter(values[:, 0].astype(int).tolist())
        return {names[int(choice)]: counts[choice] for choice in sorted(counts)}
    if part.space == "MultiBinary":
        return dict(zip(names, values.sum(0).astype(int).tolist(), strict=True))
    columns = zip(names, values.T, strict=True)
    if part.space == "MultiDiscrete":
        return {
            name: {str(int(one)): n for one, n in sorted(Counter(column.tolist()).items())}
            for name, column in columns
        }
    return {name: _spread(column.astype(np.float64)) for name, column in columns}


def _spread(column: np.ndarray) -> dict[str, Any]:
    counts, edges = np.histogram(column, BINS)
    return {
        "least": float(column.min()),
        "mean": float(column.mean()),
        "greatest": float(column.max()),
        "deviation": float(column.std()),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def actions_in_words(counts: dict[str, Any], num_frames: int) -> list[str]:
    """Say a line for each part of the actions."""
    lines = []
    for part, found in counts.items():
        words = []
        for name, one in found.items():
            if isinstance(one, int):
                words.append((one, f"{name} {one / num_frames:.0%}"))
            elif "mean" in one:
                words.append((0, f"{name} {one['least']:.3g}..{one['greatest']:.3g}"))
            else:
                most = max(one, key=one.__getitem__)
                words.append((0, f"{name} {len(one)} choices, most {most}"))
        words.sort(key=lambda word: -word[0])
        more = [f"{len(words) - SHOWN} more"] if len(words) > SHOWN else []
        lines.append(f"{part}: {', '.join([word for _, word in words[:SHOWN]] + more)}")
    return lines


def draw_sheet(card: DataCard, sampled: Sequence[Sampled], path: Path) -> None:
    """Draw frames that follow each other, a clip a row, with the action that led to each under it.

    Raises:
        ValueError: there are no pictures to draw.
    """
    shown = [one for one in sampled if not one.clip.encoded]
    if not shown:
        raise ValueError(f"{path}: needed clips of pictures for a sheet, there are none")
    step = max(1, len(shown) // SHOWN)
    rows = [_row(card, one) for one in shown[::step][:SHOWN]]
    width, height = max(row.shape[1] for row in rows), sum(len(row) for row in rows)
    sheet, top = np.full((height, width, 3), 255, np.uint8), 0
    for row in rows:
        sheet[top : top + len(row), : row.shape[1]] = row
        top += len(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(path) as aside:
        Image.fromarray(sheet).save(aside, "PNG")


def _row(card: DataCard, one: Sampled) -> UInt8[np.ndarray, "h w 3"]:
    clip = one.clip
    first = max(0, (len(clip) - SHOWN) // 2)
    pictures = frames_to_pixels(clip.frames[first : first + SHOWN]).numpy()
    height, width = card.height, card.width
    if width < PICTURE:
        scale = -(-PICTURE // width)
        pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    elif width > PICTURE:
        size = (max(1, round(height * PICTURE / width)), PICTURE)
        pictures = reduce_pictures(pictures, size)
    high, wide = pictures.shape[1:3]
    text = [action_in_words(card, one.clip, first + at) for at in range(len(pictures))]
    lines = max(map(len, text))
    image = Image.new("RGB", (len(pictures) * (wide + 4), high + LINE * (lines + 2)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    draw.text((2, 0), f"{one.title}, from frame {one.start + first}", "black", font)
    for at, picture in enumerate(pictures):
        left = at * (wide + 4)
        image.paste(Image.fromarray(picture), (left, LINE))
        for line, words in enumerate(text[at]):
            draw.text(
                (left + 1, LINE + high + LINE * line), _fitting(words, wide, font), "black", font
            )
    return np.asarray(image)


def _fitting(words: str, width: int, font: Any) -> str:
    """Cut words off where the picture above them ends."""
    while words and font.getlength(words) > width:
        words = words[:-1]
    return words


def action_in_words(card: DataCard, clip: Clip, frame: int) -> list[str]:
    """Say the action that led to a frame, a line for each part."""
    if clip.actions is None or not card.conditions.has_actions:
        return []
    value = clip.actions[frame].numpy()
    if card.conditions.num_actions:
        return [card.action_names[int(value)]]
    lines, first = [], 0
    for part in parts_of(card.conditions):
        own, names = value[first : first + part.size], _names(card, part, first)
        first += part.size
        if part.space == "Discrete":
            words = names[int(own[0])]
        elif part.space == "MultiBinary":
            words = "+".join(name for name, held in zip(names, own, strict=True) if held) or "-"
        else:
            words = " ".join(f"{number:.3g}" for number in own)
        lines.append(f"{part.name} {words}".strip())
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], "..."]
    return lines
