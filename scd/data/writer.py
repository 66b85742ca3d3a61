"""Folders of clips that grow episode by episode: by a recording, or by a program of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast, get_args

import numpy as np
import torch
from gymnasium.spaces import Space
from jaxtyping import Float, Int

from scd.common.config import at_least
from scd.common.files import file_aside, read_json, refuse_used, remove_leftovers, take_lock
from scd.data.actions import NamesOfParts, conditions_of, flat, named
from scd.data.clip import check_actions
from scd.data.manifest import (
    CARD_FILE,
    MANIFEST_FILE,
    RECORDING,
    Entry,
    append_to_manifest,
    choose_splits,
    read_card,
    read_manifest,
    write_card,
    write_episode,
)
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec, Split

LOCK_FILE = "lock"


class ClipWriter:
    """Writes episodes of one's own simulator into a folder that training reads.

        clips = scd.ClipWriter("my-clips", simulator.action_space, fps=15)
        while clips.num_episodes < 100:
            frames, actions = play(simulator, seed=clips.num_episodes)
            clips.write(frames, actions)

    The same program again goes on behind the last whole episode. An episode is in the folder when
    `write` returns; of one that was interrupted nothing counts. One writer at a time has a folder,
    until `close`, or the end of a with block or of the program.

    Args:
        folder: to write, which is made with the first episode; or one that was begun with the same
            arguments.
        action_space: of Gymnasium: `Discrete`, `Box`, `MultiBinary`, `MultiDiscrete`, or a `Dict`
            or `Tuple` of these; the world that is trained has the very space. None: nothing steers
            it by actions.
        fps: frames per second at which episodes are meant to be watched.
        names: of discrete actions, or of the entries of one; or, by the name of a part, of its
            entries or choices. Empty: numbers.
        num_labels: number of classes of episodes; 0: they have no labels.
        pixel_art: whether frames are drawn in hard-edged pixels, which a player should not smooth.
        val_fraction: share of the episodes for the split `val`.
        test_fraction: share of the episodes for the split `test`.

    Raises:
        FileExistsError: the folder holds something else, or clips of other arguments.
        BlockingIOError: another writer has the folder.
        ValueError: a space that no action has, names that do not fit, or numbers out of range.
    """

    def __init__(
        self,
        folder: Path | str,
        action_space: Space[Any] | None = None,
        *,
        fps: float | int,
        names: Sequence[str] | NamesOfParts = (),
        num_labels: int = 0,
        pixel_art: bool = False,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
    ) -> None:
        self.folder = Path(folder)
        at_least(0, num_labels=num_labels)
        self._shares = (float(val_fraction), float(test_fraction))
        choose_splits(0, *self._shares)
        spec, called = _steering(action_space, names)
        # Rows and columns are those of the first episode.
        self._card = DataCard(
            height=1,
            width=1,
            fps=float(fps),
            conditions=replace(spec, num_labels=num_labels),
            action_names=called,
            pixel_art=pixel_art,
        )
        self._lock: TextIO | None = None
        self.num_episodes = 0
        """Episodes in the folder."""
        if (self.folder / CARD_FILE).exists():
            kept = read_card(self.folder)
            self._begin(kept.height, kept.width)
        else:
            refuse_used_by_others(self.folder)

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the folder to other writers."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(
        self,
        frames: np.ndarray | Sequence[np.ndarray],
        actions: Iterable[Any] | None = None,
        *,
        split: str | None = None,
        rewards: Sequence[float] | None = None,
        terminated: bool | None = None,
        truncated: bool | None = None,
        label: int | None = None,
        prompt: str | None = None,
    ) -> Entry:
        """Write one uninterrupted episode, without losing a bit.

        Args:
            frames: 8-bit RGB pictures [t, rows, columns, 3], of the size of the first episode's.
            actions: one of the action space per frame: action i led from frame i-1 to frame i,
                action 0 to frame 0 from something before. What reset shows has none: begin with the
                frame after the first step, or give it an action that does nothing.
            split: `train`, `val` or `test`; None: as the shares of the splits have it.
            rewards: reward i came with frame i.
            terminated: whether the simulator itself ended after the last frame.
            truncated: whether a limit of time ended it there.
            label: class of the episode, 0 .. num_labels - 1.
            prompt: what it shows, in words.

        Returns:
            The episode's line of the manifest.

        Raises:
            ValueError: something of another kind, size or number than needed; nothing of the
                episode is kept.
        """
        where = f"{self.folder}, episode {self.num_episodes}"
        pixels = np.asarray(frames)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not pixels.size:
            raise ValueError(
                f"{where}: frames are 8-bit RGB [frames, rows, columns, 3], got {pixels.dtype} "
                f"{list(pixels.shape)}"
            )
        spec = self._card.conditions
        rows = _rows(spec, actions, len(pixels), where)
        if label not in (range(spec.num_labels) if spec.num_labels else [None]):
            wanted = f"a label of 0 .. {spec.num_labels - 1}" if spec.num_labels else "no label"
            raise ValueError(f"{where}: needed {wanted}, got {label!r}")
        said: dict[str, Any] = {
            "rewards": None if rewards is None else tuple(float(one) for one in rewards),
            "terminated": None if terminated is None else bool(terminated),
            "truncated": None if truncated is None else bool(truncated),
            "prompt": prompt,
        }
        if said["rewards"] is not None and len(said["rewards"]) != len(pixels):
            raise ValueError(
                f"{where}: {len(pixels)} frames need as many rewards, got {len(said['rewards'])}"
            )
        chosen = split or choose_splits(self.num_episodes + 1, *self._shares)[-1]
        if chosen not in get_args(Split):
            raise ValueError(f"{where}: needed a split of train, val and test, got {split!r}")
        if self._lock is None:
            self._begin(*pixels.shape[1:3])
        if pixels.shape[1:3] != (self._card.height, self._card.width):
            raise ValueError(
                f"{where}: frames are {pixels.shape[1]} x {pixels.shape[2]}, those before are "
                f"{self._card.height} x {self._card.width}"
            )
        name = f"{self.num_episodes:06d}"
        entry = write_episode(
            self.folder, name, pixels, rows, self._card.fps, cast(Split, chosen), label
        )
        entry = replace(entry, **said)
        append_to_manifest(self.folder, entry)
        self.num_episodes += 1
        return entry

    def _begin(self, height: int, width: int) -> None:
        self._card = replace(self._card, height=height, width=width)
        val, test = self._shares
        settings = {"kind": "ClipWriter", "val_fraction": val, "test_fraction": test}
        self.num_episodes, self._lock = begin_writing(self.folder, self._card, settings)


def begin_writing(folder: Path, card: DataCard, settings: Mapping[str, Any]) -> tuple[int, TextIO]:
    """Begin a folder of clips, or check that it was begun in the same way and clean it up.

    Args:
        folder: of the clips.
        card: what all episodes share.
        settings: what the episodes follow from besides; kept beside the card.

    Returns:
        The number of episodes in it, and the lock of the folder, to close at the end.

    Raises:
        FileExistsError: the folder holds something else, or clips of another card or settings.
        BlockingIOError: another writer has the folder.
    """
    if not (folder / CARD_FILE).exists():
        refuse_used_by_others(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The card first: what has none is not known for clips that were begun.
        write_card(folder, card, dict(settings))
    kept = read_card(folder)
    recorded = read_json(folder / CARD_FILE).get(RECORDING)
    if recorded != settings or kept != card:
        one, other = (recorded, dict(settings)) if recorded != settings else (kept, card)
        raise FileExistsError(
            f"{folder}: holds a recording with other settings: {one}, asked for: {other}"
        )
    lock = take_lock(folder / LOCK_FILE)
    for place in (folder, folder / "videos", folder / "actions"):
        remove_leftovers(place)
    _drop_torn_line(folder / MANIFEST_FILE)
    return len(read_manifest(folder)), lock


def refuse_used_by_others(folder: Path) -> None:
    """Refuse (FileExistsError) to begin clips where something else is."""
    if folder.is_dir():
        # Of a writer that was killed before there was a card.
        remove_leftovers(folder, CARD_FILE)
    refuse_used(folder, "a recording to continue")


def _drop_torn_line(manifest: Path) -> None:
    """Make a manifest that is missing; cut off a last line that was left without its end."""
    if not manifest.exists():
        manifest.touch()
    text = manifest.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        with file_aside(manifest) as aside:
            aside.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def _steering(
    space: Space[Any] | None, names: Sequence[str] | NamesOfParts
) -> tuple[ConditionSpec, tuple[str, ...]]:
    """Say what steers a world of such actions, and the names of that."""
    if space is None:
        if names:
            raise ValueError(f"names of actions need an action_space, got {names!r} and none")
        return ConditionSpec(), ()
    by_part = names if isinstance(names, Mapping) else {}
    spec = conditions_of(space, by_part)
    num = spec.num_actions or spec.action_dim
    own = spec.action_names or tuple(f"action {number}" for number in range(num))
    called = own if isinstance(names, Mapping) or not names else tuple(names)
    if isinstance(names, str) or len(called) != num:
        raise ValueError(f"actions of {space} need {num} names, got {names!r}")
    return named(spec, called), called


def _rows(
    spec: ConditionSpec, actions: Iterable[Any] | None, num: int, where: str
) -> Int[np.ndarray, " t"] | Float[np.ndarray, "t a"] | None:
    """Return actions of the space as a file keeps them: ids, or vectors of all parts."""
    if not spec.has_actions:
        if actions is not None:
            raise ValueError(f"{where}: actions need an action_space of the ClipWriter, got none")
        return None
    if actions is None or isinstance(actions, (str, Mapping)):
        raise ValueError(f"{where}: needed one action for each of {num} frames, got {actions!r}")
    given, rows = list(actions), []
    if len(given) != num:
        raise ValueError(f"{where}: {num} frames need as many actions, got {len(given)}")
    for place, action in enumerate(given):
        try:
            row = flat(spec, action)
            check_actions(spec, torch.from_numpy(row))
        except ValueError as error:
            raise ValueError(f"{where}, action {place}: {error}") from error
        rows.append(row)
    return np.stack(rows)
