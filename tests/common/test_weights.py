"""One reader of weights: every format, wrapper and container as files of the field have them."""

import argparse
import io
import json
import resource
import tarfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scd.common.files import file_aside
from scd.common.weights import (
    Weights,
    check_fit,
    find_weights,
    headers,
    read_state_dict,
    save_tensors,
    write_shards,
)

STATE = {"first.weight": torch.arange(6.0).reshape(2, 3), "second.bias": torch.ones(4)}
OTHER = {name: value + 1 for name, value in STATE.items()}


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


FLAT = {
    "as it is": STATE,
    "DDP": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "DDP of compiled": prefixed("module._orig_mod."),
    "FSDP inside": {
        "first._fsdp_wrapped_module.weight": STATE["first.weight"],
        "second.bias": STATE["second.bias"],
    },
    "ComfyUI": prefixed("model.diffusion_model."),
    "with a loss": prefixed("model.") | {"loss.discriminator.weight": torch.zeros(2)},
    "ema-pytorch": prefixed("ema_model.") | prefixed("online_model.", OTHER),
    "averages by prefix": prefixed("ema.") | prefixed("model.", OTHER),
}

NESTED = {
    "EMA beside": {"ema": STATE, "model": OTHER, "step": 7},
    "DiT": {"ema": STATE, "model": OTHER, "args": argparse.Namespace(lr=1, name="x")},
    "Lightning": {"state_dict": prefixed("model."), "epoch": 1, "callbacks": {"a": [1, None]}},
    "CausVid": {"generator_ema": prefixed("model."), "generator": OTHER},
    "optimizer beside": {"model": STATE, "optimizer": {"state": {}, "param_groups": [{"lr": 1}]}},
    "twice": {"state_dict": {"ema": OrderedDict(STATE)}, "step": 1},
}


def same(found):
    return found.keys() == STATE.keys() and all(torch.equal(found[n], STATE[n]) for n in STATE)


@pytest.mark.parametrize("name", [*FLAT, *NESTED])
@pytest.mark.parametrize("archive", [True, False])
def test_whatever_was_put_around_the_weights_is_taken_off(name, archive, tmp_path):
    content = (FLAT | NESTED)[name]
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=archive)
    assert same(read_state_dict(tmp_path / "x.ckpt"))
    if name in FLAT:
        save_file(content, tmp_path / "x.safetensors")
        assert same(read_state_dict(tmp_path / "x.safetensors"))


def test_what_was_chosen_is_said_and_can_be_chosen_otherwise(tmp_path, caplog):
    torch.save(NESTED["EMA beside"], tmp_path / "x.pt")
    read_state_dict(tmp_path / "x.pt")
    assert "took the weights under 'ema' (others: --key model)" in caplog.text
    assert torch.equal(
        read_state_dict(tmp_path / "x.pt", "model")["second.bias"], 2 * torch.ones(4)
    )
    caplog.clear()
    save_file(FLAT["averages by prefix"], tmp_path / "x.safetensors")
    read_state_dict(tmp_path / "x.safetensors")
    assert "took the averaged weights, whose names begin with 'ema'" in caplog.text
    raw = read_state_dict(tmp_path / "x.safetensors", "model")
    assert torch.equal(raw["second.bias"], 2 * torch.ones(4))


def write_parts(folder, ending, variant=""):
    """Two files and an index, as diffusers and transformers write them."""
    places, infix = {}, f".{variant}" if variant else ""
    for number, (name, value) in enumerate(STATE.items(), 1):
        file = f"model{infix}-{number:05d}-of-00002.{ending}"
        (save_file if ending == "safetensors" else torch.save)({name: value}, folder / file)
        places[name] = file
    index = folder / f"model.{ending}.index{infix}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", ["", "fp16"])
def test_several_files_are_read_by_their_index_or_folder(ending, variant, tmp_path):
    index = write_parts(tmp_path, ending, variant)
    assert same(read_state_dict(index)) and same(read_state_dict(tmp_path))


def test_the_best_form_in_a_folder_is_taken(tmp_path, caplog):
    stem = "diffusion_pytorch_model"
    torch.save({name: v.half() for name, v in STATE.items()}, tmp_path / f"{stem}.fp16.bin")
    assert same(read_state_dict(tmp_path)) and "took the variant 'fp16'" in caplog.text
    torch.save(STATE, tmp_path / f"{stem}.bin")
    assert find_weights(tmp_path).path.name == f"{stem}.bin"
    save_file({name: v.half() for name, v in STATE.items()}, tmp_path / f"{stem}.fp16.safetensors")
    found = find_weights(tmp_path)
    assert (found.variant, found.is_safe) == ("fp16", True)
    save_file(STATE, tmp_path / f"{stem}.safetensors")
    assert find_weights(tmp_path).path.name == f"{stem}.safetensors"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    with pytest.raises(FileNotFoundError, match=r"needed diffusion_pytorch_model.*notes\.txt"):
        find_weights(tmp_path / "empty")


