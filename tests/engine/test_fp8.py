"""Products of floating-point numbers of 8 bits: those of the rounded numbers, token by token.

On a CPU, where PyTorch has them too; on a GPU they are measured by runs/wan_gpu.sh.
"""

import pytest
import torch
from torch.nn import functional

from scd.bench.case import Case
from scd.common import runtime
from scd.common.runtime import choose_stream_precision
from scd.engine.fp8 import LARGEST, Fp8Linear, rounded_by_row
from scd.engine.open import open_engine
from scd.engine.wan import FastWanDense, FastWanSeparable
from scd.models.wan.dense import WanDiffuser
from tests.engine.test_wan_engine import MODELS, stream

CPU = torch.device("cpu")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_are_rounded_to_four_digits_of_two():
    x = 100 * drawn(5, 64) * torch.tensor([1e-20, 1e-3, 1.0, 1e3, 0.0])[:, None]
    rounded, scale = rounded_by_row(x)
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
    back = rounded.float() * scale
    assert torch.isfinite(back).all() and not back[4].any()
    # Half of the last of three digits behind the first, or of the smallest number there is.
    room = torch.maximum(x.abs() / 16, scale * 2**-10)
    assert ((back - x).abs() <= 1.001 * room).all()
    assert rounded.float().abs().amax(1)[:4].eq(LARGEST).all()


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("size", [(3, 24, 40), (17, 640, 512)])
def test_products_are_those_of_the_rounded_numbers(size, activation):
    rows, inner, outer = size
    weight, bias, x = drawn(outer, inner, seed=1), drawn(outer, seed=2), drawn(2, rows, inner)
    weight[3], x[1] = 0, 7 * x[1]
    weight, bias, x = (one.bfloat16() for one in (weight, bias, x))
    linear = Fp8Linear(weight, bias, rows, activation)
    found = linear(x)
    assert found.dtype == torch.bfloat16 and found.shape == (2, rows, outer)

    def back(rows):
        rounded, scale = rounded_by_row(rows)
        return rounded.double() * scale.double()

    twin = back(x.flatten(0, 1)) @ back(weight).t() + bias.double()
    twin = functional.gelu(twin, approximate="tanh") if activation == "gelu" else twin
    torch.testing.assert_close(found.double().flatten(0, 1), twin, atol=2e-2, rtol=2e-2)
    # What others share the call changes no digit of a frame.
    assert torch.equal(linear(x[1:]), found[1:])
    plain = functional.linear(x.float(), weight.float(), bias.float())
    plain = functional.gelu(plain, approximate="tanh") if activation == "gelu" else plain
    assert (found.float() - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("name", ["dense", "dense, in blocks", "separable"])
def test_frames_are_near_those_of_the_model(name):
    model = MODELS[name]()
    plain = stream(open_engine(model))
    kind = FastWanDense if isinstance(model, WanDiffuser) else FastWanSeparable
    found = stream(kind(model.to(torch.bfloat16), maps=Fp8Linear))
    assert 0 < (found - plain).norm() < 0.2 * plain.norm()


def test_fp8_is_refused_by_name_where_it_is_not(monkeypatch):
    with pytest.raises(ValueError, match=r"fp8 needs a GPU of .* 8.9 or more, the device is cpu: "):
        open_engine(MODELS["dense"](), "fast", "fp8")
    with pytest.raises(ValueError, match="fp8 is for the fast engine of Wan models"):
        Case(model="toy", engine="fast", precision="fp8")
    with pytest.raises(ValueError, match="the device is cuda: give fp8 or bf16"):
        choose_stream_precision("int8", torch.device("cuda"))
    for capability, can in (((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        # What a GPU of that kind says of itself; there is none here.
        monkeypatch.setattr(runtime.torch.cuda, "get_device_capability", lambda _, c=capability: c)
        if can:
            assert choose_stream_precision("fp8", torch.device("cuda")) == "fp8"
        else:
            with pytest.raises(ValueError, match="the device is cuda, of 8.6: give bf16"):
                choose_stream_precision("fp8", torch.device("cuda"))
