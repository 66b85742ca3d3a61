"""Batches: a function of seed, rank and index; ranks share no episode; streams resume."""

import logging
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from scd.data.clip import Batch, Clip
from scd.data.loader import Loader, UnreadableClip
from scd.data.source import DataCard, Source
from scd.data.spaces import ConditionSpec
from scd.data.toy import ToyWorld

CARD = DataCard(
    height=2,
    width=2,
    fps=5.0,
    conditions=ConditionSpec(num_actions=1000),
    action_names=tuple(map(str, range(1000))),
)


class Numbered(Source):
    """A source whose pixels are the episode's number and whose actions are those of the frames."""

    def __init__(self, *lengths: int, broken: int | None = None):
        super().__init__("numbered", "train", CARD, lengths)
        self.broken = broken

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        if episode == self.broken:
            raise ValueError(f"episode {episode} is broken")
        return Clip(
            frames=torch.full((num_frames, 3, 2, 2), float(episode)),
            actions=torch.arange(start, start + num_frames),
        )


def episodes(batch: Batch) -> list[int]:
    return batch.frames[:, 0, 0, 0, 0].int().tolist()


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.frames, other.frames) and torch.equal(
        one.conditions.actions, other.conditions.actions
    )


def test_a_batch_is_a_function_of_seed_and_index():
    source = ToyWorld(32, "train")
    loader, again = Loader(source, 2, 4, seed=3), Loader(source, 2, 4, seed=3)
    assert same(loader.batch(5), again.batch(5))
    assert not same(loader.batch(5), loader.batch(6))
    assert not same(loader.batch(5), Loader(source, 2, 4, seed=4).batch(5))


def test_a_stream_resumes_at_any_batch():
    source = Numbered(*[50] * 7)
    loader = Loader(source, 3, 8, seed=0, workers=2)
    whole = list(islice(loader.stream(), 12))
    resumed = list(islice(Loader(source, 3, 8, seed=0, workers=1).stream(5), 7))
    assert all(same(one, other) for one, other in zip(whole[5:], resumed, strict=True))
    assert all(same(one, loader.batch(index)) for index, one in enumerate(whole))


def test_each_pass_meets_every_episode_once_in_a_new_order():
    loader = Loader(Numbered(*[9] * 12), 4, 5, seed=0)
    passes = [[i for index in range(3) for i in episodes(loader.batch(3 * p + index))]
              for p in range(2)]  # fmt: skip
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(12))
    assert passes[0] != passes[1]


def test_ranks_share_no_episode_within_a_pass():
    source = Numbered(*[20] * 11)
    ranks = [Loader(source, 3, 4, seed=1, rank=rank, num_ranks=3) for rank in range(3)]
    for index in range(4):  # 3 episodes per rank and pass: one batch is one pass
        met = Counter(i for loader in ranks for i in episodes(loader.batch(index)))
        assert len(met) == 9 and max(met.values()) == 1


def test_clips_begin_everywhere():
    loader = Loader(Numbered(10, 10), 2, 8, seed=0)
    starts = {int(s) for i in range(60) for s in loader.batch(i).conditions.actions[:, 0]}
    assert starts == {0, 1, 2}


def test_short_episodes_are_left_out_with_a_count(caplog):
    with caplog.at_level(logging.WARNING):
        loader = Loader(Numbered(3, 9, 4, 9), 2, 8, seed=0)
    assert "left out 2 of 4 episodes" in caplog.text
    assert {i for index in range(9) for i in episodes(loader.batch(index))} == {1, 3}
    with pytest.raises(ValueError, match="longest of 2 episodes has 4"):
        Loader(Numbered(3, 4), 2, 8, seed=0)


def test_more_processes_than_episodes_are_refused():
    with pytest.raises(ValueError, match="3 processes need at least as many episodes, got 2"):
        Loader(Numbered(9, 9, 3), 1, 8, seed=0, num_ranks=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("num_frames", 0), ("workers", 0), ("rank", 1), ("seed", -1)],
)
def test_numbers_out_of_range_are_refused(name, value):
    arguments = {"batch_size": 1, "num_frames": 2, "seed": 0} | {name: value}
    with pytest.raises(ValueError, match=name):
        Loader(Numbered(9), **arguments)
    with pytest.raises(ValueError, match="from 0"):
        Loader(Numbered(9), 1, 2, 0).batch(-1)


