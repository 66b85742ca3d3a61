"""A folder like that of Wan2.1 1.3B with random weights, and clips with prompts: for measuring.

    python examples/random_wan.py FOLDER

Speed and memory do not depend on what weights hold. FOLDER/wan is as diffusers writes it, made by
its own classes, but for the text encoder, which is cut to one layer since nothing here measures it;
FOLDER/clips is a collection for `scd encode`, FOLDER/prompts.txt its prompts and FOLDER/taew the
weights of a small decoder. What is there already is left alone. Needs the extra `wan`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from scd.autoencoders.tiny import TaewDecoder
from scd.autoencoders.wan import open_wan_autoencoder
from scd.common.files import written_aside
from scd.data.manifest import Entry, write_card, write_manifest
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.data.video import write_video

WORDS = "a the cat dog red blue ball runs jumps over in of and snow night street car sea"
"""Words that are one token each; others become pieces of one letter."""

PROMPTS = ("the red dog runs over snow", "a blue car in the street at night", "the sea and a ball")


@dataclass(frozen=True, kw_only=True)
class RandomWanConfig:
    """Sizes of what is written; the defaults are those of Wan2.1 1.3B."""

    folder: tyro.conf.Positional[str]
    """Where all of it goes."""
    num_heads: int = 12
    """Attention heads."""
    head_dim: int = 128
    """Width of one of them."""
    ffn_dim: int = 8960
    """Width inside the MLP."""
    num_layers: int = 30
    """Transformer blocks."""
    text_dim: int = 4096
    """Entries of an embedded token."""
    vae_dim: int = 96
    """Channels of the autoencoder's outer layers."""
    height: int = 480
    """Rows of a clip."""
    width: int = 832
    """Columns of a clip."""
    num_frames: int = 81
    """Frames of a clip; 81 are 21 latent ones."""
    vae: str = ""
    """Trained autoencoder (`scd train-autoencoder --network small-wan`) in place of a random one of
    `vae_dim`, whose latents have no unit scale: its numbers are those of Wan's."""


def write_transformer(config: RandomWanConfig, folder: Path) -> None:
    """Write transformer/ in bfloat16."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        text_dim=config.text_dim,
    )
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)


def write_vae(config: RandomWanConfig, folder: Path) -> None:
    """Write vae/."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    torch.manual_seed(0)
    network = (
        open_wan_autoencoder(config.vae).network
        if config.vae
        else AutoencoderKLWan(base_dim=config.vae_dim)
    )
    network.save_pretrained(folder)


def write_tokenizer(folder: Path) -> int:
    """Write tokenizer/ over WORDS and letters; return how many tokens it knows."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS.split()]
    pieces += [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    T5TokenizerFast(tokenizer_object=backend, vocab=pieces, extra_ids=0, **names).save_pretrained(
        folder
    )
    return len(pieces)


def write_text_encoder(config: RandomWanConfig, vocabulary: int, folder: Path) -> None:
    """Write text_encoder/: the width of Wan's UMT5, one layer."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    settings = UMT5Config(
        vocab_size=vocabulary,
        d_model=config.text_dim,
        d_kv=8,
        num_heads=4,
        d_ff=64,
        num_layers=1,
        feed_forward_proj="gated-gelu",
    )
    UMT5EncoderModel(settings).save_pretrained(folder)


def write_clips(config: RandomWanConfig, folder: Path) -> None:
    """Write a collection of one clip for each prompt; the last one is held out."""
    card = DataCard(
        height=config.height,
        width=config.width,
        fps=16.0,
        conditions=ConditionSpec(),
        action_names=(),
    )
    (folder / "videos").mkdir()
    write_card(folder, card)
    rows, columns = np.mgrid[: config.height, : config.width]
    entries = []
    for number, prompt in enumerate(PROMPTS):
        waves = [
            np.sin((rows * (number + 1) + columns + 4 * frame) / 16)
            for frame in range(config.num_frames)
        ]
        grey = ((np.stack(waves) + 1) * 127).astype(np.uint8)
        name = f"videos/{number}.mp4"
        write_video(folder / name, np.repeat(grey[..., None], 3, -1), fps=16.0, lossless=False)
        split = "val" if number == len(PROMPTS) - 1 else "train"
        entries.append(Entry(video=name, num_frames=config.num_frames, split=split, prompt=prompt))
    write_manifest(folder, entries)


def write_wan(config: RandomWanConfig, folder: Path) -> None:
    """Write all parts of a pipeline, and the index that names their classes."""
    write_transformer(config, folder / "transformer")
    write_vae(config, folder / "vae")
    write_text_encoder(config, write_tokenizer(folder / "tokenizer"), folder / "text_encoder")
    index = {
        "_class_name": "WanPipeline",
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def write_tiny(folder: Path) -> None:
    """Write weights of a TAEW, which has one size only."""
    torch.manual_seed(0)
    save_file(TaewDecoder().state_dict(), folder / "taew.safetensors")


def main(config: RandomWanConfig) -> None:
    """Write what is not there yet."""
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[Path], None]] = {
        "wan": lambda path: write_wan(config, path),
        "clips": lambda path: write_clips(config, path),
        "taew": write_tiny,
    }
    for name, write in parts.items():
        if not (folder / name).exists():
            with written_aside(folder / name) as aside:
                write(aside)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    print(f"saved {folder}")


if __name__ == "__main__":
    main(tyro.cli(RandomWanConfig))
