"""Goldens of the causal Wan model: Self-Forcing's streaming and training passes, its tables."""

import json

import pytest
import torch

from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.engine.layers import by_halves
from scd.engine.open import open_engine
from scd.models.config import ENGINES, CacheConfig, FrameShape
from scd.models.flow import (
    SMALLEST_TIME,
    clean_from_velocity,
    interpolate,
    velocity_between,
    velocity_from_clean,
)
from scd.models.wan.config import WanBlockConfig, WanConfig
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.source import from_original, to_original
from scd.models.wan.timesteps import nearest_times, time_table, training_weights, warped_times
from scd.models.wan.transformer import time_sinusoids
from tests.reference import cases, load_case, load_tables, reference_folder

ATOL, GRADIENT_ATOL = 2e-5, 2e-6


def close(found, expected, atol=ATOL):
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=0, atol=atol)


def config_of(case, **settings):
    theirs, (height, width) = case["config"], case["latent_hw"]
    return WanConfig(
        shape=FrameShape(
            channels=theirs["in_dim"],
            height=height,
            width=width,
            patch_size=theirs["patch_size"][1],
        ),
        block=WanBlockConfig(
            num_heads=theirs["num_heads"],
            head_dim=theirs["dim"] // theirs["num_heads"],
            ffn_dim=theirs["ffn_dim"],
            freq_dim=theirs["freq_dim"],
            norm_before_text=theirs["cross_attn_norm"],
            eps=theirs["eps"],
        ),
        num_layers=theirs["num_layers"],
        conditions=ConditionSpec(text_length=theirs["text_len"], text_dim=theirs["text_dim"]),
        **settings,
    )


def model_of(case, state, **settings):
    model = WanDiffuser(config_of(case, **settings))
    model.load_state_dict({from_original(name): tensor for name, tensor in state.items()})
    return model.eval()


@pytest.fixture(scope="module")
def training():
    return load_case("wan", cases("wan", "train")[0])


def stream_settings(case):
    theirs, size = case["model_kwargs"], case["num_frame_per_block"]
    window = theirs.get("local_attn_size", -1)
    total = case["frames"] + case["given"]
    cache = CacheConfig(
        window=window if window > 0 else total,
        num_sinks=theirs.get("sink_size", 0),
        rebase_sinks=False,
    )
    return {"cache": cache, "frames_per_block": size}