def test_an_error_of_a_thread_is_raised_in_its_place():
    loader = Loader(Numbered(9, 9, 9, 9, broken=2), 1, 4, seed=0)
    place = next(i for i in range(4) if loader._order(0)[i] == 2)
    stream = loader.stream()
    assert [episodes(batch)[0] for batch in islice(stream, place)] == [
        int(i) for i in loader._order(0)[:place]
    ]
    with pytest.raises(ValueError, match="episode 2 is broken"):
        next(stream)


class Torn(Numbered):
    """Like Numbered, but of one episode the frames from 10 on cannot be read."""

    def __init__(self, *lengths: int, torn: int | None):
        super().__init__(*lengths)
        self.torn = torn

    def title(self, episode: int) -> str:
        return f"{episode:03d}.mp4"

    def _read(self, episode: int, start: int, num_frames: int) -> Clip:
        if episode == self.torn and start + num_frames > 10:
            raise ValueError(f"frames {start} .. cannot be decoded")
        return super()._read(episode, start, num_frames)


def test_an_unreadable_clip_is_named_and_can_be_skipped():
    with pytest.raises(UnreadableClip, match=r"003.mp4: frames .* cannot .*--data.on-error skip"):
        list(islice(Loader(Torn(*[20] * 8, torn=3), 1, 8, seed=0).stream(), 80))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_skipped_clips_leave_the_same_batches_to_whoever_reads(num_ranks, caplog):
    def loader(rank: int, workers: int = 2, torn: int | None = 3) -> Loader:
        source = Torn(*[20] * 8, torn=torn)
        return Loader(source, 2, 8, 0, rank, num_ranks, workers=workers, on_error="skip")

    whole = [list(islice(loader(rank).stream(), 24)) for rank in range(num_ranks)]
    for rank in range(num_ranks):
        resumed = list(islice(loader(rank, workers=1).stream(9), 15))
        assert all(same(one, other) for one, other in zip(whole[rank][9:], resumed, strict=True))
        # Only the clips that cannot be read are others than those of whole files.
        sound = list(islice(loader(rank, torn=None).stream(), 24))
        changed = [
            int(one.frames[place, 0, 0, 0, 0])
            for one, other in zip(sound, whole[rank], strict=True)
            for place in range(2)
            if not torch.equal(one.frames[place], other.frames[place])
            or not torch.equal(one.conditions.actions[place], other.conditions.actions[place])
        ]
        assert changed and set(changed) == {3}
        read = [(int(c.frames[i, 0, 0, 0, 0]), int(c.conditions.actions[i, -1]))
                for c in whole[rank] for i in range(2)]  # fmt: skip
        assert all(last < 10 for episode, last in read if episode == 3)
        share = set(loader(rank)._order(0).tolist())
        assert {episode for episode, _ in read[: len(share)]} <= share
    caplog.clear()
    met = loader(0)
    list(islice(met.stream(), 24))
    assert len([one for one in caplog.records if "003.mp4" in one.getMessage()]) == 1
    assert list(met.left_out) == ["003.mp4"]


def test_data_of_which_nothing_can_be_read_ends_with_the_reason():
    loader = Loader(Torn(20, torn=0), 1, 15, seed=0, on_error="skip")
    with pytest.raises(UnreadableClip, match=r"none of 64 clips drawn .* the last: 000.mp4"):
        loader.batch(0)


def test_order_does_not_depend_on_what_was_read_before():
    loader = Loader(Numbered(*[9] * 5), 2, 4, seed=0)
    later = [loader.batch(index) for index in (7, 0, 3)]
    fresh = [Loader(Numbered(*[9] * 5), 2, 4, seed=0).batch(index) for index in (7, 0, 3)]
    assert all(same(one, other) for one, other in zip(later, fresh, strict=True))
    assert np.unique([episodes(batch) for batch in later]).size > 2


def test_reading_ahead_leaves_the_threads_of_training_alone():
    """Its threads have no OpenMP teams of their own, and the number of threads is as before."""
    before = torch.get_num_threads()
    seen = []

    class Watched(ToyWorld):
        def read(self, episode, start, num_frames):
            seen.append(torch.get_num_threads())
            return super().read(episode, start, num_frames)

    stream = Loader(Watched(32, "train"), batch_size=1, num_frames=4, seed=0).stream()
    next(stream)
    stream.close()
    assert set(seen) == {1}
    assert torch.get_num_threads() == before
