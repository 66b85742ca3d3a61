"""LPIPS against a second implementation in plain numpy, and the hash check of its weights."""

import hashlib

import numpy as np
import pytest
import torch

from scd.common import published_weights as weights
from scd.evaluation import lpips

CHANNELS = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights under the names of torchvision's AlexNet and of LPIPS's heads."""
    generator = torch.Generator().manual_seed(0)
    alexnet, heads = {}, {}
    for index, (number, (given, made, kernel)) in enumerate(
        zip((0, 3, 6, 8, 10), CHANNELS, strict=True)
    ):
        spread = (2 / (given * kernel**2)) ** 0.5
        shape = (made, given, kernel, kernel)
        alexnet[f"features.{number}.weight"] = spread * torch.randn(shape, generator=generator)
        alexnet[f"features.{number}.bias"] = 0.1 * torch.randn(made, generator=generator)
        heads[f"lin{index}.model.1.weight"] = torch.rand(1, made, 1, 1, generator=generator)
    alexnet["classifier.6.weight"] = torch.zeros(3, 3)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(alexnet, folder / "alexnet.pth")
    torch.save(heads, folder / "heads.pth")
    return str(folder / "alexnet.pth"), str(folder / "heads.pth")


@pytest.fixture(scope="module")
def frames():
    generator = torch.Generator().manual_seed(1)
    true = torch.rand(2, 3, 35, 40, generator=generator) * 2 - 1
    return (true + 0.3 * torch.randn(true.shape, generator=generator)).clamp(-1, 1), true


def convolved(picture, kernels, bias, stride, padding):
    """A convolution as a sum over the kernel's places."""
    picture = np.pad(picture, ((0, 0), (padding, padding), (padding, padding)))
    size = kernels.shape[-1]
    rows = (picture.shape[1] - size) // stride + 1
    columns = (picture.shape[2] - size) // stride + 1
    total = np.zeros((len(kernels), rows, columns)) + bias[:, None, None]
    for down in range(size):
        for right in range(size):
            seen = picture[
                :, down : down + rows * stride : stride, right : right + columns * stride : stride
            ]
            total += np.tensordot(kernels[:, :, down, right], seen, axes=(1, 0))
    return total


def pooled(picture):
    rows, columns = (picture.shape[1] - 3) // 2 + 1, (picture.shape[2] - 3) // 2 + 1
    return np.stack(
        [
            picture[:, down : down + 2 * rows : 2, right : right + 2 * columns : 2]
            for down in range(3)
            for right in range(3)
        ]
    ).max(0)[:, :rows, :columns]


def by_hand(picture, other, alexnet, heads):
    """LPIPS of two pictures that are fed as they are, in double precision."""
    shift = np.array([-0.030, -0.088, -0.188])[:, None, None]
    scale = np.array([0.458, 0.448, 0.450])[:, None, None]
    both = [(one.double().numpy() - shift) / scale for one in (picture, other)]
    total = 0.0
    for index, (number, stride, padding) in enumerate(
        ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))
    ):
        kernels = alexnet[f"features.{number}.weight"].double().numpy()
        bias = alexnet[f"features.{number}.bias"].double().numpy()
        if index in (1, 2):
            both = [pooled(one) for one in both]
        both = [np.maximum(convolved(one, kernels, bias, stride, padding), 0) for one in both]
        unit = [one / (np.sqrt((one**2).sum(0)) + 1e-10) for one in both]
        head = heads[f"lin{index}.model.1.weight"].double().numpy().reshape(-1, 1, 1)
        total += ((unit[0] - unit[1]) ** 2 * head).sum(0).mean()
    return total


def test_lpips_is_that_of_a_second_implementation(files, frames):
    network = lpips.load_lpips(*files)
    predicted, true = frames
    alexnet, heads = (torch.load(file, weights_only=True) for file in files)
    for given, inputs in (("signed", lambda x: x), ("unit", lambda x: (x + 1) / 2)):
        found = network(predicted, true, given)
        expected = [
            by_hand(inputs(one), inputs(other), alexnet, heads)
            for one, other in zip(predicted, true, strict=True)
        ]
        assert min(expected) > 0.01
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4)
    assert not torch.allclose(network(predicted, true, "unit"), network(predicted, true), rtol=0.01)


def test_equal_frames_have_no_distance_and_chunks_change_nothing(files, frames, monkeypatch):
    network = lpips.load_lpips(*files)
    predicted, true = frames
    assert network(true, true).tolist() == [0.0, 0.0]
    whole = network(predicted[None], true[None])
    assert whole.shape == (1, 2)
    monkeypatch.setattr(lpips, "NUM_AT_ONCE", 1)
    torch.testing.assert_close(network(predicted[None], true[None]), whole)


def test_smallest_frame(files):
    network = lpips.load_lpips(*files)
    assert network(torch.zeros(1, 3, 31, 31), torch.ones(1, 3, 31, 31)).item() > 0
    with pytest.raises(ValueError, match="at least 31x31, got 30x31"):
        network(torch.zeros(1, 3, 30, 31), torch.ones(1, 3, 30, 31))


def test_the_heads_of_torchmetrics_are_the_published_ones(files):
    found = weights.check_weights(weights.shipped_heads(), weights.LPIPS_HEADS)
    assert found == weights.LPIPS_HEADS.sha256
    network = lpips.load_lpips(files[0], weights.shipped_heads())
    assert all((head >= 0).all() and head.any() for head in network.heads)


def test_without_torchmetrics_the_heads_must_be_named(monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="torchmetrics and lpips.*give its path by --lpips-heads"):
        weights.check_weights(weights.shipped_heads(), weights.LPIPS_HEADS)


def test_a_file_is_told_by_its_hash(files, tmp_path):
    digest = hashlib.sha256(open(files[0], "rb").read()).hexdigest()
    with pytest.raises(ValueError, match=f"has SHA-256 {digest}, needed .* begins with 7be5be79"):
        weights.check_weights(files[0], weights.ALEXNET)
    for stated in (digest, digest[:8]):
        assert weights.check_weights(files[0], weights.ALEXNET, stated) == digest
    with pytest.raises(ValueError, match=f"If this is the file .* --i3d-sha256 {digest}"):
        weights.check_weights(files[0], weights.I3D_STYLEGAN_V)
    with pytest.raises(ValueError, match="--i3d-sha256 must be 8 to 64 digits of 0-9a-f, got 'x'"):
        weights.check_weights(files[0], weights.I3D_STYLEGAN_V, "x")
    with pytest.raises(ValueError, match="download.pytorch.org.*: give its path by --alexnet"):
        weights.check_weights("", weights.ALEXNET)
    with pytest.raises(FileNotFoundError, match="nowhere.pth: no such file; needed weights of Al"):
        weights.check_weights(str(tmp_path / "nowhere.pth"), weights.ALEXNET)


def test_files_that_hold_something_else_are_refused(files, tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="text.pth cannot be read as a state dict: it is damaged"):
        lpips.load_lpips(str(tmp_path / "text.pth"), files[1])
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds no state dict but list"):
        lpips.load_lpips(str(tmp_path / "list.pth"), files[1])
    with pytest.raises(ValueError, match=r"heads.pth: missing \['features.0.bias'"):
        lpips.load_lpips(files[1], files[1])
    state = torch.load(files[0], weights_only=True) | {"features.3.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"features.3.bias must be \[192\] in floating point, got \[5\]"
    ):
        lpips.load_lpips(str(tmp_path / "other.pth"), files[1])
