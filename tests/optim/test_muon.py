"""Muon on kernels of convolutions: what PyTorch's does to the same numbers as a matrix."""

import copy

import pytest
import torch
from torch import nn

from scd.optim.config import OptimConfig
from scd.optim.muon import KernelMuon, kernels, muon
from scd.optim.optim import build_optimizers, parameter_groups, set_lr


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
        )


def group(weights, **changes):
    return {"params": weights, "lr": 0.01, "base_lr": 0.01, "weight_decay": 0.1} | changes


def gradient(weight, step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(weight.shape, generator=generator)


def test_a_kernel_moves_as_the_matrix_of_its_rows():
    kernel = nn.Parameter(torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1)))
    matrix = nn.Parameter(kernel.detach().clone().flatten(1))
    ours, theirs = muon([group([kernel])]), muon([group([matrix])])
    assert isinstance(ours, KernelMuon) and isinstance(theirs, torch.optim.Muon)
    place, before = kernel.data_ptr(), kernel.detach().clone()
    for step in range(3):
        kernel.grad = gradient(kernel, step)
        matrix.grad = gradient(kernel, step).flatten(1)
        for optimizer in (ours, theirs):
            set_lr([optimizer], 1 / (1 + step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert kernel.grad is None
        assert torch.equal(kernel.flatten(1), matrix)
    assert kernel.data_ptr() == place and not torch.equal(kernel, before)


def test_without_a_gradient_a_kernel_stays():
    first, second = nn.Parameter(torch.ones(4, 2, 3, 3)), nn.Parameter(torch.ones(4, 2, 1, 1))
    optimizer = KernelMuon([group([first]), group([second], lr=0.5)])
    first.grad = gradient(first, 0)
    optimizer.step()
    assert not torch.equal(first, torch.ones_like(first))
    assert torch.equal(second, torch.ones_like(second))
    assert [found["lr"] for found in optimizer.param_groups] == [0.01, 0.5]


def test_a_kept_state_goes_on():
    kernel = nn.Parameter(torch.ones(4, 2, 3, 3))
    optimizer = KernelMuon([group([kernel])])
    kernel.grad = gradient(kernel, 0)
    optimizer.step()
    twin = nn.Parameter(kernel.detach().clone())
    other = KernelMuon([group([twin])])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for weight, one in ((kernel, optimizer), (twin, other)):
        weight.grad = gradient(weight, 1)
        one.step()
    assert torch.equal(kernel, twin)


def test_kernels_over_time_are_matrices_too():
    kernel, matrix = (nn.Parameter(torch.ones(4, 2, 3, 3, 3)), nn.Parameter(torch.ones(4, 54)))
    one, other = KernelMuon([group([kernel])]), KernelMuon([group([matrix])])
    kernel.grad = gradient(kernel, 0)
    matrix.grad = kernel.grad.flatten(1)
    one.step()
    other.step()
    assert torch.equal(kernel.flatten(1), matrix) and not torch.equal(matrix, torch.ones(4, 54))
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 3, groups=4))
    assert [id(weight) for weight in kernels(network)] == [id(network[0].weight)]


def test_only_what_mixes_all_channels_is_moved_by_muon():
    model = network()
    config = OptimConfig(optimizer="muon", decoder_lr_ratio=1.0)
    groups = parameter_groups(model, [], config, kernels(model))
    (moved,) = (one for one in groups if one.optimizer == "muon")
    assert list(map(id, moved.parameters)) == [id(model[0].weight), id(model[2].weight)]
    others = [weight for one in groups if one.optimizer == "adamw" for weight in one.parameters]
    assert {id(weight) for weight in others} == {
        id(weight) for weight in (model[1].weight, *(layer.bias for layer in model))
    }
    assert [type(one) for one in build_optimizers(groups, config)] == [
        torch.optim.AdamW,
        KernelMuon,
    ]


def test_a_copy_is_noticed():
    # Rows of a weight laid out channels last are no view of it.
    weight = nn.Parameter(torch.ones(4, 2, 3, 3).to(memory_format=torch.channels_last))
    with pytest.raises(AssertionError, match="a copy would move"):
        KernelMuon([group([weight])])
