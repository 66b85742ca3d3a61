"""The dense baseline reproduces the golden tensors of FAR: outputs to 2e-5, gradients to 2e-6."""

import pytest
import torch

from scd.convert.reference import ReferenceConfig, our_names, read_reference
from scd.data.clip import Conditions
from scd.models.attention import (
    DistanceBias,
    FrameCausal,
    dense_bias,
    dense_mask,
    frame_positions,
    rotary_table,
)
from scd.models.config import CacheConfig, SamplingConfig
from scd.models.embed import ticks_of, time_sinusoids
from scd.models.flow import guided, schedule, solve
from scd.objectives.denoise import velocity_loss
from tests.reference import cases, grid_of, load_case, load_tables

ATOL = 2e-5
GRADIENT_ATOL = 2e-6
SINUSOID_ATOL = 2e-5 + 1000 * 2**-24
"""The last bit of a frequency is the processor's own, and a thousand ticks raise it: the tables are
met to the bit with MKL_CBWR=COMPATIBLE, and on other processors without it."""


def close(ours, theirs, atol=ATOL):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


class Golden:
    """One case: its model, its tensors, and its conventions turned into ours."""

    def __init__(self, name):
        self.case, self.data, state = load_case("dense", name)
        config = self.case["config"]
        latents = self.data.get("latents", self.data.get("init_latents"))
        self.model = read_reference(
            state,
            ReferenceConfig(
                channels=latents.shape[2],
                height=latents.shape[3],
                width=latents.shape[4],
                rotary_axes=tuple(config["axes_dims_rope"]),
                distance_bias=float(config["slope_scale"]),
                cache=CacheConfig(window=64, num_sinks=0),
            ),
        )

    def conditions(self):
        """Turn ids, whose last is the null condition, into ours."""
        spec = self.model.config.conditions
        labels = self.data.get("label")
        actions = self.data.get("action_used", self.data.get("action"))
        if spec.num_labels:
            hidden = labels == spec.num_labels
            return Conditions(labels=labels.masked_fill(hidden, 0), null_labels=hidden)
        if not spec.num_actions:
            return Conditions()
        hidden = actions == spec.num_actions
        return Conditions(actions=actions.masked_fill(hidden, 0), null_actions=hidden)


def times(ticks):
    """Ticks of 1000, or -1, to our times; float64, because float32 loses 3e-5 ticks."""
    return ticks.double() / 1000


@pytest.mark.parametrize("name", cases("dense", "forward_train"))
def test_training_forward(name):
    golden = Golden(name)
    data, model = golden.data, golden.model
    seen = {}

    def keep(key):
        def hook(module, inputs, output):
            seen[key] = output

        return hook

    model.embed_frame.register_forward_hook(keep("debug.x_embed"))
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"debug.block{layer}"))
    velocity = model(
        None,
        data["noisy_latents"][:, None],
        times(data["timestep"])[:, None],
        golden.conditions(),
    )
    close(velocity[:, 0, -data["pred"].shape[1] :], data["pred"])
    compared = [key for key in seen if key in data]
    for key in compared:
        close(seen[key].flatten(1, 2), data[key])
    # Some cases store no activations at all.
    stores_some = any(key.startswith("debug.") for key in data)
    assert len(compared) > len(model.blocks) or not stores_some


