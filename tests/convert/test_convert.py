"""State dicts of the release and of FAR become folders that `from_pretrained` reads."""

import pytest
import torch
from safetensors.torch import save_file

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
