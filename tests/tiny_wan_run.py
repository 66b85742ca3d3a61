"""Stage one of Wan, small: a world that `scd convert wan` wrote, and encoded clips with prompts."""

from pathlib import Path

import numpy as np

from scd.cli import main
from scd.data.manifest import Entry, write_card, write_manifest
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.data.video import write_video
from tests.layouts import moving_pictures
from tests.tiny_wan import write_tiny_transformer
from tests.tiny_wan_vae import write_tiny_parts

PROMPTS = ("the red dog runs", "snow at night", "a blue ball", "the cat jumps over the dog")


def write_world(folder: Path, *changes: str) -> tuple[str, str]:
    """What Wan2.1 looks like on disk, and it recomposed, with all its parts inside."""
    wan = str(write_tiny_transformer(write_tiny_parts(folder / "wan"), num_layers=3))
    out = str(folder / "world")
    words = ["--split", "2,1+1", "--height", "32", "--width", "32", "--text-length", "16"]
    words += ["--num-steps", "2", "--window", "5", "--copy-parts"]
    assert main(["convert", "wan", "--model", wan, "--out", out, *words, *changes]) == 0
    return wan, out


def write_clips(folder: Path, num_actions: int = 0, prompts: bool = True) -> str:
    """Six clips of 17 frames, which are 5 latent frames, with their prompts, and actions if told
    how many there are to choose from."""
    card = DataCard(
        height=32,
        width=32,
        fps=16.0,
        conditions=ConditionSpec(num_actions=num_actions),
        action_names=tuple("abcdef"[:num_actions]),
    )
    (folder / "videos").mkdir(parents=True)
    (folder / "actions").mkdir()
    write_card(folder, card)
    entries = []
    for number in range(6):
        name = f"videos/{number}.mp4"
        pixels = moving_pictures(17, 32, 32, seed=number)
        write_video(folder / name, pixels, fps=16.0, lossless=True)
        split = "val" if number > 3 else "train"
        actions = f"actions/{number}.npz" if num_actions else None
        if actions:
            np.savez(folder / actions, actions=(np.arange(17) + number) % num_actions)
        prompt = PROMPTS[number % len(PROMPTS)] if prompts else None
        entries.append(
            Entry(video=name, num_frames=17, split=split, actions=actions, prompt=prompt)
        )
    write_manifest(folder, entries)
    return str(folder)


def encode_with(source: str, clips: str, out: Path, text: str | None = None) -> str:
    """Latents and prompts of clips; text "": no prompts, None: by the same source."""
    words = ["encode", clips, "--autoencoder", source, "--out", str(out), "--device", "cpu"]
    texts = ["--text-encoder", source if text is None else text, "--text-length", "16"]
    assert main([*words, *(texts if text != "" else [])]) == 0
    return str(out)


def words_of(latents: str, world: str, out: Path, *changes: str) -> list[str]:
    """The command of a run of four steps."""
    words = ["train", "wan-tf", "--data", latents, "--initial", world, "--out", str(out)]
    words += ["--num-frames", "5", "--batch-size", "2", "--device", "cpu", "--precision", "fp32"]
    words += ["--max-steps", "4", "--save-every", "2", "--log-every", "1", "--validate-every", "0"]
    words += ["--sample-every", "0", "--num-validation-clips", "2", "--optim.warmup-steps", "1"]
    return [*words, *changes]
