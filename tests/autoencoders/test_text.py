"""Prompts: embeddings as Wan reads them, their files, prompts that are too long."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from scd.autoencoders.text_encoder import (
    NUM_SAID,
    PromptEmbedder,
    TextConfig,
    clean_prompt,
    default_cache,
)
from tests.tiny_wan_vae import TEXT_DIM, write_tiny_parts

PROMPTS = ["a red cat runs over the snow", "the dog"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_parts(tmp_path_factory.mktemp("wan"))


def embedder_of(source, **settings):
    return PromptEmbedder(source, TextConfig(**({"length": 12, "precision": "fp32"} | settings)))


def test_embeddings_are_the_encoders_with_zeros_for_filling(source):
    """The plain twin: all prompts filled up and masked in one batch, as a pipeline does it."""
    embedded = embedder_of(source).embed(PROMPTS)
    assert embedded.shape == (2, 12, TEXT_DIM)
    tokenizer = AutoTokenizer.from_pretrained(source / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(source / "text_encoder").eval()
    given = tokenizer(PROMPTS, padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(given.input_ids, given.attention_mask).last_hidden_state
    expected = hidden * given.attention_mask[..., None]
    torch.testing.assert_close(embedded, expected)
    assert given.attention_mask.sum(1).tolist() == [8, 3]
    assert embedded[1, 3:].abs().max() == 0 and embedded[1, 2].abs().max() > 0


def test_the_end_of_a_prompt_that_is_too_long_is_cut_and_said_once(source, tmp_path, caplog):
    long, cache = "cat cat cat cat cat cat cat cat cat cat snow night", str(tmp_path / "cache")
    embedder = embedder_of(source, cache=cache)
    assert embedder.cut("cat " * 11) == "" and len(embedder.tokens("cat " * 11)) == 12
    said = "takes 13 tokens, the text encoder 12: its last 1 are cut off.*'...*cat snow'"
    assert re.search(said, embedder.cut(long))
    # As the tokenizer itself cuts, which keeps the token of the end.
    tokenizer = AutoTokenizer.from_pretrained(source / "tokenizer")
    assert embedder.tokens(long) == tokenizer(long, truncation=True, max_length=12).input_ids
    short = embedder.embed([long, "the dog", long])
    assert torch.equal(short[0], embedder.embed([long.removesuffix(" night")])[0])
    assert [len(re.findall(said, one)) for one in caplog.messages] == [1]
    # A text encoder that reads more does not find what was made of less.
    whole = embedder_of(source, cache=cache, length=20).embed([long])
    assert whole[0, 12].abs().max() > 0
    assert torch.equal(embedder_of(source, cache=cache).embed([long]), short[:1])
    caplog.clear()
    embedder_of(source).embed([f"{long} {'cat ' * number}" for number in range(9)])
    assert len(caplog.messages) == NUM_SAID + 1 and "more prompts" in caplog.messages[-1]


def prompt_of(file) -> str:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["scd"])["prompt"]


def test_embedded_prompts_are_kept_with_their_prompt(source, tmp_path):
    cache = tmp_path / "cache"
    embedder = embedder_of(source, cache=str(cache))
    first = embedder.embed(PROMPTS)
    files = sorted(cache.iterdir())
    assert sorted(map(prompt_of, files)) == sorted(PROMPTS)
    again = embedder_of(source, cache=str(cache))
    assert torch.equal(again.embed(["the  dog ", PROMPTS[0]]), first[[1, 0]])
    assert sorted(cache.iterdir()) == files
    longer = embedder_of(source, cache=str(cache), length=20)
    assert longer.embed(PROMPTS).shape == (2, 20, TEXT_DIM)
    assert embedder.is_loaded and not again.is_loaded and not longer.is_loaded


def test_another_encoder_does_not_read_the_files_of_the_first(source, tmp_path):
    cache, other = str(tmp_path / "cache"), tmp_path / "other"
    shutil.copytree(source, other)
    weights = other / "text_encoder" / "model.safetensors"
    state = {name: value * 1.5 for name, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    first = embedder_of(source, cache=cache).embed(PROMPTS)
    second = embedder_of(other, cache=cache).embed(PROMPTS)
    half = embedder_of(source, cache=cache, precision="bf16").embed(PROMPTS)
    assert not torch.allclose(first, second, atol=1e-2)
    assert half.dtype == torch.bfloat16 and not torch.equal(half.float(), first)
    assert torch.allclose(half.float(), first, atol=0.3)


def test_a_damaged_file_is_named(source, tmp_path):
    embedder = embedder_of(source, cache=str(tmp_path))
    embedder.embed(["the dog"])
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"junk")
    with pytest.raises(ValueError, match="damaged, remove it"):
        embedder.embed(["the dog"])


def test_prompts_are_cleaned():
    assert clean_prompt("  a cat&amp;amp; dog\n on  snow ") == "a cat& dog on snow"
    assert clean_prompt("cafÃ©") == "café"


def test_encoders_of_another_kind_are_refused(source, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    with pytest.raises(ValueError, match="needed a text encoder of Wan.*it holds CLIPTextModel"):
        embedder_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer/"):
        embedder_of(source / "vae")
    shutil.copytree(source / "text_encoder", tmp_path / "text_encoder", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        embedder_of(tmp_path)
    shutil.copytree(source / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    state.pop("encoder.final_layer_norm.weight")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of UMT5 are missing.*final_layer_norm"):
        embedder_of(tmp_path).embed(["the dog"])


def test_the_default_cache_is_the_users(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cachefolder")
    assert default_cache() == "cachefolder/scd/prompts"
