"""The separable model reproduces the golden tensors of the paper's release, to 2e-5.

The release starts at frame 1, keeps time on 0..1000 with -1 for clean, and writes the null action
as one more id. Every case in the folder is run, so another set of the same form can be put there.
"""

import pytest
import torch

from scd.convert.reference import ReferenceConfig, our_names, read_reference
from scd.data.clip import Conditions
from scd.models.attention import FrameCausal, dense_mask, frame_positions, rotary_table, rotate
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


def separable_cases(kind):
    return cases("", kind)


class Golden:
    """One case: its model, its tensors, and its conventions turned into ours."""

    def __init__(self, name):
        self.case, self.data, state = load_case("", name)
        encoder, decoder = self.case["config"]["encoder"], self.case["config"]["decoder"]
        latents = self.data.get("latents", self.data.get("init_latents"))
        self.model = read_reference(
            state,
            ReferenceConfig(
                channels=latents.shape[2],
                height=latents.shape[3],
                width=latents.shape[4],
                join="add" if decoder["decoder_input_combine"] == "add" else "token_concat",
                rotary_axes=tuple(encoder["axes_dims_rope"]),
                distance_bias=float(encoder["slope_scale"]),
                cache=CacheConfig(window=64, num_sinks=0),
            ),
        )

    def conditions(self, actions=None):
        """Turn ids, whose last is the null condition, into ours."""
        spec = self.model.config.conditions
        labels = self.data.get("label")
        actions = self.actions() if actions is None else actions
        if spec.num_labels:
            hidden = labels == spec.num_labels
            return Conditions(labels=labels.masked_fill(hidden, 0), null_labels=hidden)
        if not spec.num_actions:
            return Conditions()
        hidden = actions == spec.num_actions
        return Conditions(actions=actions.masked_fill(hidden, 0), null_actions=hidden)

    def actions(self):
        """Ids of the frames that were used, None without actions."""
        return self.data.get("action_used", self.data.get("action"))

    def shifted(self):
        """Actions one frame earlier, the last repeated, as the release's encoder gets them."""
        actions = self.actions()
        return None if actions is None else torch.cat([actions[:, 1:], actions[:, -1:]], dim=1)

    def encoder_output(self):
        """All rows of the release's encoder.

        One more frame makes ours read all of theirs: nobody sees its pixels, and its action is the
        repeated one.
        """
        latents, actions = self.data["latents"], self.actions()
        longer = torch.cat([latents, latents[:, -1:]], dim=1)
        if actions is not None:
            actions = torch.cat([actions, actions[:, -1:]], dim=1)
        return self.model.encoder(longer, self.conditions(actions)).tokens


def times(ticks):
    """Ticks of 1000, or -1, to our times; float64, because float32 loses 3e-5 ticks."""
    return ticks.double() / 1000


@pytest.mark.parametrize("name", separable_cases("forward_train"))
def test_training_forward(name):
    golden = Golden(name)
    model, data = golden.model, golden.data
    latents, noisy, time = data["latents"], data["noisy_latents"], times(data["timestep"])
    num_noisy = data["pred"].shape[1]
    if "encoder_output" in data:
        close(golden.encoder_output().flatten(1, 2), data["encoder_output"])

    # The release's first decoder draw sees the action after its own: its defect, fed to us.
    first_draw = golden.conditions(golden.shifted())
    encoded = model.encoder(latents, golden.conditions()).last(num_noisy)
    noisy_frames, noisy_times = noisy[:, -num_noisy:], time[:, -num_noisy:]

    def decode(context, conditions):
        frames = conditions.frames(latents.shape[1] - num_noisy, None)
        velocity = model.decoder.denoise(
            model.decoder.prepare(context.tokens.flatten(0, 1), frames.split(num_noisy)),
            noisy_frames.flatten(0, 1),
            noisy_times.flatten(0, 1),
        )
        return velocity.unflatten(0, (-1, num_noisy))

    close(decode(encoded, first_draw), data["pred"])
    if "pred_encoder_noisy" in data:
        on_noisy = model.encoder(noisy, golden.conditions()).last(num_noisy)
        close(decode(on_noisy, first_draw), data["pred_encoder_noisy"])
    second_draw = decode(encoded, golden.conditions())
    if "pred_reuse_encoder" in data:
        close(second_draw, data["pred_reuse_encoder"])
    # And through the one call that training makes.
    velocity = model(latents, noisy_frames[:, None], noisy_times[:, None], golden.conditions())
    close(velocity[:, 0], second_draw)


