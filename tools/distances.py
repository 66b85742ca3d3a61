"""Which distances mean what: FVD, PSNR and SSIM of real clips under known damage.

    python tools/distances.py NAME DATA [--num-clips 64] [--judge FOLDER]

takes clips of 16 frames of DATA, damages them one way after the other, and compares them with what
they were, as `scd evaluate` compares predictions with the truth of the same clips. FVD is also
taken between two halves of the real clips that share none, at more and more clips: what is left
there is bias, which falls with their number, and a line through the last two numbers over 1 / clips
says what it would fall to. Needs scd weights i3d. Features are kept in
runs/out/distances, so the same command goes on. It writes docs/results/distances_NAME.json and
prints its tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from cells import markdown
from jaxtyping import Float
from torch import Tensor

from scd.common.config import at_least, to_json
from scd.common.files import file_aside
from scd.common.provenance import provenance, write_json
from scd.common.runtime import make_generator
from scd.data.clip import frames_to_pixels, pixels_to_frames
from scd.data.source import open_source
from scd.data.spaces import Split
from scd.evaluation.frechet import frechet_estimate, frechet_of_sets
from scd.evaluation.fvd import cached_i3d, fvd_estimate
from scd.evaluation.image import bootstrap, frame_values, psnr_of
from scd.evaluation.inverse_dynamics import TrainedInverseDynamics, load_inverse_dynamics, pairs
from scd.evaluation.predict import choose_windows, read_windows
from scd.evaluation.protocols import MIN_FRAMES
from scd.evaluation.trial import another_clip, through_h264

DOCS = Path(__file__).resolve().parent.parent / "docs"

Clips = Float[Tensor, "b t 3 h w"]


@dataclass(frozen=True, kw_only=True)
class DistancesConfig:
    """One table."""

    name: Annotated[str, tyro.conf.Positional]
    """Name of the data in the result."""
    data: Annotated[str, tyro.conf.Positional]
    """Clips, as for scd evaluate."""
    split: Split = "train"
    """Part of the data; the largest has the most clips, and nothing is trained here."""
    num_clips: int = 64
    """Clips that are damaged; as many more are compared with the undamaged ones."""
    num_frames: int = 16
    """Frames of each."""
    judge: str = ""
    """Inverse dynamics model of the same data (scd train-judge): its Frechet distance too."""
    seed: int = 0
    """Of the chosen clips and of noise."""

    def __post_init__(self) -> None:
        at_least(4, num_clips=self.num_clips)
        at_least(MIN_FRAMES, num_frames=self.num_frames)


def blurred(clips: Clips, sigma: float) -> Clips:
    """Blur frames by a Gaussian of so many pixels, mirrored at the edges."""
    reach = max(1, round(3 * sigma))
    places = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-places.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    frames = clips.flatten(0, 2)[:, None]
    frames = F.pad(frames, [reach] * 4, mode="reflect")
    frames = F.conv2d(F.conv2d(frames, weights[None, None, None]), weights[None, None, :, None])
    return frames.reshape(clips.shape)


def noisy(clips: Clips, deviation: float, seed: int) -> Clips:
    """Add Gaussian noise, and cut at black and white."""
    drawn = torch.randn(clips.shape, generator=make_generator(seed, "damage"))
    return (clips + deviation * drawn).clamp(-1, 1)


def in_other_order(clips: Clips, seed: int) -> Clips:
    """Shuffle the frames of each clip."""
    generator = make_generator(seed, "order")
    return torch.stack([clip[torch.randperm(len(clip), generator=generator)] for clip in clips])


def in_8_bits(clips: Clips) -> Clips:
    """Round pixels to what a file of pictures holds."""
    return pixels_to_frames(frames_to_pixels(clips.flatten(0, 1))).reshape(clips.shape)


def smaller(clips: Clips) -> Clips:
    """Halve rows and columns by means, and double them again bilinearly."""
    frames = F.avg_pool2d(clips.flatten(0, 1), 2)
    return F.interpolate(frames, scale_factor=2, mode="bilinear").reshape(clips.shape)


def damages(seed: int) -> dict[str, Callable[[Clips], Clips]]:
    """Return what is done to clips, by name."""
    found: dict[str, Callable[[Clips], Clips]] = {
        "rounded to 8 bits": in_8_bits,
        "blur of 0.5 pixels": lambda clips: blurred(clips, 0.5),
        "blur of 1 pixel": lambda clips: blurred(clips, 1.0),
        "blur of 2 pixels": lambda clips: blurred(clips, 2.0),
        "half the resolution": smaller,
        "noise of 0.05": lambda clips: noisy(clips, 0.05, seed),
        "noise of 0.2": lambda clips: noisy(clips, 0.2, seed),
        "first frame frozen": lambda clips: clips[:, :1].expand_as(clips).contiguous(),
        "frames shuffled": lambda clips: in_other_order(clips, seed),
        "another clip": lambda clips: clips[another_clip(len(clips), seed)],
    }
    for crf in (18, 25, 35):
        found[f"H.264, rate factor {crf}"] = lambda clips, crf=crf: torch.stack(
            [through_h264(clip, clip, crf)[0] for clip in clips]
        )
    return found


class Kept:
    """Features by name in a folder, computed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Read what is there, or make and keep it."""
        path = self.folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.npy"
        if not path.exists():
            made = make().numpy()
            with file_aside(path) as aside, aside.open("wb") as file:
                np.save(file, made)
            print(f"features of {name}", flush=True)
        return torch.from_numpy(np.load(path))


def own_features(judge: TrainedInverseDynamics, clips: Clips) -> Float[Tensor, "b m d"]:
    """Return the features of each pair of frames."""
    with torch.no_grad():
        return torch.stack([judge.network.features(*pairs(clip[None])) for clip in clips]).cpu()


def row_of(
    name: str, true: Clips, made: Clips, features: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Return all distances of damaged clips."""
    values = [frame_values(one, other) for one, other in zip(made, true, strict=True)]
    errors = torch.stack([one["mse"].mean() for one in values])
    row: dict[str, Any] = {
        "damage": name,
        "psnr": psnr_of(errors.mean()).item(),
        "ssim": bootstrap(torch.stack([one["ssim"].mean() for one in values])).mean,
    }
    for metric, (ours, theirs) in features.items():
        if metric == "frechet_own":
            found = frechet_estimate(ours, theirs)
        else:
            found = fvd_estimate(ours[:, None], theirs[:, None])
        row |= {metric: found.mean, f"{metric}_low": found.ci_low, f"{metric}_high": found.ci_high}
    return row


