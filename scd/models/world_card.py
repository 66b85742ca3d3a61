"""The model card of a world, README.md beside its weights: what it is and how to use it."""

from __future__ import annotations

from dataclasses import dataclass

from scd.data.source import DataCard
from scd.models.config import SamplingConfig
from scd.models.kinds import ModelConfig

TAGS = ("world-model", "video-generation", "separable-causal-diffusion")
"""By which the hub finds it."""


@dataclass(frozen=True, kw_only=True)
class WorldFacts:
    """What a card tells of a world."""

    model: ModelConfig
    autoencoder: str
    """Name of its kind."""
    card: DataCard
    sampling: SamplingConfig
    num_parameters: int
    num_clips: int
    """Clips that it carries to begin from."""
    num_clip_frames: int
    """Frames of each."""
    begins_from_nothing: bool
    trained: str
    """Steps, data and time; empty: nobody has said it."""


def steering_of(card: DataCard) -> str:
    """Say what steers a world, in words."""
    spec, names = card.conditions, ", ".join(card.action_names)
    ways = []
    if spec.num_actions:
        ways.append(f"one of {spec.num_actions} actions per frame: {names}")
    if spec.action_dim:
        ways.append(f"{spec.action_dim} numbers per frame: {names}")
    if spec.num_labels:
        ways.append(f"one of {spec.num_labels} classes per stream")
    if spec.has_text:
        ways.append("a text")
    return "; ".join(ways) or "nothing"


def card_text(name: str, facts: WorldFacts) -> str:
    """Write the card of a world.

    Args:
        name: owner/name on the hub, or of its folder: what `scd.load` takes.
        facts: of the world.
    """
    card, sampling = facts.card, facts.sampling
    kind = "separable" if facts.model.is_separable else "dense"
    clips = f"{facts.num_clips} of {facts.num_clip_frames} frames" if facts.num_clips else "none"
    begins = "given frames, or nothing" if facts.begins_from_nothing else "given frames"
    rows = [
        ("model", f"{kind} causal diffuser, `{type(facts.model).__name__}`"),
        ("parameters", f"{facts.num_parameters / 1e6:.1f} M"),
        ("frames", f"{card.height}x{card.width} pixels, {card.fps:g} per second"),
        ("steered by", steering_of(card)),
        ("memory", f"{facts.model.cache.window} latent frames"),
        ("denoising", f"{sampling.num_steps} steps per frame, solver {sampling.solver}"),
        ("autoencoder", f"`{facts.autoencoder}`"),
        ("begins from", begins),
        ("clips to begin from", clips),
        *([("trained", facts.trained)] if facts.trained else []),
    ]
    trained = "in the row `trained` above" if facts.trained else "as a row `trained` of the table"
    tags = "\n".join(f"- {tag}" for tag in TAGS)
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""---
library_name: scd
tags:
{tags}
---

# {name.rpartition("/")[2]}

A world model: frames that follow from earlier ones and from what is done, one at a time, made by
[Separable Causal Diffusion](https://arxiv.org/abs/2602.10095) with `scd`.

| what | |
| --- | --- |
{table}

## Use

```python
{usage(name, facts)}
```

`scd play FOLDER` opens a copy of it in a browser (`hf download {name} --local-dir FOLDER`, if it is
on the hub). The settings are in `config.json`.

## To be filled in

A heading that says what it is; data and their licence; training (commands, hours, hardware), in
short {trained}, both of which `scd play` shows; quality with its
command; what it is not for; and `license:` at the top of this file.
"""


def usage(name: str, facts: WorldFacts) -> str:
    """Return Python code that loads a world and, where actions alone steer it, streams it."""
    spec = facts.card.conditions
    if spec.num_labels or spec.has_text:
        return f'import scd\n\nworld = scd.load("{name}")'
    start = "world.clips[0]" if facts.num_clips else ""
    action = str([0.0] * spec.action_dim) if spec.action_dim else ""
    if spec.num_actions:
        action = f'"{facts.card.action_names[-1]}"'
    return f"""import scd

world = scd.load("{name}")
rollout = scd.Rollout(world)
rollout.begin({start})
frames = [rollout.step({action})[0] for _ in range(32)]
scd.write_video(frames, "stream.mp4", fps=world.card.fps)"""
