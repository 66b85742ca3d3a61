"""Distances under known damage: what each damage does, the bias, and features that are kept."""

import pytest
import torch

from scd.data.toy import ToyWorld
from scd.evaluation.fvd import I3d
from tools import distances


def clips(seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(3, 5, 3, size // 4, size // 4, generator=generator) * 2 - 1
    return small.repeat_interleave(4, -1).repeat_interleave(4, -2)


def test_every_damage_keeps_the_shape_and_does_what_it_says():
    whole = clips()
    made = {name: damage(whole) for name, damage in distances.damages(seed=0).items()}
    assert all(one.shape == whole.shape for one in made.values())
    apart = {name: (one - whole).square().mean().item() for name, one in made.items()}
    assert apart["rounded to 8 bits"] < 1e-4
    assert apart["blur of 0.5 pixels"] < apart["blur of 1 pixel"] < apart["blur of 2 pixels"]
    assert apart["noise of 0.05"] < 0.05**2 < apart["noise of 0.2"] < 0.2**2
    assert apart["H.264, rate factor 18"] < apart["H.264, rate factor 35"]
    assert torch.equal(made["first frame frozen"][:, 4], whole[:, 0])
    for one, other in zip(made["frames shuffled"], whole, strict=True):
        assert sorted(one.mean((1, 2, 3)).tolist()) == sorted(other.mean((1, 2, 3)).tolist())
    assert {tuple(one.flatten().tolist()) for one in made["another clip"]} == {
        tuple(one.flatten().tolist()) for one in whole
    }
    assert not any(torch.equal(*both) for both in zip(made["another clip"], whole, strict=True))


def test_blur_keeps_flat_frames_and_means():
    flat = torch.full((1, 1, 3, 9, 9), 0.25)
    torch.testing.assert_close(distances.blurred(flat, 2.0), flat)
    dot = torch.zeros(1, 1, 1, 21, 21)
    dot[..., 10, 10] = 1
    blurred = distances.blurred(dot.expand(1, 1, 3, 21, 21).contiguous(), 1.0)[0, 0, 0]
    assert blurred.sum().item() == pytest.approx(1, abs=1e-4)
    # A Gaussian of one pixel, at its centre: (1 / sqrt(2 pi))^2.
    assert blurred[10, 10].item() == pytest.approx(1 / (2 * torch.pi), rel=0.01)


def test_wrong_actions_begin_alike_and_move_the_agent_alone():
    source, windows = ToyWorld(32, "train"), [(0, 100), (1, 7), (2, 0)]
    made = distances.steered_by_others(source, windows, 10, seed=0)
    for (episode, start), clip in zip(windows, made, strict=True):
        true = source.read(episode, start, 10)
        assert torch.equal(clip[0], true.frames[0])
        assert not torch.equal(clip, true.frames)
        # By its own actions an episode goes on as it did.
        again = source.play(episode, true.actions.numpy(), start)
        assert torch.equal(again.frames, true.frames)


def test_bias_falls_with_the_number_of_clips_and_goes_to_nothing():
    features = torch.randn(512, 40, generator=torch.Generator().manual_seed(0))
    rows = distances.bias(features, seed=0)
    sizes, values = zip(*((row["clips"], row["fvd"]) for row in rows), strict=True)
    assert sizes == (8, 16, 32, 64, 128, 256, 0)
    assert list(values[:-1]) == sorted(values[:-1], reverse=True)
    deviations = [row["deviation"] for row in rows[:-1]]
    assert deviations == sorted(deviations, reverse=True)
    # The line through the last three is far nearer to the true distance, which is 0.
    assert abs(values[-1]) < values[-2] / 2
    head, _, first, *_, last = distances.bias_table({"bias": rows}).splitlines()
    assert head == "| clips on each side | FVD of real against real | deviation |"
    assert first.startswith(f"| 8 | {values[0]:.1f} |") and last.startswith("| extrapolated |")


def test_rows_and_the_table():
    whole = clips()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 4, generator=generator)
    row = distances.row_of("nothing", whole, whole, {"fvd": (features, features)})
    assert row["psnr"] > 50 and row["ssim"] == pytest.approx(1) and abs(row["fvd"]) < 1e-6
    result = {"rows": [row], "other_real_clips": {"all": 12.34, "half": 23.45}}
    head, _, first, second, third = distances.table(result).splitlines()
    assert head == "| damage | FVD | PSNR | SSIM |"
    assert first.startswith("| nothing | 0.0 [")
    assert second == "| other real clips (all) | 12.3 |  |  |" and "23.4" in third


def small_network(clip):
    """400 numbers of a clip, instead of I3D's: means of its frames, over and over."""
    return clip.mean((3, 4)).flatten(1).repeat(1, 14)[:, :400]


def test_a_whole_table_of_the_toy_world_goes_on_and_refuses_other_clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    networks = {kind: I3d(small_network, kind, torch.device("cpu")) for kind in distances.KINDS}
    words = {"name": "x", "data": "toy:32", "num_clips": 4, "num_frames": 10}
    config = distances.DistancesConfig(**words, num_real=64)
    result = distances.distances(config, networks)
    rows = {row["damage"]: row for row in result["rows"]}
    assert len(rows) == len(distances.damages(0)) + 1
    # The set of clips is the same, so nothing is seen of it.
    assert rows["another clip"]["fvd"] < 1e-6 < rows["blur of 2 pixels"]["fvd"]
    assert rows["another clip"]["psnr"] < rows["wrong actions"]["psnr"]
    assert [row["clips"] for row in result["bias"]] == [8, 16, 32, 0]
    distances.draw(result["bias"], tmp_path / "bias.png")
    assert (tmp_path / "bias.png").stat().st_size > 1000
    # Everything is kept: no network is asked again.
    again = distances.distances(config, {})
    assert {**again, "command": ""} == {**result, "command": ""}
    with pytest.raises(ValueError, match="then and now: num_frames: 10, 12"):
        distances.distances(distances.DistancesConfig(**words | {"num_frames": 12}), networks)