def test_a_file_is_known_by_its_contents(tmp_path):
    torch.save(STATE, tmp_path / "named.safetensors")
    save_file(STATE, tmp_path / "named.pt")
    assert same(read_state_dict(tmp_path / "named.safetensors"))
    assert same(read_state_dict(tmp_path / "named.pt"))


class Stranger:
    """An object of a trainer's own."""


def tar_file(path):
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


def script_file(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


BAD = {
    "cut": (lambda p: p.write_bytes(whole(p)[:-40]), "damaged, cut off"),
    "no file of weights": (lambda p: p.write_text("<html>"), "damaged, cut off"),
    "empty": (lambda p: p.write_bytes(b""), "damaged, cut off"),
    "pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "LFS pull"),
    "code": (lambda p: torch.save({"model": STATE, "x": Stranger()}, p), "an object of .*Stranger"),
    "script": (script_file, "TorchScript archive"),
    "tar": (tar_file, "PyTorch before 0.2"),
    "a list": (lambda p: torch.save([1, 2], p), "no state dict but list"),
    "nothing": (lambda p: torch.save({}, p), "no state dict"),
    "numbers": (lambda p: torch.save({"a": 1, "b": 2}, p), r"but \['a', 'b'\].*--key"),
    "no names": (
        lambda p: torch.save({"shadow_params": [torch.ones(2)], "decay": 0.9}, p),
        "without their names",
    ),
    "twice": (
        lambda p: torch.save({"module.a": torch.ones(1), "a": torch.ones(1)}, p),
        "'module.a' and 'a'",
    ),
    "a bit flipped": (lambda p: torch.save({"a": torch.tensor([1.0, -1e30])}, p), "1e.09 at most"),
    "not finite": (lambda p: torch.save({"a": torch.tensor([1.0, float("nan")])}, p), "finite"),
}


def whole(path):
    torch.save(STATE, path)
    return path.read_bytes()


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_in_one_sentence(name, tmp_path):
    write, said = BAD[name]
    path = tmp_path / "x.pt"
    write(path)
    with pytest.raises(ValueError, match=f"(?i){said}") as caught:
        read_state_dict(path)
    text = str(caught.value)
    assert str(path) in text and len(text.splitlines()) == 1
    # PyTorch's advice, which runs the code of whoever made the file.
    assert not any(word in text for word in ("weights_only", "torch.load", "trust", "allowlist"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "no index of weights"),
        ('{"weight_map": [1]}', "no index of weights"),
        ('{"weight_map": {"a": 1}}', "no index of weights"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "files beside it"),
        ('{"weight_map":' + '{"a":' * 60_000 + "1" + "}" * 60_001, "not JSON"),
        ("{", "not JSON"),
    ],
)
def test_damaged_indices_are_refused(content, said, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        Weights(tmp_path)


def test_files_that_an_index_names_must_be_there_and_hold_their_weights(tmp_path):
    index = write_parts(tmp_path, "safetensors")
    content = json.loads(index.read_text())
    content["weight_map"]["third"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with Weights(tmp_path) as weights, pytest.raises(ValueError, match="holds no 'third'"):
        weights.get("third")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of the files"):
        Weights(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_weights_must_be_floating_point_numbers(dtype, form, tmp_path):
    state, path = {"weight": torch.ones(2, 3).to(dtype), "bias": torch.ones(2)}, tmp_path / "x"
    (save_file if form == "safetensors" else torch.save)(state, path)
    with Weights(path) as weights, pytest.raises(ValueError, match="such as 'weight'.*fp32"):
        check_fit(nn.Linear(3, 2), headers(weights), str(path))


def test_counts_of_a_layer_may_be_integers(tmp_path):
    layer = nn.BatchNorm1d(3)
    save_file(layer.state_dict(), tmp_path / "x.safetensors")
    with Weights(tmp_path / "x.safetensors") as weights:
        check_fit(layer, headers(weights), "x")
        assert weights.state_dict()["num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3).to_sparse(),
        torch.zeros(1).expand(2**33),
        torch.zeros(2, 3, device="meta"),
    ],
    ids=["sparse", "shown often", "meta"],
)
def test_a_tensor_whose_numbers_are_not_in_the_file_is_refused(tensor, tmp_path):
    torch.save({"weight": torch.ones(2), "odd": tensor}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: 'odd' is no plain tensor whose numbers are all"):
        read_state_dict(tmp_path / "x.pt")


def test_a_disk_that_refuses_is_an_os_error_that_names_the_place(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"a": torch.zeros(50_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"could not write {path} \(.* GiB free\)"):
            save_tensors(tensors, path)
        aside = file_aside(path)
        with pytest.raises(OSError, match=rf"could not write {tmp_path} \("), aside as place:
            save_tensors(tensors, place)
        with pytest.raises(OSError, match="could not write .*00001.part"):
            write_shards(iter(tensors.items()), tmp_path, "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
