"""Few-step students: consistency with a teacher's path, and plain regression at few times.

Both learn from recorded clips with the clips' own history, as in pre-training. Consistency: the
clean estimate must be the same along the teacher's path from noise to frame, so that one step from
anywhere reaches its end; it serves every number of steps. Regression: the best clean estimate at
each time of a schedule, the baseline. Matching the student's own rollouts:
`scd.objectives.distribution_matching`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from scd.data.clip import Batch, Conditions
from scd.models.base import Augmentation
from scd.models.build import Diffuser
from scd.models.config import EncoderNoise, SamplingConfig
from scd.models.embed import Field
from scd.models.flow import clean_from_velocity, guide, interpolate, schedule
from scd.objectives.config import ConsistencyConfig, RegressionConfig
from scd.objectives.denoise import Logs, Network, Objective, noisy_history

Path = Callable[[Tensor, Conditions, int, int, Tensor | None], Field]
"""A model's `field`, called with clean frames, their conditions, the number of noisy frames and of
draws, and what an encoder reads that needs noise of its own: many steps on one history."""

Autocast = Callable[..., AbstractContextManager[None]]
"""Makes a context in which networks run at the run's precision."""


def grid_of(config: ConsistencyConfig) -> list[float]:
    """Return the times on which the teacher's path is walked, from 1 down to 0."""
    kind = "uniform" if config.grid_shift == 1 else "shifted"
    return schedule(
        SamplingConfig(num_steps=config.num_grid_steps, schedule=kind, shift=config.grid_shift)
    ).tolist()


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One training example: frames at random times of a grid, with what they may know."""

    frames: Float[Tensor, "b r m c h w"]
    """Clean."""
    noise: Float[Tensor, "b r m c h w"]
    place: Int[Tensor, "b r m"]
    """Index of each frame's time in the grid; one for all frames of a block."""
    history: Float[Tensor, "b t c h w"]
    """Frames before, perhaps noisy."""
    conditions: Conditions
    """Of all t frames, perhaps hidden here and there."""
    encoder_noise: Float[Tensor, "b r2 m c h w"] | None = None
    """What an encoder reads in the place of the frames; None: nothing of its own."""

    def seen_by(self, network: Network, noisy: Tensor, time: Tensor) -> Tensor:
        """Return the velocity that a network gives noisy frames, after this history."""
        extra = {} if self.encoder_noise is None else {"noise": self.encoder_noise}
        return network(self.history, noisy, time, self.conditions, **extra)


def draw(
    batch: Batch,
    num_places: int,
    config: ConsistencyConfig | RegressionConfig,
    generator: torch.Generator,
    needs_first_frame: bool,
    frames_per_block: int = 1,
    encoder_noise: EncoderNoise = "none",
) -> Draw:
    """Draw places on a grid, noise, corrupted history and hidden conditions for some clips, and
    what an encoder of that kind reads."""
    clean, size = batch.frames, frames_per_block
    if clean.shape[1] <= needs_first_frame:
        raise ValueError(f"needed clips of 2 or more frames, got {clean.shape[1]}")
    if clean.shape[1] % size:
        raise ValueError(f"needed whole blocks of {size} frames, got {clean.shape[1]}")
    augment = Augmentation(generator=generator, condition_dropout=config.condition_dropout)
    frames = clean[:, None, int(needs_first_frame) :].expand(-1, config.num_draws, *[-1] * 4)
    blocks = (*frames.shape[:2], frames.shape[2] // size)
    place = torch.randint(num_places, blocks, generator=generator, device=generator.device)
    noise = augment.noise_like(frames)
    drawn = Draw(
        frames=frames,
        noise=noise,
        place=repeat(place.to(clean.device), "b r blocks -> b r (blocks size)", size=size),
        history=noisy_history(clean, config.history_noise, augment),
        conditions=augment.drop(batch.conditions),
        encoder_noise=noise if encoder_noise == "same" else None,
    )
    if encoder_noise == "fresh":
        # One pass of the encoder serves all draws.
        return replace(drawn, encoder_noise=augment.noise_like(frames[:, :1]))
    return drawn


@dataclass(frozen=True, kw_only=True)
class Consistency(Objective):
    """The mean pseudo-Huber distance between the student's clean estimate and that from further
    down the teacher's path."""

    config: ConsistencyConfig
    teacher: Path
    """Whose velocity is followed, guided if need be."""
    target: Network
    """The student's network without gradient, which jumps from there to the end; not called where
    the path has ended."""
    needs_first_frame: bool = False
    """Whether the model cannot denoise a first frame, which is then only given."""
    frames_per_block: int = 1
    """Frames that are denoised together and share their time."""
    encoder_noise: EncoderNoise = "none"
    """What noise the student's encoder reads; teacher and target read the same, since the path from
    noise to frame depends on it."""

    def loss(
        self, model: Network, batch: Batch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Logs]:
        """Return the loss of clips of latents."""
        config = self.config
        grid = torch.tensor(grid_of(config), device=batch.frames.device)
        drawn = draw(
            batch,
            config.num_grid_steps,
            config,
            generator,
            self.needs_first_frame,
            self.frames_per_block,
            self.encoder_noise,
        )
        time = grid[drawn.place]
        noisy = interpolate(drawn.frames, drawn.noise, time)
        estimate = clean_from_velocity(noisy, drawn.seen_by(model, noisy, time), time)
        with torch.no_grad():
            moved, now = noisy, time
            follow = self.teacher(
                drawn.history,
                drawn.conditions,
                noisy.shape[2],
                config.num_draws,
                drawn.encoder_noise,
            )
            for step in range(1, config.num_teacher_steps + 1):
                after = grid[(drawn.place + step).clamp(max=config.num_grid_steps)]
                moved = moved + (after - now)[..., None, None, None] * follow(moved, now)
                now = after
            if config.num_teacher_steps < config.num_grid_steps:
                # At time 0 the estimate is the frame itself, whatever the network says.
                velocity = drawn.seen_by(self.target, moved, now)
                moved = clean_from_velocity(moved, velocity, now)
        loss = pseudo_huber(estimate, moved, config.huber)
        return loss, {"loss": loss.detach(), "spread": spread(estimate.detach(), drawn.frames)}


@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """The mean squared error of the clean estimate at the times of a schedule."""

    config: RegressionConfig
    times: Sequence[float]
    """At which the student will be called, all above 0; one is drawn for each frame."""
    needs_first_frame: bool = False
    """Whether the model cannot denoise a first frame, which is then only given."""

    def loss(
        self, model: Network, batch: Batch, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], Logs]:
        """Return the loss of clips of latents."""
        drawn = draw(batch, len(self.times), self.config, generator, self.needs_first_frame)
        time = torch.tensor(self.times, device=batch.frames.device)[drawn.place]
        noisy = interpolate(drawn.frames, drawn.noise, time)
        velocity = model(drawn.history, noisy, time, drawn.conditions)
        loss = (clean_from_velocity(noisy, velocity, time) - drawn.frames).square().mean()
        return loss, {"loss": loss.detach()}


