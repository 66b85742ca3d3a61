"""Products in 8 bits: exact sums of rounded numbers, frame by frame; refused where not known."""

import pytest
import torch
from torch.nn import functional

from scd.bench.case import Case
from scd.common.runtime import INT8_INSTRUCTIONS, choose_stream_precision, cpu_flags
from scd.engine import int8
from scd.engine.int8 import Int8Linear, quantised, rounded_by_channel
from scd.engine.open import open_engine
from tests.engine.test_wan_engine import MODELS, stream
from tests.tiny import tiny_separable

CPU = torch.device("cpu")
can = pytest.mark.skipif(
    not any(flag in cpu_flags() for flag in INT8_INSTRUCTIONS), reason="a CPU without VNNI"
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
@pytest.mark.parametrize("at_once", [2**19, 70])
def test_numbers_are_rounded_to_the_nearest_step(shift, dtype, at_once, monkeypatch):
    monkeypatch.setattr(int8, "SCRATCH", at_once)
    x = (drawn(50, 30) + shift).to(dtype)
    before = x.clone()
    levels, scale, zero = quantised(x)
    assert torch.equal(x, before) and levels.dtype == torch.uint8 and 0 <= zero <= 255
    back = scale * (levels.float() - zero)
    assert (back - x.float()).abs().max() <= scale * 0.501 + 1e-6
    span = max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
    assert scale == pytest.approx(span / 254)
    # Both ends of the range keep their place wherever zero falls between two steps.
    ends = [torch.tensor([[-part, 1.0 - part, 0.0]]) for part in torch.linspace(0, 1, 999).tolist()]
    for odd in (torch.zeros(2, 3), torch.full((2, 3), -4.0), torch.full((1, 1), 1e-30), *ends):
        levels, scale, zero = quantised(odd)
        assert 0 <= zero <= 255
        torch.testing.assert_close(scale * (levels.float() - zero), odd, atol=0.51 * scale, rtol=0)


@can
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 24, 40), (17, 640, 512)])
def test_products_are_those_of_the_rounded_numbers(size, dtype, activation):
    rows, inner, outer = size
    weight, bias, x = drawn(outer, inner, seed=1), drawn(outer, seed=2), drawn(2, rows, inner)
    weight[3], x[1] = 0, 7 * x[1]
    linear = Int8Linear(weight.to(dtype), bias.to(dtype), rows, activation)
    found = linear(x.to(dtype))
    assert found.dtype == dtype
    whole, scales = rounded_by_channel(weight.to(dtype))
    twin = []
    for frame in x.to(dtype):
        levels, scale, zero = quantised(frame)
        exact = (levels.double() - zero) * scale @ (whole.double() * scales[:, None].double()).t()
        exact = exact + bias.to(dtype).double()
        gelu = functional.gelu(exact, approximate="tanh")
        twin.append(gelu if activation == "gelu" else exact)
    rtol = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), torch.stack(twin), atol=rtol, rtol=rtol)
    # What others share the call changes no digit of a frame.
    assert torch.equal(linear(x[1:].to(dtype)), found[1:])
    plain = functional.linear(x, weight, bias)
    plain = functional.gelu(plain, approximate="tanh") if activation == "gelu" else plain
    assert (found.float() - plain).norm() < 0.02 * plain.norm()


@can
@pytest.mark.parametrize("name", ["dense", "dense, in blocks", "separable"])
def test_frames_are_near_those_of_the_model(name):
    model = MODELS[name]()
    plain, found = stream(open_engine(model)), stream(open_engine(model, "fast", "int8"))
    assert 0 < (found - plain).norm() < 0.1 * plain.norm()
    assert next(model.parameters()).dtype == torch.float32


def test_int8_is_refused_by_name_where_it_is_not(monkeypatch):
    with pytest.raises(ValueError, match="fast engine of Wan models: give bf16"):
        open_engine(tiny_separable(), "fast", "int8")
    with pytest.raises(ValueError, match="fast engine of Wan models: give bf16"):
        open_engine(MODELS["dense"](), "plain", "int8")
    with pytest.raises(ValueError, match="fast engine of Wan models"):
        Case(model="toy", engine="fast", precision="int8")
    with pytest.raises(ValueError, match="int8 needs a CPU with VNNI.*the device is cuda"):
        choose_stream_precision("int8", torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    with pytest.raises(ValueError, match="this one has none: give bf16"):
        open_engine(MODELS["dense"](), "fast", "int8")