def bias(one: Tensor, other: Tensor, seed: int, draws: int = 10) -> list[dict[str, float]]:
    """Return FVD between two real sets at growing numbers of clips, means over subsets of each."""
    generator = make_generator(seed, "subsets")
    sizes = [size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if size <= len(one)]
    rows = []
    for size in sizes:
        found = []
        for _ in range(1 if size == len(one) else draws):
            chosen = [torch.randperm(len(one), generator=generator)[:size] for _ in range(2)]
            found.append(frechet_of_sets(one[chosen[0]], other[chosen[1]]).item())
        rows.append({"clips": size, "fvd": sum(found) / len(found)})
    if len(rows) > 1:
        (few, less), (many, more) = ((1 / row["clips"], row["fvd"]) for row in rows[-2:])
        rows.append({"clips": 0, "fvd": more - many * (less - more) / (few - many)})
    return rows


def distances(config: DistancesConfig) -> dict[str, Any]:
    """Measure all damages and the bias."""
    source = open_source(config.data, config.split)
    windows = choose_windows(source, 2 * config.num_clips, config.num_frames, config.seed)
    clips = read_windows(source, windows, config.num_frames).frames
    true, others = clips[: config.num_clips], clips[config.num_clips :]
    kept = Kept(Path("runs/out/distances") / f"{config.name}-{config.num_clips}")
    networks = {kind: cached_i3d(kind, torch.device("cpu")) for kind in ("tf-hub", "original")}
    judge = load_inverse_dynamics(config.judge) if config.judge else None
    real = kept.get("real", lambda: networks["tf-hub"].features(true))
    corners = kept.get("real, original", lambda: networks["original"].features(true))
    rest = kept.get("other clips", lambda: networks["tf-hub"].features(others))
    rows = []
    for name, damage in damages(config.seed).items():
        made = damage(true)
        found = kept.get(name, lambda made=made: networks["tf-hub"].features(made))
        features = {"fvd": (found, real)}
        if name == "blur of 1 pixel":
            found = kept.get(
                f"{name}, original", lambda made=made: networks["original"].features(made)
            )
            features["fvd_original"] = (found, corners)
        if judge is not None:
            features["frechet_own"] = (own_features(judge, made), own_features(judge, true))
        rows.append(row_of(name, true, made, features))
    half = frechet_of_sets(real[::2], rest[::2]).item()
    return {
        "name": config.name,
        "rows": rows,
        "other_real_clips": {"all": frechet_of_sets(real, rest).item(), "half": half},
        "scaled_as_original": frechet_of_sets(corners, real).item(),
        "bias": bias(real, rest, config.seed),
        "settings": to_json(replace(config, judge=config.judge)),
    } | provenance()


def table(result: Mapping[str, Any]) -> str:
    """Return the table of the docs."""
    own = any("frechet_own" in row for row in result["rows"])
    head = ["damage", "FVD", "PSNR", "SSIM", *["`frechet_own`"] * own]
    rows = []
    for row in result["rows"]:
        interval = f"{row['fvd']:.1f} [{row['fvd_low']:.1f}, {row['fvd_high']:.1f}]"
        cells = [row["damage"], interval, f"{row['psnr']:.1f}", f"{row['ssim']:.3f}"]
        rows.append([*cells, *([f"{row['frechet_own']:.2f}"] if own else [])])
    for name, value in result["other_real_clips"].items():
        rows.append([f"other real clips ({name})", f"{value:.1f}", *[""] * (len(head) - 2)])
    return markdown(head, rows)


def main(arguments: Sequence[str]) -> int:
    """Measure; return the exit status."""
    config = tyro.cli(DistancesConfig, args=arguments)
    try:
        result = distances(config)
        write_json(result, DOCS / f"results/distances_{config.name}.json")
    except (ValueError, OSError) as error:
        print(f"distances.py: {error}", file=sys.stderr)
        return 2
    print(table(result))
    print(
        markdown(
            ["clips", "FVD of real against real"],
            [[str(row["clips"] or "extrapolated"), f"{row['fvd']:.1f}"] for row in result["bias"]],
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
