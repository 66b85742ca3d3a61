"""Which distances mean what: FVD, PSNR and SSIM of real clips under known damage.

    python tools/distances.py NAME DATA [--num-clips 64] [--num-real 2048] [--judge FOLDER]

takes clips of 16 frames of DATA, damages them one way after the other, and compares them with what
they were, as `scd evaluate` compares predictions with the truth of the same clips. FVD is also
taken between real clips and as many other ones, at more and more of them: what is left there is
bias, which falls with their number, and a line through the last three numbers over 1 / clips says
what it would fall to. Needs scd weights i3d. Features are kept in runs/out/distances/NAME, so the
same command goes on. It writes docs/results/distances_NAME.json, the plot of the bias beside it,
and prints its tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from scd.common.provenance import provenance, write_json
from scd.common.runtime import make_generator
from scd.data.clip import frames_to_pixels, pixels_to_frames
from scd.data.source import Source, open_source
from scd.data.spaces import Split
from scd.data.toy import ToyWorld
from scd.evaluation.evaluate import Parts
from scd.evaluation.frechet import frechet_estimate, frechet_of_sets
from scd.evaluation.fvd import I3d, cached_i3d, fvd_estimate
from scd.evaluation.image import bootstrap, frame_values, psnr_of
from scd.evaluation.inverse_dynamics import TrainedInverseDynamics, load_inverse_dynamics, pairs
from scd.evaluation.plots import curve_panels, finish
from scd.evaluation.predict import Window, choose_windows, read_windows
from scd.evaluation.protocols import MIN_FRAMES, I3dKind
from scd.evaluation.trial import another_clip, through_h264

DOCS = Path(__file__).resolve().parent.parent / "docs"

FEATURES = Path("runs/out/distances")
"""Where features are kept."""

Clips = Float[Tensor, "b t 3 h w"]

KINDS: tuple[I3dKind, ...] = ("tf-hub", "original")
"""How frames are scaled, from centres and from corners."""

BLOCK = 64
"""Clips whose features are kept together."""

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Numbers of clips at which the bias is measured, as far as there are twice as many."""

NUM_SPLITS = 20
"""Random choices of real clips at each."""


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
    num_real: int = 0
    """Real clips for the bias; 0: twice those that are damaged, which is the least."""
    num_frames: int = 16
    """Frames of each."""
    judge: str = ""
    """Inverse dynamics model of the same data (scd train-judge): its Frechet distance too."""
    seed: int = 0
    """Of the chosen clips and of noise."""

    def __post_init__(self) -> None:
        at_least(4, num_clips=self.num_clips)
        if self.num_real:
            at_least(2 * self.num_clips, num_real=self.num_real)
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


class Features:
    """I3D's features of clips, kept by name and block in a folder, computed once."""

    def __init__(
        self, config: DistancesConfig, source: Source, networks: Mapping[I3dKind, I3d]
    ) -> None:
        """Open the folder (ValueError: it holds those of other clips)."""
        self.networks = networks
        self.parts = Parts(FEATURES / config.name)
        chosen = {name: getattr(config, name) for name in ("data", "split", "num_frames", "seed")}
        self.parts.open(chosen | {"card": to_json(source.card)})

    def of(
        self,
        name: str,
        num_clips: int,
        read: Callable[[slice], Clips],
        kind: I3dKind = "tf-hub",
    ) -> Float[Tensor, "b 400"]:
        """Return the features of clips, of which `read` gives some."""
        found = []
        for start in range(0, num_clips, BLOCK):
            stop = min(start + BLOCK, num_clips)
            words = re.sub(r"[^a-z0-9]+", "_", f"{name} {kind}".lower())
            part = f"{words}-{start}-{stop}"
            if self.parts.missing([part]):
                made = self.networks[kind].features(read(slice(start, stop)))
                self.parts.write(part, {"features": made})
                print(f"features of {name}: {stop} of {num_clips} clips", flush=True)
            found.append(self.parts.read(part)["features"])
        return torch.cat(found)


def steered_by_others(source: ToyWorld, windows: Sequence[Window], length: int, seed: int) -> Clips:
    """Play the toy world on from the first frame of each clip, by the actions of another one."""
    actions = [source.read(episode, start, length).actions for episode, start in windows]
    clips = []
    for (episode, start), other in zip(windows, another_clip(len(windows), seed), strict=True):
        own, theirs = actions[len(clips)], actions[other]
        assert own is not None and theirs is not None
        steering = torch.cat([own[:1], theirs[1:]]).numpy()
        clips.append(source.play(episode, steering, start).frames)
    return torch.stack(clips)


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