@pytest.mark.parametrize("name", cases("dense", "generate"))
@torch.no_grad()
def test_generation(name):
    golden = Golden(name)
    model, data, case = golden.model, golden.data, golden.case
    is_guided = case["guidance_scale"] > 1
    given = data["context_sequence"] * 2 - 1 if case["context_frames"] else None
    num_given = case["context_frames"]
    frame_times = schedule(
        SamplingConfig(num_steps=case["num_inference_steps"], schedule="reference")
    )
    close(frame_times.float(), data["sigmas"])
    conditions = golden.conditions()
    batch = data["init_latents"].shape[0] * (1 + is_guided)
    if is_guided:
        conditions = conditions.with_null_branch()
    begin = given if given is None or not is_guided else torch.cat([given, given])
    state = model.begin(begin, conditions.frames(0, num_given), batch)
    finished = []
    for index in range(case["rollout"]):
        now = conditions.frames(num_given + index, num_given + index + 1)
        context = model.context(state, now)
        outputs = []

        def velocity(noisy, time, context=context, outputs=outputs):
            times = torch.full((noisy.shape[0],), time, dtype=torch.float64)
            outputs.append(model.velocity(context, noisy, times))
            return outputs[-1]

        field = guided(velocity, case["guidance_scale"] if is_guided else None)
        latent = solve(field, data["init_latents"][:, index], frame_times.tolist())
        for step, output in enumerate(outputs):
            close(output, data["model_out"][index, step])
        close(latent, data["latents_out"][:, index])
        finished.append(latent)
        if "call_log" in case:
            cached = case["call_log"]["cached_tokens_after_each_call"]
            tokens = state.cache.num_frames * model.shape.num_tokens
            assert tokens == cached[index * case["num_inference_steps"]]
        model.observe(state, torch.cat([latent, latent]) if is_guided else latent, now)
    samples = torch.stack(finished, dim=1)
    if given is not None:
        samples = torch.cat([given, samples], dim=1)
    close((samples / 2 + 0.5).clamp(0, 1), data["samples"])


@pytest.mark.parametrize("name", cases("dense", "train_step"))
def test_training_step(name):
    golden = Golden(name)
    data, model, case = golden.data, golden.model, golden.case
    num_loss = case.get("loss_frames", data["pred"].shape[1])
    noisy, time = data["noisy_latents"], times(data["timestep"])
    velocity = model(None, noisy[:, None], time[:, None], golden.conditions())
    close(velocity[:, 0, -data["pred"].shape[1] :], data["pred"])
    first = case.get("first_frame", 0)
    latents = data["latents"][:, first : first + noisy.shape[1]]
    target = data["noise"][:, -latents.shape[1] :] - latents
    given = data["context_mask"].bool()
    loss = velocity_loss(
        velocity[:, :, -num_loss:], target[:, None, -num_loss:], given[:, None, -num_loss:]
    )
    close(loss, data["loss"].squeeze())
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {
        key.removeprefix("grad."): value for key, value in data.items() if key.startswith("grad.")
    }
    assert gradients
    for key, theirs in our_names(gradients).items():
        close(parameters[key].grad, theirs, GRADIENT_ATOL)
    norms = {key: torch.tensor(value) for key, value in case["grad_norms"].items()}
    for key, norm in our_names(norms).items():
        close(parameters[key].grad.norm(), norm, GRADIENT_ATOL)


def test_tables():
    tables = load_tables("dense/far_tables.safetensors")
    case, _, state = load_case("dense", "far_tables")
    config = case["config"]
    grid = next(key for key in tables if key.startswith("ids_"))
    positions = frame_positions(*grid_of(grid))
    assert torch.equal(positions, tables[grid].long())
    cosine, sine = rotary_table(positions, tuple(config["axes_dims_rope"]), 1e4)
    close(cosine.repeat_interleave(2, -1), tables["rope_cos"])
    close(sine.repeat_interleave(2, -1), tables["rope_sin"])
    ticks = ticks_of(times(tables["time_values"]))
    close(time_sinusoids(ticks, 128), tables["time_proj"], SINUSOID_ATOL)
    model = read_reference(
        state,
        ReferenceConfig(
            channels=config["in_channels"],
            height=4,
            width=4,
            cache=CacheConfig(window=8, num_sinks=0),
        ),
    )
    close(model.embed_time(times(tables["time_values"])[None])[0], tables["temb"])
    visible = dense_mask(FrameCausal(num_frames=3, tokens_per_frame=2), torch.device("cpu"))
    assert torch.equal(visible, tables["mask_3frames_2tok"][0] == 0)


def test_distance_bias_falls_with_distance():
    frames = (0, 1, 2)
    described = DistanceBias(slope=0.25, query_frames=frames, key_frames=frames, tokens_per_frame=2)
    bias = dense_bias(described, torch.device("cpu"))
    assert bias.shape == (6, 6)
    assert bias[4, 0] == -0.5 and bias[4, 2] == -0.25 and bias[4, 4] == 0
