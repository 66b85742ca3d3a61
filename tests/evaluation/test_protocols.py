"""Named protocols: what they say, what they refuse, and which clips they take."""

from dataclasses import fields, replace

import pytest

from scd.cli import main
from scd.data.source import DataCard, Source, open_source
from scd.data.spaces import ConditionSpec
from scd.evaluation.predict import choose_clips, choose_windows
from scd.evaluation.protocols import ABOUT, PROTOCOLS, changes_of

SMALL = replace(
    PROTOCOLS["toy-8-8"],
    context=2,
    horizon=3,
    num_clips=3,
    clips="first",
    shuffled_actions=False,
)


def test_every_protocol_is_explained_and_listed_with_every_setting(capsys):
    assert list(ABOUT) == list(PROTOCOLS)
    assert main(["protocols"]) == 0
    printed = capsys.readouterr().out
    for name, one in PROTOCOLS.items():
        assert one.name == name
        block = printed[printed.index(f"{name}: {ABOUT[name]}\n") :].split("\n\n")[0]
        settings = dict(line.split(maxsplit=1) for line in block.splitlines()[1:])
        assert settings == {
            field.name: str(getattr(one, field.name))
            for field in fields(one)
            if field.name != "name"
        }
    assert main(["protocols", "teco"]) == 2


def test_published_protocols_differ_in_the_quirks_alone():
    quirks = ["fvd_context: 'true', 'reconstructed'", "h264: False, True"]
    best = ["mse_trajectory: 'lowest', 'highest'", "trajectories: 'mean', 'best'"]
    everywhere = ["fvd_frames: 'predicted', 'all'", *quirks, *best]
    for name, expected in (
        ("teco-144-156", [*quirks, *best]),
        ("teco-36-264", everywhere),
        ("ucf101-mcvd-4-12", everywhere),
    ):
        published = PROTOCOLS[f"{name}-published"]
        assert changes_of(replace(published, name=name)) == sorted(expected)
        assert changes_of(published) == []


def test_protocols_are_those_of_the_papers():
    for name, context, horizon, num_clips, num_trajectories, size in (
        ("teco-144-156", 144, 156, 256, 4, 128),
        ("teco-36-264", 36, 264, 256, 4, 128),
        ("teco-36-264-teco", 36, 264, 256, 1, 128),
        ("ucf101-mcvd-4-12", 4, 12, 256, 100, 64),
        ("dmlab-36-264", 36, 264, 256, 1, 64),
        ("doom-36-264", 36, 264, 64, 1, 128),
    ):
        one = PROTOCOLS[name]
        assert (one.context, one.horizon, one.num_clips) == (context, horizon, num_clips)
        assert (one.num_trajectories, one.size, one.clips) == (num_trajectories, size, "first")
    splits = {name: one.split for name, one in PROTOCOLS.items()}
    others = {"ucf101-latte-0-16", "toy-8-8", "custom"}
    assert {name for name, split in splits.items() if split != "test"} == others
    latte = PROTOCOLS["ucf101-latte-0-16"]
    assert (latte.context, latte.horizon, latte.num_clips, latte.size) == (0, 16, 2048, 256)
    # Generation is compared with what was learnt from.
    assert (latte.split, latte.clips, latte.fvd) == ("train", "spread", True)
    assert PROTOCOLS["teco-36-264-teco"].i3d_kind == "tf-hub"
    assert all(one.num_frames in (300, 16) for one in PROTOCOLS.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon must be 1 or more, got 0"),
        ({"size": -1}, "size must be 0 or more, got -1"),
        ({"every": 2, "clips": "spread"}, "every=2 has no effect"),
        ({"mse_trajectory": "highest"}, "mse_trajectory=highest has no effect"),
        ({"fvd_frames": "all"}, "fvd_frames=all has no effect"),
        ({"fvd_context": "reconstructed"}, "fvd_context=reconstructed has no effect"),
        ({"fvd": True, "horizon": 20, "fvd_sets": "pooled"}, "fvd_sets=pooled has no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_given_frames_may_make_a_clip_long_enough_for_fvd():
    assert replace(SMALL, fvd=True, context=7, fvd_frames="all").num_fvd_frames == 10
    assert not replace(SMALL, fvd=True, context=7, fvd_frames="all").without_fvd
    assert "at least 10 frames" in replace(SMALL, fvd=True, context=6, fvd_frames="all").without_fvd


def test_sizes_are_checked():
    sized = replace(SMALL, size=64, lpips=True)
    sized.check_size(64, 64, "d")
    with pytest.raises(ValueError, match="of frames of 64x64, d has 64x48; --size 0 measures"):
        sized.check_size(64, 48, "d")
    with pytest.raises(ValueError, match="LPIPS needs .* 31x31, d has 24x24; .* --no-lpips"):
        replace(sized, size=0).check_size(24, 24, "d")


class Lengths(Source):
    """A source of which only the lengths of episodes are asked for."""

    def __init__(self, *lengths):
        nothing = DataCard(height=1, width=1, fps=1.0, conditions=ConditionSpec(), action_names=())
        super().__init__("lengths", "val", nothing, lengths)

    def _read(self, episode, start, num_frames):
        raise AssertionError("choosing clips reads none")


def test_first_clips_are_the_beginnings_in_order_and_short_ones_are_counted():
    source = Lengths(5, 4, 9, 3, 5, 100, 7)
    assert choose_clips(source, SMALL, "d") == ([(0, 0), (2, 0), (4, 0)], [1, 3])
    every = replace(SMALL, every=3, num_clips=2)
    assert choose_clips(source, every, "d") == ([(0, 0), (6, 0)], [3])
    # Episodes after the last clip are not looked at.
    assert choose_clips(source, replace(SMALL, num_clips=2), "d")[1] == [1]


def test_too_few_clips_are_an_error_that_says_how_many_there_are():
    source = Lengths(5, 4, 9, 3)
    with pytest.raises(
        ValueError,
        match="toy-8-8 needs 3 clips of 5 frames, one from each episode; the 4 val episodes of d "
        "give 2, 2 are too short; --num-clips 2 measures those",
    ):
        choose_clips(source, SMALL, "d")
    with pytest.raises(ValueError, match="every 3th of the 4 val episodes of d give 1, 1 are too"):
        choose_clips(source, replace(SMALL, every=3), "d")


def test_spread_clips_are_those_of_evaluate(folder):
    source = open_source(folder, "val")
    spread = replace(SMALL, clips="spread", num_clips=7, seed=3)
    assert choose_clips(source, spread, folder) == (choose_windows(source, 7, 5, 3), [])