def bias(features: Float[Tensor, "num d"], seed: int) -> list[dict[str, float]]:
    """Return FVD between as many real clips and other ones, mean and deviation over choices.

    The row of 0 clips is the line over 1 / clips through the last three, or two, at its end.
    """
    generator = make_generator(seed, "subsets")
    rows = []
    for size in SIZES:
        if 2 * size > len(features):
            break
        found = []
        for _ in range(NUM_SPLITS):
            order = torch.randperm(len(features), generator=generator)
            both = features[order[:size]], features[order[size : 2 * size]]
            found.append(frechet_of_sets(*both).item())
        mean, deviation = np.mean(found).item(), np.std(found).item()
        rows.append({"clips": size, "fvd": mean, "deviation": deviation})
    if len(rows) > 1:
        places, values = zip(*((1 / row["clips"], row["fvd"]) for row in rows[-3:]), strict=True)
        rows.append({"clips": 0, "fvd": np.polyfit(places, values, 1)[1].item()})
    return rows


def distances(config: DistancesConfig, networks: Mapping[I3dKind, I3d]) -> dict[str, Any]:
    """Measure all damages and the bias, by a network of either scaling."""
    source, num_clips = open_source(config.data, config.split), config.num_clips
    num_real = config.num_real or 2 * num_clips
    windows = choose_windows(source, num_real, config.num_frames, config.seed)
    judge = load_inverse_dynamics(config.judge) if config.judge else None
    if judge is not None:
        judge.check_fit(source.card, config.data)
    features = Features(config, source, networks)

    def real(some: slice) -> Clips:
        return read_windows(source, windows[some], config.num_frames).frames

    everything, true = features.of("real", num_real, real), real(slice(num_clips))
    ours, rest = everything[:num_clips], everything[num_clips : 2 * num_clips]
    corners = features.of("real", num_clips, real, "original")
    rows = []
    for name, made in damaged(config, source, windows[:num_clips], true):
        kept = f"{name} of {num_clips}"
        found = {"fvd": (features.of(kept, num_clips, made.__getitem__), ours)}
        if name == "blur of 1 pixel":
            moved = features.of(kept, num_clips, made.__getitem__, "original")
            found["fvd_original"] = (moved, corners)
        if judge is not None:
            found["frechet_own"] = (own_features(judge, made), own_features(judge, true))
        rows.append(row_of(name, true, made, found))
    half = frechet_of_sets(ours[::2], rest[::2]).item()
    return {
        "name": config.name,
        "rows": rows,
        "other_real_clips": {"all": frechet_of_sets(ours, rest).item(), "half": half},
        "scaled_as_original": frechet_of_sets(corners, ours).item(),
        "bias": bias(everything, config.seed),
        "settings": to_json(config),
    } | provenance()


def damaged(
    config: DistancesConfig, source: Source, windows: Sequence[Window], true: Clips
) -> Iterator[tuple[str, Clips]]:
    """Yield what is done to clips, by name, and what comes of it."""
    for name, damage in damages(config.seed).items():
        yield name, damage(true)
    # Elsewhere nobody recorded what other actions would have led to.
    if isinstance(source, ToyWorld):
        yield "wrong actions", steered_by_others(source, windows, config.num_frames, config.seed)


def draw(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw FVD of real clips against real ones over their number."""
    figure, (axes,) = curve_panels(1, "on white")
    measured = [row for row in rows if row["clips"]]
    sizes, values, deviations = (
        np.array([row[key] for row in measured]) for key in ("clips", "fvd", "deviation")
    )
    (line,) = axes.loglog(sizes, values, marker="o", markersize=3)
    band = (values - 2 * deviations).clip(values.min() / 10), values + 2 * deviations
    axes.fill_between(sizes, *band, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("clips on each side")
    axes.set_ylabel("FVD of real clips against other real ones")
    finish(figure, path, "", "on white")


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
    try:
        config = tyro.cli(DistancesConfig, args=arguments)
        cpu = torch.device("cpu")
        networks: dict[I3dKind, I3d] = {kind: cached_i3d(kind, cpu) for kind in KINDS}
        result = distances(config, networks)
        out = DOCS / f"results/distances_{config.name}.json"
        write_json(result, out)
        draw(result["bias"], out.with_suffix(".png"))
    except (ValueError, OSError) as error:
        print(f"distances.py: {error}", file=sys.stderr)
        return 2
    print(table(result))
    print(bias_table(result))
    return 0


def bias_table(result: Mapping[str, Any]) -> str:
    """Return the table of FVD by the number of clips."""
    cells = [
        [str(row["clips"]), f"{row['fvd']:.1f}", f"{row['deviation']:.1f}"]
        if row["clips"]
        else ["extrapolated", f"{row['fvd']:.1f}", ""]
        for row in result["bias"]
    ]
    return markdown(["clips on each side", "FVD of real against real", "deviation"], cells)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