@pytest.mark.parametrize("name", separable_cases("forward_train"))
def test_every_block(name):
    golden = Golden(name)
    data = golden.data
    if not any(key.startswith("debug.") for key in data):
        pytest.skip(f"{name} stores no activations per block")
    seen = {}

    def keep(key):
        def hook(module, inputs, output):
            seen[key] = output

        return hook

    model = golden.model
    for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        stack.embed_frame.register_forward_hook(keep(f"debug.{side}.x_embed"))
        for layer, block in enumerate(stack.blocks):
            block.register_forward_hook(keep(f"debug.{side}.block{layer}"))
    latents = data["latents"]
    num_noisy = data["pred"].shape[1]
    context = model.encoder(latents, golden.conditions()).last(num_noisy)
    golden.encoder_output()
    model.decoder.denoise(
        model.decoder.prepare(
            context.tokens.flatten(0, 1),
            golden.conditions(golden.shifted())
            .frames(latents.shape[1] - num_noisy, None)
            .split(num_noisy),
        ),
        data["noisy_latents"][:, -num_noisy:].flatten(0, 1),
        times(data["timestep"])[:, -num_noisy:].flatten(0, 1),
    )
    compared = 0
    for key, ours in seen.items():
        if key not in data:
            continue
        theirs = data[key]
        ours = ours.reshape(theirs.shape[0], -1, theirs.shape[-1])
        if ours.shape[1] < theirs.shape[1]:
            # After the last block we do not compute the context's half.
            theirs = theirs[:, -ours.shape[1] :]
        close(ours, theirs)
        compared += 1
    assert compared >= 2 + len(model.encoder.blocks) + len(model.decoder.blocks)


def stream(golden, kind):
    """Roll a generation case out through the streaming interface, as `Rollout.step` does."""
    model, data, case = golden.model, golden.data, golden.case
    given = data["context_sequence"] * 2 - 1
    num_given, scale = given.shape[1], case["guidance_scale"]
    by_conditions = kind == "conditions"
    sampling = SamplingConfig(num_steps=case["num_inference_steps"], schedule="reference")
    frame_times = schedule(sampling)
    close(frame_times.float(), data["sigmas"])
    conditions = golden.conditions()
    if by_conditions:
        conditions = conditions.with_null_branch()
    begin = torch.cat([given, given]) if by_conditions else given
    state = model.begin(begin, conditions.frames(0, num_given))
    finished = []
    for index in range(case["rollout"]):
        frame = num_given + index
        now = conditions.frames(frame, frame + 1)
        context = model.context(state, now)
        num_tokens = context.encoded.tokens.shape[2]
        if kind == "context_noise":
            noise = data[f"encoder_noise_{index}"][:, None, -num_tokens:]
            strength = max(case["config"]["encoder"]["noise_strength"], 0.05)
            context = model.with_noisy_branch(context, strength, noise)
        if "encoder_out_frame0" in data:
            first, later = data["encoder_out_frame0"], data.get("encoder_out_later")
            stored = first if index == 0 else later[index - 1]
            close(context.encoded.tokens[:, 0], stored[:, -num_tokens:])
        outputs = []

        def velocity(noisy, time, context=context, outputs=outputs):
            times = torch.full((noisy.shape[0],), time, dtype=torch.float64)
            outputs.append(model.velocity(context, noisy, times))
            return outputs[-1]

        field = guided(velocity, None if kind == "none" else scale)
        latent = solve(field, data["init_latents"][:, index], frame_times.tolist())
        for step, output in enumerate(outputs):
            close(output, data["model_out"][index, step])
        close(latent, data["latents_out"][:, index])
        finished.append(latent)
        model.observe(state, torch.cat([latent, latent]) if by_conditions else latent, now)
    samples = torch.cat([given, torch.stack(finished, dim=1)], dim=1) / 2 + 0.5
    close(samples.clamp(0, 1), data["samples"])


