"""A folder as diffusers writes it, with real classes of tiny size and random weights.

The words of the tokenizer are those of WORDS; others become pieces of one letter.
"""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = "a the cat dog red blue ball runs jumps over in of and snow night"
"""Words that are one token each."""

TEXT_DIM = 32
"""Entries of an embedded token."""

CHANNELS = 16
"""Channels of a latent frame, as in Wan."""


def tiny_vae(seed: int = 0) -> AutoencoderKLWan:
    """Wan's autoencoder with four channels: latents of 16 channels, cells of 8 pixels."""
    torch.manual_seed(seed)
    return AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def tiny_decoder(seed: int = 0) -> AutoencoderTiny:
    """A tiny autoencoder for single pictures of latents with 16 channels."""
    torch.manual_seed(seed)
    return AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()


def tiny_tokenizer(max_length: int = 512) -> T5TokenizerFast:
    """T5's tokenizer over WORDS, the letters, and its own special tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS.split()]
    pieces += [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,.!'-é"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return T5TokenizerFast(
        tokenizer_object=backend,
        vocab=pieces,
        extra_ids=0,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=max_length,
    )


def tiny_text_encoder(vocabulary: int, seed: int = 0) -> UMT5EncoderModel:
    """UMT5's encoder with two layers."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=8,
        num_heads=4,
        d_ff=64,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config).eval()


def write_tiny_parts(folder: Path, seed: int = 0) -> Path:
    """Write vae/, text_encoder/ and tokenizer/ into a folder."""
    tokenizer = tiny_tokenizer()
    tiny_vae(seed).save_pretrained(folder / "vae")
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_text_encoder(len(tokenizer), seed).save_pretrained(folder / "text_encoder")
    return folder
