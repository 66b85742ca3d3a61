"""State dicts of the release and of FAR become folders that `from_pretrained` reads."""

import json

import pytest
import torch
from safetensors.torch import save_file

from scd.cli import main
from scd.common.weights import read_state_dict
from scd.convert.reference import ReferenceConfig, convert_reference, our_names
from scd.models.dense import DenseDiffuser
from scd.models.separable import SeparableDiffuser
from tests.reference import load_case, reference_folder

TINY = ReferenceConfig(channels=8, height=4, width=4, rotary_axes=(4, 6, 6))


def golden_state(subfolder, name):
    reference_folder()
    return load_case(subfolder, name)[2]


@pytest.mark.parametrize(
    "subfolder, case, kind",
    [
        ("", "t16_train_token_concat", SeparableDiffuser),
        ("", "t16_train_concat", SeparableDiffuser),
        ("dense", "far_train", DenseDiffuser),
    ],
)
def test_converted_folder_holds_the_same_weights(tmp_path, subfolder, case, kind):
    state = golden_state(subfolder, case)
    save_file(state, tmp_path / "theirs.safetensors")
    folder = convert_reference(str(tmp_path / "theirs.safetensors"), str(tmp_path / "ours"), TINY)
    model = kind.from_pretrained(folder)
    ours = model.state_dict()
    renamed = our_names(state)
    assert renamed.keys() == ours.keys()
    assert all(torch.equal(renamed[name], ours[name]) for name in ours)
    with pytest.raises(FileExistsError):
        convert_reference(str(tmp_path / "theirs.safetensors"), str(tmp_path / "ours"), TINY)


def test_a_state_dict_inside_a_dictionary_is_found_by_its_key(tmp_path):
    path = tmp_path / "training.pt"
    torch.save({"ema": {"weight": torch.ones(2)}, "step": 3}, path)
    assert torch.equal(read_state_dict(path, "ema")["weight"], torch.ones(2))
    assert torch.equal(read_state_dict(path)["weight"], torch.ones(2))
    with pytest.raises(ValueError, match="has no 'model'; it holds \\['ema', 'step'\\]"):
        read_state_dict(path, "model")
    torch.save({"mine": {"weight": torch.ones(2)}, "step": 3}, path)
    with pytest.raises(ValueError, match="--key"):
        read_state_dict(path)
    assert torch.equal(read_state_dict(path, "mine")["weight"], torch.ones(2))


@pytest.mark.parametrize("archive", [True, False])
def test_wrapped_names_and_files_of_old_are_read(tmp_path, archive):
    path = tmp_path / "training.pt"
    state = {"module._orig_mod.weight": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    read = read_state_dict(path)
    assert read.keys() == {"weight"} and read["weight"].dtype == torch.float32


def test_files_that_are_no_state_dicts_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "absent.safetensors")
    for name in ("text.safetensors", "text.pt"):
        (tmp_path / name).write_text("not a state dict")
        with pytest.raises(ValueError, match="cannot be read as a state dict"):
            read_state_dict(tmp_path / name)
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has no 'ema'; the names in it begin with"):
        read_state_dict(tmp_path / "other.safetensors", "ema")
    with pytest.raises(ValueError, match="not a state dict of the release"):
        convert_reference(str(tmp_path / "other.safetensors"), str(tmp_path / "out"), TINY)


def test_missing_and_misshapen_weights_are_named(tmp_path):
    state = golden_state("", "t16_train_token_concat")
    del state["decoder.proj_out.bias"]
    save_file(state, tmp_path / "theirs.safetensors")
    with pytest.raises(ValueError, match="missing weights such as 'decoder.proj_out.bias'"):
        convert_reference(str(tmp_path / "theirs.safetensors"), str(tmp_path / "out"), TINY)
    with pytest.raises(ValueError, match="no square patches of 5 channels"):
        convert_reference(
            str(tmp_path / "theirs.safetensors"),
            str(tmp_path / "out"),
            ReferenceConfig(channels=5, height=4, width=4),
        )
    assert not (tmp_path / "out").exists()


def _in_several(folder, state):
    """Two files and the index that says which weight lies where."""
    names = sorted(state)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, folder / file)
    index = folder / "model.safetensors.index.json"
    places = {name: file for file, held in files.items() for name in held}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def _saved(value, name):
    def make(folder, state):
        torch.save(value(state), folder / name)
        return folder / name

    return make


def _under(prefix):
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "make",
    [
        _saved(_under(""), "ema.pth"),
        _saved(_under("module."), "module.pth"),
        _saved(_under("_orig_mod."), "orig_mod.pth"),
        _saved(_under("module._orig_mod."), "both.pth"),
        _saved(lambda state: {"ema": state, "step": 7}, "dict.pth"),
        _saved(lambda state: {"state_dict": _under("model.")(state), "epoch": 1}, "lightning.ckpt"),
        _in_several,
    ],
    ids="ema module orig_mod both dict lightning index".split(),
)
def test_the_command_takes_names_and_files_as_training_leaves_them(tmp_path, make):
    state = golden_state("", "t16_train_token_concat")
    sizes = "--channels 8 --height 4 --width 4 --rotary-axes 4 6 6".split()
    out = tmp_path / "ours"
    assert main(["convert", "reference", str(make(tmp_path, state)), str(out), *sizes]) == 0
    ours, wanted = SeparableDiffuser.from_pretrained(out).state_dict(), our_names(state)
    assert wanted.keys() == ours.keys()
    assert all(torch.equal(wanted[name], ours[name]) for name in wanted)