@pytest.mark.parametrize("name", separable_cases("generate"))
@torch.no_grad()
def test_generation(name):
    golden = Golden(name)
    kind = "none"
    if golden.case["guidance_scale"] > 1:
        kind = "context_noise" if golden.case["cfg_type"] == "decoder" else "conditions"
    stream(golden, kind)


@pytest.mark.parametrize("name", separable_cases("train_step"))
def test_training_step(name):
    golden = Golden(name)
    model, data, case = golden.model, golden.data, golden.case
    start = case.get("first_frame", 0)
    latents = data["latents"][:, start : start + case.get("frames_used", data["latents"].shape[1])]
    num_draws = case["decoder_multi_batch"]
    num_noisy = data["pass0.pred"].shape[1]
    # The release encodes the first draw's noisy frames and uses that for all draws.
    context = model.encoder(data["pass0.noisy_latents"], golden.conditions()).last(num_noisy)
    losses = []
    for draw in range(num_draws):
        stored = {
            name: data[f"pass{draw}.{name}"][:, -num_noisy:]
            for name in ("noisy_latents", "timestep", "noise", "context_mask")
        }
        conditions = golden.conditions(golden.shifted() if draw == 0 else None)
        conditions = conditions.frames(latents.shape[1] - num_noisy, None).split(num_noisy)
        velocity = model.decoder.denoise(
            model.decoder.prepare(context.tokens.flatten(0, 1), conditions),
            stored["noisy_latents"].flatten(0, 1),
            times(stored["timestep"]).flatten(0, 1),
        ).unflatten(0, (-1, num_noisy))
        close(velocity, data[f"pass{draw}.pred"])
        target = stored["noise"] - latents[:, -num_noisy:]
        given = stored["context_mask"].bool()
        losses.append(velocity_loss(velocity[:, None], target[:, None], given[:, None]))
        close(losses[-1], data[f"pass{draw}.loss"].squeeze())
    total = torch.stack(losses).mean()
    close(total, data["total_loss"].squeeze())
    total.backward()
    gradients = {
        key.removeprefix("grad."): value for key, value in data.items() if key.startswith("grad.")
    }
    parameters = dict(model.named_parameters())
    assert gradients
    for key, theirs in our_names(gradients).items():
        close(parameters[key].grad, theirs, GRADIENT_ATOL)
    norms = {key: torch.tensor(value) for key, value in case["grad_norms"].items()}
    for key, norm in our_names(norms).items():
        close(parameters[key].grad.norm(), norm, GRADIENT_ATOL)


def test_tables():
    tables = load_tables("tables.safetensors")
    grid = next(key for key in tables if key.startswith("ids_"))
    positions = frame_positions(*grid_of(grid))
    assert torch.equal(positions, tables[grid].long())
    head_dim = tables["rope_cos"].shape[1]
    axes = (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8)
    cosine, sine = rotary_table(positions, axes, 1e4)
    # They store each angle twice, once for either entry of its pair.
    close(cosine.repeat_interleave(2, -1), tables["rope_cos"])
    close(sine.repeat_interleave(2, -1), tables["rope_sin"])
    close(rotate(tables["rope_x"], (cosine, sine)), tables["rope_x_rotated"])
    ticks = ticks_of(times(tables["time_values"]))
    close(time_sinusoids(ticks, 128), tables["time_proj"], SINUSOID_ATOL)
    mask = tables["mask_3frames_2tok"][0]
    visible = FrameCausal(num_frames=3, tokens_per_frame=2)
    assert torch.equal(dense_mask(visible, torch.device("cpu")), mask == 0)
    for num_steps in (1, 2, 4, 10, 50):
        grid = schedule(SamplingConfig(num_steps=num_steps, schedule="reference"))
        close(grid.float(), tables[f"sched{num_steps}_sigma"])
        close((1000 * grid[:-1]).float(), tables[f"sched{num_steps}_t"])