@torch.no_grad()
@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", cases("wan", "stream"))
def test_golden_stream(name, kind):
    case, data, state = load_case("wan", name)
    model = open_engine(model_of(case, state, **stream_settings(case)), kind)
    conditions, size = Conditions(text=data["prompt_embeds"]), case["num_frame_per_block"]
    given = data.get("initial_latent")
    stream = model.begin(given, conditions, data["noise"].shape[0])
    frames = [] if given is None else [given]
    times = warped_times(case["steps"])
    for number in range(case["frames"] // size):
        context = model.context(stream, conditions)
        noisy = data["noise"][:, number * size : (number + 1) * size]
        for step, time in enumerate(times):
            # Golden times are float32; the sinusoids show the rounding.
            now = data["call_time"][number, step, :, 0].double() / 1000
            close(now, torch.full_like(now, time), 1e-7)
            flow = model.velocity(context, noisy, now)
            close(flow, data["flow"][number, step])
            clean = clean_from_velocity(noisy, flow, now[:, None])
            if step < len(times) - 1:
                fresh = data["renoise"][number, step]
                noisy = (1 - times[step + 1]) * clean + times[step + 1] * fresh
        # The reference goes through float64 with a table rounded to float32.
        model.observe(stream, clean, conditions)
        frames.append(clean)
    close(torch.cat(frames, dim=1), data["latents_out"])
    held = stream.cache.num_frames * stream.cache.tokens_per_frame
    for layer in (0, 3):
        for name, memory in (("k", stream.cache.keys), ("v", stream.cache.values)):
            golden = data.get(f"final_cache.{layer}.{name}")
            if golden is not None and not stream.cache.num_evicted:
                if kind == "fast" and name == "k":
                    golden = by_halves(golden)
                close(memory[layer, :, :, :held].transpose(1, 2), golden)


@torch.no_grad()
def test_golden_given_frames():
    case, data, state = load_case("wan", "wan_stream_given")
    model = model_of(case, state, **stream_settings(case))
    conditions = Conditions(text=data["prompt_embeds"])
    stream = model.begin(None, conditions)
    for number in range(case["given"]):
        frame = data["initial_latent"][:, number]
        velocity = model.velocity(model.context(stream, conditions), frame, torch.zeros(1))
        close(velocity[:, None], data["given_flow"][number])
        model.observe(stream, frame, conditions)


def test_golden_teacher_forcing_and_its_gradients(training):
    case, data, state = training
    model = model_of(case, state)
    conditions = Conditions(text=data["prompt_embeds"])
    time = data["timestep"].double() / 1000
    flow = model(data["clean"], data["noisy"][:, None], time[:, None], conditions)[:, 0]
    close(flow, data["tf_flow"])
    table = time_table()
    close(data["noisy"] - nearest_times(time, table)[..., None, None, None] * flow, data["tf_x0"])
    weight = training_weights(time, table).float()
    close(weight, data["loss_weight"])
    target = velocity_between(data["clean"], data["noise"])
    loss = (weight * (flow - target).square().mean(dim=(2, 3, 4))).mean()
    close(loss, data["tf_loss"][0])
    check_gradients(model, loss, case, data)


def check_gradients(model, loss, case, data):
    loss.backward()
    weights = dict(model.named_parameters())
    for name, golden in data.items():
        if name.startswith("grad."):
            close(weights[from_original(name.removeprefix("grad."))].grad, golden, GRADIENT_ATOL)
    assert {to_original(name) for name in weights} == set(case["grad_norms"])
    for name, weight in weights.items():
        norm = case["grad_norms"][to_original(name)]
        assert float(weight.grad.norm()) == pytest.approx(norm, rel=1e-4, abs=2e-5), name


@torch.no_grad()
def test_golden_passes_without_gradient(training):
    case, data, state = training
    conditions = Conditions(text=data["prompt_embeds"])
    noisy, time = data["noisy"][:, None], data["timestep"].double()[:, None] / 1000
    augmented = model_of(case, state)(
        data["clean_aug"], noisy, time, conditions, clean_time=data["aug_t"].double() / 1000
    )
    close(augmented[:, 0], data["tf_aug_flow"])
    for name, settings in (
        ("causal_flow", {}),
        ("causal_local2_flow", {"num_local_frames": 2}),
        ("causal_block3_flow", {"frames_per_block": 3}),
    ):
        model = model_of(case, state, **settings)
        close(model(None, noisy, time, conditions)[:, 0], data[name])


def test_golden_bidirectional_pass_and_its_gradients():
    (name,) = cases("wan", "bidirectional")
    case, data, state = load_case("wan", name)
    model = model_of(case, state)
    time = data["timestep"].double() / 1000
    flow = model.bidirectional(data["noisy"], time, Conditions(text=data["prompt_embeds"]))
    close(flow, data["flow"])
    sigma = nearest_times(time, time_table())[..., None, None, None]
    close(data["noisy"] - sigma * flow, data["x0"])
    loss = (flow - velocity_between(data["clean"], data["noise"])).square().mean()
    close(loss, data["flow_loss"][0])
    check_gradients(model, loss, case, data)


def test_golden_times():
    data = load_tables("wan/wan_tables.safetensors")
    table = time_table()
    close(table, data["sigmas"])
    close(1000 * table, data["timesteps"], 1e-3)
    close(training_weights(table, table), data["training_weights"])
    close(time_table(8.0)[::50], data["sigmas_shift8_every50"])
    for end in ("", "_0"):
        steps = [step for step in data[f"warp_in{end}"].tolist() if step]
        golden = data[f"warp_out{end}"][: len(steps)].double() / 1000
        close(torch.tensor(warped_times(steps), dtype=torch.float64), golden, 1e-6)


def test_golden_conversions():
    data = load_tables("wan/wan_tables.safetensors")
    time = data["t"].double() / 1000
    sigma = nearest_times(time, time_table())
    close(sigma, data["sigma_used"])
    close(training_weights(time, time_table()), data["training_weight_t"])
    noisy = interpolate(data["x0"], data["noise"], sigma)
    close(noisy, data["add_noise"])
    flow = data["flow"]
    close(clean_from_velocity(noisy, flow, sigma), data["x0_from_flow"])
    # Ours divides by 0.05 at least.
    large = sigma >= SMALLEST_TIME
    close(velocity_from_clean(noisy, data["x0"], sigma)[large], data["flow_from_x0"][large])


def test_golden_embedded_times():
    data = load_tables("wan/wan_tables.safetensors")
    case, _, state = load_case("wan", cases("wan", "train")[0])
    time = data["time_values"].double() / 1000
    close(time_sinusoids(time, 128), data["time_sinusoid"], 1e-9)
    with torch.no_grad():
        embedding, modulation = model_of(case, state).condition_embedder.times(time[:, None])
    close(embedding[:, 0], data["time_e"])
    close(modulation[:, 0], data["time_e0"])


def test_golden_name_map():
    path = reference_folder() / "wan" / "wan_name_map.json"
    names = json.loads(path.read_text())["map"]
    assert {name: from_original(name) for name in names} == names
    assert {theirs: to_original(theirs) for theirs in names.values()} == {
        theirs: name for name, theirs in names.items()
    }