def pseudo_huber(
    found: Float[Tensor, "*b c h w"], expected: Float[Tensor, "*b c h w"], knee: float
) -> Float[Tensor, ""]:
    """Average a distance of frames: a square up to about the knee (root mean square of a frame's
    error), the size of the error beyond. Knee 0: always the square."""
    square = (found - expected).square().mean((-3, -2, -1))
    if knee == 0:
        return square.mean()
    return ((square + knee**2).sqrt() - knee).mean()


def spread(
    generated: Float[Tensor, "*b c h w"], real: Float[Tensor, "*b2 c h w"]
) -> Float[Tensor, ""]:
    """Return how much generated frames vary over clips and places, over how much real ones do."""

    def deviation(frames: Tensor) -> Tensor:
        flat = frames.flatten(0, -4).float()
        return flat.std((0, -2, -1), correction=0).mean()

    # Latents have unit scale: that stands in for real frames where there are none.
    return deviation(generated) / (deviation(real).clamp(min=1e-6) if real.numel() else 1.0)


def guided_path(path: Path, scale: float) -> Path:
    """Return a path of a network pushed away from its branch with all conditions hidden."""
    if scale == 1:
        return path

    def begin(
        history: Tensor,
        conditions: Conditions,
        num_noisy: int,
        num_draws: int,
        noise: Tensor | None,
    ) -> Field:
        twice = torch.cat([history, history])
        noise = None if noise is None else torch.cat([noise, noise])
        both = path(twice, conditions.with_null_branch(), num_noisy, num_draws, noise)

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            twice = both(torch.cat([noisy, noisy]), torch.cat([time, time]))
            unconditional, conditional = twice.chunk(2)
            return guide(unconditional, conditional, scale)

        return velocity

    return begin


def guided(network: Network, scale: float) -> Network:
    """Return a network pushed away from what it says with all conditions hidden; 1: as it is."""
    if scale == 1:
        return network

    def field(history: Tensor, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        history, noisy, time = (torch.cat([part, part]) for part in (history, noisy, time))
        velocity = network(history, noisy, time, conditions.with_null_branch())
        unconditional, conditional = velocity.chunk(2)
        return guide(unconditional, conditional, scale)

    return field


def running(network: Network, autocast: Autocast) -> Network:
    """Return a network that is not wrapped, run at the run's precision as if it were.

    Each call has a context of its own: copies of weights that a context made without gradient
    must not serve a later call with gradient.
    """

    def run(*inputs: Tensor | Conditions, **more: Tensor) -> Tensor:
        with autocast():
            return network(*inputs, **more).float()

    return run


def path_of(model: Diffuser, autocast: Autocast) -> Path:
    """Return a model's `field` at the run's precision."""

    def begin(
        history: Tensor,
        conditions: Conditions,
        num_noisy: int,
        num_draws: int,
        noise: Tensor | None,
    ) -> Field:
        with autocast():
            field = model.field(history, conditions, num_noisy, num_draws, noise)
        return running(field, autocast)

    return begin


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Let gradient pass through a network but not into its weights, for a with block."""
    moving = [weight for weight in network.parameters() if weight.requires_grad]
    for weight in moving:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in moving:
            weight.requires_grad_(True)
