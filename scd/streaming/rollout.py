"""A stream of frames from a trained model, steered by actions, one step per frame.

Source: paper, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scd.common.runtime import make_generator
from scd.common.timing import Clock, Timing
from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.engine.plain import PlainEngine
from scd.models.checkpoint import World
from scd.models.flow import SamplingConfig, num_fresh, schedule, with_num_steps

GuidanceKind = Literal["none", "conditions", "context_noise"]
"""Branch that frames are pushed away from: see Guidance."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a stream is pushed away from an unconditional branch."""

    kind: GuidanceKind = "none"
    """The branch: none; actions and labels hidden in the whole stream (classifier-free guidance,
    which needs a second memory); or the context corrupted by noise (negative guidance of the
    paper, section 3, which needs no second encoder pass)."""
    scale: float = 1.0
    """Strength; 1 means no push. The paper uses 1.5 for context noise on Minecraft."""
    context_noise: float = 0.05
    """Strength of the noise in the branch "context_noise"."""

    def __post_init__(self) -> None:
        if self.kind == "none" and self.scale != 1:
            raise ValueError(f"scale={self.scale} has no effect on guidance kind='none'")
        if self.context_noise <= 0:
            raise ValueError(f"context_noise must be positive, got {self.context_noise}")


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The next frame of each stream, all of its causal work done and none of its denoising."""

    context: Any
    """Of the engine; of twice the batch with guidance."""
    noise: Tensor
    """Where denoising starts, [b c h w]."""
    fresh: Tensor | None
    """Noise of the steps, [steps b c h w]; None: they need none."""
    conditions: Conditions
    """Of the frame."""


class Rollout:
    """A batch of streams from one world.

    `begin` with given first frames or from nothing, then `step` once per frame. `observe` instead
    of `step` puts in a frame from outside. `fork` copies the stream as it is; `reset` goes back to
    where `begin` left it. Everything is repeatable from `seed`: the noise of frame i depends on
    the seed and i alone.

    The latent of the newest frame, `newest` [b c h w], can be kept: `replay` makes it part of the
    past of an earlier fork, which is then as this stream was.
    """

    def __init__(
        self,
        world: World,
        sampling: SamplingConfig | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        window: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Prepare to stream.

        Args:
            world: model, autoencoder and what they expect.
            sampling: steps per frame and the like; None: as the checkpoint says.
            guidance: None: none.
            seed: of the noise.
            window: frames in memory; None: as the model was trained.
            engine: what runs the model; None: the model as it is written.

        Raises:
            ValueError: guidance that this model cannot give.
        """
        self.world = world
        self.engine = engine or PlainEngine(world.model)
        self.guidance = guidance or Guidance()
        self.seed = seed
        self.window = window
        self.timing = Timing()
        self.sampling = sampling or world.sampling
        spec = self.engine.config.conditions
        if self.guidance.kind == "conditions" and not spec.is_steered:
            raise ValueError("guidance by conditions needs a model with actions, labels or text")
        if self.guidance.kind == "context_noise" and not self.engine.config.is_separable:
            raise ValueError("guidance by context noise needs a separable model")
        self.newest: Tensor | None = None
        self._state: Any = None
        self._start: Any = None

    @property
    def sampling(self) -> SamplingConfig:
        """How each frame is denoised; may be changed while the stream runs."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingConfig) -> None:
        self._given_sampling = sampling
        self._use(sampling)

    def _use(self, sampling: SamplingConfig) -> None:
        self._sampling = sampling
        self._times = schedule(sampling).tolist()

    @property
    def times(self) -> list[float]:
        """Times of the steps, descending from 1 to 0."""
        return self._times

    @property
    def guidance_scale(self) -> float | None:
        """Strength of the guidance; None: a frame is denoised in one branch."""
        return None if self.guidance.kind == "none" else self.guidance.scale

    @property
    def state(self) -> Any:
        """What the engine keeps of the streams; keys and values are its `cache`.

        Raises:
            ValueError: the stream has not begun.
        """
        if self._state is None:
            raise ValueError("begin the stream first")
        return self._state

    @property
    def labels(self) -> Tensor | None:
        """Class of each stream, [b]; None: this model has none."""
        return self._lasting.labels

    @property
    def num_steps(self) -> int:
        """Denoising steps per frame; may be changed while the stream runs."""
        return self.sampling.num_steps

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        # Of the sampling that was given: of listed times there and back would leave others.
        self._use(with_num_steps(self._given_sampling, value))

    @torch.no_grad()
    def begin(
        self,
        frames: Float[Tensor, "b t 3 h w"] | None = None,
        conditions: Conditions | None = None,
        batch: int = 1,
        can_reset: bool = True,
    ) -> None:
        """Start the streams.

        Args:
            frames: given first frames in [-1, 1]; None: from nothing.
            conditions: the actions that led to those frames; labels and text of the streams.
            batch: number of streams, where no frames are given.
            can_reset: keep a copy of the memory for `reset`.

        Raises:
            ValueError: frames of another size, conditions that do not fit, or no frames for a
                model that cannot begin from nothing.
        """
        spec = self.engine.config.conditions
        conditions = conditions or Conditions()
        latents = None
        if frames is not None:
            self._check_size(frames)
            if frames.shape[1] == 0:
                raise ValueError("given first frames must be 1 or more; None begins from nothing")
            batch = frames.shape[0]
            spec.check(conditions, frames.shape[1])
            latents = self._encode(frames)
        self.batch = batch
        self._last(replace(conditions, actions=None, null_actions=None))
        past = self._doubled(conditions.to(self.engine.device), latents)
        both = batch * (1 + self._branches_state)
        self._state = self.engine.begin(past[1], past[0], both, self.window)
        self.newest = None if latents is None else latents[:, -1]
        self.num_given = 0 if frames is None else frames.shape[1]
        self.num_frames = self.num_given
        self._start = self._state.fork() if can_reset else None
        self._first = self.newest

    def change_text(
        self, text: Float[Tensor, "b l c"], null_text: Float[Tensor, "b l c"] | None = None
    ) -> None:
        """Steer the frames from the next one on by another text; the past stays as it is.

        Raises:
            ValueError: the stream has not begun, or the text does not fit.
        """
        if self._state is None:
            raise ValueError("begin the stream first")
        null_text = self._lasting.null_text if null_text is None else null_text
        self._last(replace(self._lasting, text=text, null_text=null_text))

    def _last(self, lasting: Conditions) -> None:
        """Keep what steers all frames of the streams."""
        spec = self.engine.config.conditions
        replace(spec, num_actions=0, action_dim=0).check(lasting)
        for name, value in (("labels", lasting.labels), ("texts", lasting.text)):
            if value is not None and value.shape[0] != self.batch:
                raise ValueError(f"{self.batch} streams need as many {name}, got {value.shape[0]}")
        self._lasting = lasting.to(self.engine.device)

    def _check_size(self, frames: Tensor) -> None:
        card = self.world.card
        if frames.shape[-2:] != (card.height, card.width):
            raise ValueError(
                f"frames must be {card.height}x{card.width}, "
                f"got {frames.shape[-2]}x{frames.shape[-1]}"
            )

    @property
    def _branches_state(self) -> bool:
        return self.guidance.kind == "conditions"

    def _doubled(
        self, conditions: Conditions, latents: Tensor | None
    ) -> tuple[Conditions, Tensor | None]:
        if not self._branches_state:
            return conditions, latents
        return conditions.with_null_branch(), None if latents is None else torch.cat([latents] * 2)

    def _conditions(self, actions: Tensor | None) -> Conditions:
        """Return the conditions of one frame from its actions [b] or [b a]."""
        if self._state is None:
            raise ValueError("begin the stream first")
        conditions = replace(self._lasting, actions=None if actions is None else actions[:, None])
        self.engine.config.conditions.check(conditions, 1)
        if actions is not None and actions.shape[0] != self.batch:
            raise ValueError(f"{self.batch} streams need as many actions, got {actions.shape[0]}")
        return self._doubled(conditions.to(self.engine.device), None)[0]

    @torch.no_grad()
    def step(
        self, actions: Int[Tensor, " b"] | Float[Tensor, "b a"] | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Generate the next frame of each stream, the effect of `actions` on the newest one.

        A step that is interrupted leaves the streams as they were.

        Raises:
            ValueError: the stream has not begun, or the actions do not fit.
        """
        conditions = self._conditions(actions)
        clock = Clock(self.engine.device)
        context = self._context(conditions)
        encoder_s = clock.lap()
        latent = self._denoise(context)
        decoder_s = clock.lap()
        frame = self._decode(latent)
        autoencoder_s = clock.lap()
        self._remember(latent, conditions)
        self.timing = Timing(
            encoder_s=encoder_s + clock.lap(), decoder_s=decoder_s, autoencoder_s=autoencoder_s
        )
        return frame

    def draft(self, actions: Int[Tensor, " b"] | Float[Tensor, "b a"] | None = None) -> Draft:
        """Do the first part of `step`, for a caller who denoises himself.

        The streams stay as they are until `keep`: a draft may be dropped, and made again for other
        actions.

        Raises:
            ValueError: the stream has not begun, or the actions do not fit.
        """
        return draft_all([self], [actions])[0]

    @torch.no_grad()
    def keep(self, draft: Draft, latent: Float[Tensor, "b c h w"]) -> None:
        """Do the last part of `step`: make the denoised latents of a draft part of the past."""
        self._remember(latent, draft.conditions)

    def check(self, actions: Tensor | None) -> None:
        """Refuse actions that `step` would refuse (ValueError)."""
        self._conditions(actions)

    def _context(self, conditions: Conditions) -> Any:
        return self._branched(self.engine.context(self._state, conditions, self._encoder_noise()))

    def _branched(self, context: Any) -> Any:
        if self.guidance.kind != "context_noise":
            return context
        corruption = self._noise(
            "context", (self.engine.shape.num_tokens, self.engine.config.block.width)
        )
        return self.engine.with_noisy_branch(context, self.guidance.context_noise, corruption)

    def _encoder_noise(self) -> Tensor | None:
        if self.engine.encoder_noise == "none":
            return None
        use: NoiseUse = "frame" if self.engine.encoder_noise == "same" else "encoder"
        noise = self._noise(use, self.engine.shape.shape)
        return torch.cat([noise, noise]) if self._branches_state else noise

    def _denoise(self, context: Any) -> Tensor:
        noise = self._noise("frame", self.engine.shape.shape)
        return self.engine.denoise(
            context, noise, self.times, self.sampling.solver, self.guidance_scale, self._fresh()
        )

    def _decode(self, latent: Tensor) -> Tensor:
        return self.world.autoencoder.decode(latent[:, None])[:, 0].float()

    @torch.no_grad()
    def observe(
        self,
        frames: Float[Tensor, "b 3 h w"],
        actions: Int[Tensor, " b"] | Float[Tensor, "b a"] | None = None,
    ) -> None:
        """Put in the next frame of each stream, in [-1, 1], and the actions that led to it.

        Raises:
            ValueError: frames of another size or number, or actions that do not fit.
        """
        self._check_size(frames)
        conditions = self._conditions(actions)
        if frames.shape[0] != self.batch:
            raise ValueError(f"{self.batch} streams need as many frames, got {frames.shape[0]}")
        self._remember(self._encode(frames[:, None])[:, 0], conditions)

    @torch.no_grad()
    def replay(
        self,
        latents: Float[Tensor, "b c h w"],
        actions: Int[Tensor, " b"] | Float[Tensor, "b a"] | None = None,
    ) -> None:
        """Put in what was `newest` at the next frame, and the actions that led to it.

        Raises:
            ValueError: the stream has not begun, or the actions do not fit.
        """
        self._remember(latents, self._conditions(actions))

    def _encode(self, frames: Tensor) -> Tensor:
        latents = self.world.autoencoder.encode(frames.to(self.engine.device))
        return latents.to(self.engine.dtype)

    def _remember(self, latent: Tensor, conditions: Conditions) -> None:
        newest = latent
        if self._branches_state:
            latent = torch.cat([latent, latent])
        self.engine.observe(self._state, latent, conditions)
        self.newest = newest
        self.num_frames += 1

    def generate(
        self, actions: Int[Tensor, "b t"] | Float[Tensor, "b t a"] | None, num_frames: int
    ) -> Float[Tensor, "b t2 3 h w"]:
        """Generate several frames, one step each, for actions that are known beforehand.

        On a GPU nothing waits between frames: while one becomes pixels, the next is under way; the
        parts are not timed then.
        """
        if actions is not None and actions.shape[1] < num_frames:
            raise ValueError(f"{num_frames} frames need as many actions, got {actions.shape[1]}")
        known = [None if actions is None else actions[:, index] for index in range(num_frames)]
        if self.engine.device.type == "cuda":
            return self._generate_overlapped(known)
        return torch.stack([self.step(now) for now in known], dim=1)

    @torch.no_grad()
    def _generate_overlapped(self, actions: list[Tensor | None]) -> Tensor:
        """Decode each frame on a stream of its own, beside the causal pass of the next one."""
        device = self.engine.device
        here, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        frames = []
        for now in actions:
            conditions = self._conditions(now)
            latent = self._denoise(self._context(conditions))
            beside.wait_stream(here)
            with torch.cuda.stream(beside):
                frames.append(self._decode(latent))
            latent.record_stream(beside)
            self._remember(latent, conditions)
        here.wait_stream(beside)
        for frame in frames:
            frame.record_stream(here)
        return torch.stack(frames, dim=1)

    def reset(self) -> None:
        """Go back to where `begin` left the streams."""
        if self._start is None:
            raise ValueError("begin the stream first, with can_reset")
        self._state = self._start.fork()
        self.newest = self._first
        self.num_frames = self.num_given

    def end(self) -> None:
        """Give up the streams' memory; `begin` starts anew."""
        self._state = self._start = self.newest = None

    def fork(self) -> Rollout:
        """Return an independent copy of the streams as they are; the weights are shared."""
        twin = object.__new__(Rollout)
        vars(twin).update(vars(self))
        if self._state is not None:
            twin._state = self._state.fork()
        return twin

    def _noise(self, use: NoiseUse, shape: tuple[int, ...]) -> Tensor:
        return self._placed(frame_noise(self.seed, self.num_frames, use, (self.batch, *shape)))

    def _fresh(self) -> Tensor | None:
        number = num_fresh(self.times, self.sampling.solver)
        if not number:
            return None
        shape = (self.batch, *self.engine.shape.shape)
        return self._placed(step_noise(self.seed, self.num_frames, number, shape))

    def _placed(self, noise: Tensor) -> Tensor:
        if self.engine.device.type == "cuda":
            # From pinned memory the copy does not wait for the frame before.
            noise = noise.pin_memory()
        return noise.to(self.engine.device, non_blocking=True)


@torch.no_grad()
def draft_all(rollouts: Sequence[Rollout], actions: Sequence[Tensor | None]) -> list[Draft]:
    """Do what `draft` does for streams of one engine, which then shares the causal work of all.

    Args:
        rollouts: that have begun.
        actions: of each.

    Raises:
        ValueError: the actions of any do not fit.
    """
    conditions = [one._conditions(now) for one, now in zip(rollouts, actions, strict=True)]
    contexts = rollouts[0].engine.contexts(
        [one._state for one in rollouts],
        conditions,
        [one._encoder_noise() for one in rollouts],
    )
    return [
        Draft(
            context=one._branched(context),
            noise=one._noise("frame", one.engine.shape.shape),
            fresh=one._fresh(),
            conditions=condition,
        )
        for one, context, condition in zip(rollouts, contexts, conditions, strict=True)
    ]


NoiseUse = Literal["frame", "context", "encoder"]
"""What noise is for: the start of a frame's denoising, the corruption of its context, or what an
encoder reads in the place of the frame."""


def frame_noise(seed: int, frame: int, use: NoiseUse, shape: tuple[int, ...]) -> Tensor:
    """Draw the noise of one frame of a stream, standard normal, on the CPU.

    It follows from the arguments alone, so that a fork, another number of steps, or a stream that
    shares its calls with others meets the same noise.
    """
    return torch.randn(*shape, generator=make_generator(seed, f"noise of a {use}", frame))


def step_noise(seed: int, frame: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """Draw the noises with which the first steps of one frame end, [number *shape]; as frame_noise.

    Fewer steps meet the first of the same draws.
    """
    generator = make_generator(seed, "noise of a step", frame)
    return torch.stack([torch.randn(*shape, generator=generator) for _ in range(number)])
