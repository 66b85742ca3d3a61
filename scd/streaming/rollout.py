"""A stream of frames from a trained model, steered by actions or a text, step by step.

Source: paper (sampling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.autoencoders.base import FrameDecoder, StreamDecoder
from scd.common.timing import Clock, Timing
from scd.data.clip import Conditions, check_conditions
from scd.data.given import Frames, Whole, as_frames, as_whole
from scd.engine.interface import Engine
from scd.engine.open import open_engine
from scd.engine.plain import PlainEngine
from scd.models.checkpoint import World, as_world
from scd.models.config import Guidance, SamplingConfig
from scd.models.flow import first_schedule, num_step_noises, schedule, with_num_steps
from scd.streaming.conditions import StreamConditions
from scd.streaming.draft import Draft, draft_all
from scd.streaming.finite import refuse_not_finite
from scd.streaming.noise import NoiseUse, frame_noises, future_seeds, step_noises
from scd.streaming.past import Past, named, past_named, past_of, together, with_frame
from scd.streaming.start import Given, given_frames, own_start
from scd.streaming.steering import Action, Plan, as_plan


class Rollout:
    """A batch of streams from one world, steered by actions, labels or text.

    `begin` with a clip, given first frames or nothing, then `step` once per frame. `observe` puts
    in a frame from outside instead, `change_text` steers what follows by another text.
    `fork` copies the stream as it is, `fork(n)` as n futures in one batch; `reset` goes back to
    where `begin` left it. Everything is repeatable from `seed`: the noise of frame i depends on the
    seed and i alone.

    Where a latent frame stands for several frames of video, or a block of them is denoised
    together, `step_video` takes the place of `step`; frames are counted as latent ones.

    The latents of the newest step, `newest`, can be kept: `replay` makes them part of the past of
    an earlier fork, which is then as this stream was.
    """

    def __init__(
        self,
        world: World | str | PathLike[str],
        sampling: SamplingConfig | None = None,
        guidance: Guidance | None = None,
        seed: Whole = 0,
        window: int | None = None,
        engine: Engine | str | None = None,
        decoder: StreamDecoder | None = None,
    ) -> None:
        """Prepare to stream.

        Args:
            world: model, autoencoder and what they expect; or its name, as `scd.load` takes it.
            sampling: steps per frame and the like; None: as the checkpoint says.
            guidance: None: none.
            seed: of the noise.
            window: frames in memory; None: as the model was trained.
            engine: what runs the model; "fast": its weights laid out for the machine; "plain" or
                None: the model as it is written.
            decoder: from latents to frames, from now on this stream's own; None: the autoencoder's.

        Raises:
            ValueError: guidance or an engine that this model does not have.
            OSError: no world of this name.
        """
        self.world = world = as_world(world)
        if engine is None or engine == "plain":
            engine = PlainEngine(world.model)
        self.engine = open_engine(world.model, engine) if isinstance(engine, str) else engine
        self.guidance = guidance or Guidance()
        self.seed = seed
        self.window = window
        self.timing = Timing()
        self.sampling = sampling or world.sampling
        config = self.engine.config
        if self.guidance.kind == "conditions" and not config.conditions.is_steered:
            raise ValueError("guidance by conditions needs a model with actions, labels or text")
        if self.guidance.kind == "context_noise" and not config.is_separable:
            raise ValueError("guidance by context noise needs a separable model")
        self.block_size = config.frames_per_block
        self.newest: Tensor | None = None
        self._decoder = decoder
        self._state: Any = None
        self._steering: StreamConditions | None = None
        self._start: Rollout | None = None
        self._past: Past = ()
        self._is_future = False

    @property
    def seed(self) -> int:
        """Seed of the noise, of the first future where there are several; may be set at any time,
        and is then that of the whole batch."""
        return self._seeds[0]

    @seed.setter
    def seed(self, seed: Whole) -> None:
        self._seeds = (as_whole(seed, "seed"),)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of each future that `fork(n)` made; else the one seed."""
        return self._seeds

    @property
    def sampling(self) -> SamplingConfig:
        """How each frame is denoised; may be changed while the stream runs."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingConfig) -> None:
        self._given_sampling = sampling
        self._use(sampling)

    def _use(self, sampling: SamplingConfig) -> None:
        self._sampling, self._times = sampling, schedule(sampling).tolist()
        self._first_times = first_schedule(sampling).tolist()

    @property
    def num_steps(self) -> int:
        """Denoising steps per frame; may be changed while the stream runs."""
        return self.sampling.num_steps

    @num_steps.setter
    def num_steps(self, value: Whole) -> None:
        # Of the sampling that was given: custom times there and back would be others.
        value = as_whole(value, "num_steps", 1)
        self._use(with_num_steps(self._given_sampling, value))

    @property
    def times(self) -> list[float]:
        """Times of the steps of the next frame, descending from 1 to 0."""
        return self._times if self._state is None or self.num_frames else self._first_times

    @property
    def guidance_scale(self) -> float | None:
        """Strength of the guidance; None: a frame is denoised in one branch."""
        return None if self.guidance.kind == "none" else self.guidance.scale

    @property
    def decoder(self) -> StreamDecoder:
        """From latents to frames; that of the autoencoder is opened when it is first needed."""
        if self._decoder is None:
            self._decoder = self.world.autoencoder.stream_decoder()
        return self._decoder

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
        return self.conditions.lasting.labels

    @torch.no_grad()
    def begin(
        self,
        frames: Given | None = None,
        conditions: Conditions | None = None,
        batch: Whole = 1,
        can_reset: bool = True,
        latents: Float[Tensor, "b t2 c h2 w2"] | None = None,
        from_nothing: bool = False,
    ) -> Float[Tensor, "b t3 3 h3 w3"]:
        """Start the streams.

        Args:
            frames: given first frames in [-1, 1], or clips. None, with nothing else: from the
                first 16 frames of one of the world's clips, by the seed; from nothing where it has
                none or was taught to begin so.
            conditions: the actions that led to those frames; labels and text of the streams.
            batch: number of streams, where no frames are given.
            can_reset: keep a copy of the KV cache for `reset`.
            latents: of the given first frames, in their place.
            from_nothing: even of a world that has clips and was not taught to.

        Returns:
            The given frames, as the decoder shows them where it makes video; none from nothing.

        Raises:
            ValueError: frames of another size, conditions that do not fit, or no frames for a
                model that cannot begin from nothing.
        """
        batch = as_whole(batch, "batch", 1)
        if frames is None and conditions is None and latents is None and not from_nothing:
            frames = own_start(self.world, batch, self.seed)
        frames, conditions, latents = given_frames(frames, conditions, latents, self.world.card)
        given = frames if latents is None else latents
        if given is not None:
            if given.shape[1] == 0:
                raise ValueError("given first frames must be 1 or more; None begins from nothing")
            batch = given.shape[0]
            latents = self._encode(given) if latents is None else self._checked(latents)
            check_conditions(self.engine.config.conditions, conditions, latents.shape[1])
        self._steering = StreamConditions.of(
            self.engine,
            self.world.card,
            batch,
            self._has_null_state,
            conditions.lasting,
            self.guidance.hides(self.engine.config.conditions),
        )
        self.batch, self._seeds, self._is_future = batch, self._seeds[:1], False
        both = batch * (1 + self._has_null_state)
        seen = None if latents is None else self._twice(latents)
        past = self._steering.of_given(conditions)
        self._state = self.engine.begin(seen, past, both, self.window)
        self._past = past_of(self.engine, latents, conditions, self.window)
        self.newest = None if latents is None else self._last_block(latents)
        self.num_given = self.num_frames = 0 if latents is None else latents.shape[1]
        if self._decoder is not None:
            self._decoder.reset()
        shown = self._shown(frames, latents)
        self._start = None
        self._start = self.fork() if can_reset else None
        return shown

    def _checked(self, latents: Tensor) -> Tensor:
        shape = (*latents.shape[:2], *self.engine.shape.shape)
        if latents.shape != shape:
            raise ValueError(f"given latents must be {list(shape)}, got {list(latents.shape)}")
        return latents.to(self.engine.device, self.engine.dtype)

    def _last_block(self, latents: Tensor) -> Tensor:
        return latents[:, -1] if self.block_size == 1 else latents[:, -self.block_size :]

    def _shown(self, frames: Tensor | None, latents: Tensor | None) -> Tensor:
        if latents is None:
            return torch.zeros(self.batch, 0, 3, self.world.card.height, self.world.card.width)
        # Each frame by itself: there is nothing that the decoder must have seen.
        if frames is not None and isinstance(self.decoder, FrameDecoder):
            return frames
        return self._decode(latents)

    @property
    def text(self) -> Tensor | None:
        """Embedded text of each stream, [b l c]; None: no text steers this model."""
        return self.conditions.lasting.text

    @torch.no_grad()
    def change_text(
        self,
        text: Float[Tensor, "b l c"],
        null_text: Float[Tensor, "b l c"] | None = None,
        recompute: bool = False,
    ) -> None:
        """Steer the frames from the next one on by another text.

        Args:
            text: embedded.
            null_text: what guidance leads away from; None: as before.
            recompute: let the frames in the window be seen anew under this text, a pass for each;
                sinks then stand right before the others. False: the past stays as it is.

        Raises:
            ValueError: the stream has not begun, or the text does not fit.
        """
        steering = self.conditions.with_text(text, null_text)
        if recompute and self._past:
            latents, conditions = together(self._past)
            both, past = self._twice(latents), steering.of_given(conditions)
            self._state = self.engine.begin(both, past, len(both), self.window)
        self._steering = steering

    @property
    def _has_null_state(self) -> bool:
        # The unconditional branch of guidance has a KV cache of its own.
        return self.guidance.kind == "conditions"

    def _twice(self, latents: Tensor) -> Tensor:
        return torch.cat([latents, latents]) if self._has_null_state else latents

    def _steered(self, actions: Action | None) -> Conditions:
        """Return the conditions of one frame from its actions."""
        return self.conditions.of_frame(actions)

    @property
    def conditions(self) -> StreamConditions:
        """What steers the streams (ValueError: they have not begun)."""
        if self._state is None or self._steering is None:
            raise ValueError("begin the stream first")
        return self._steering

    def step(self, actions: Action | None = None) -> Float[Tensor, "b 3 h w"]:
        """Generate the next frame of each stream, the effect of `actions` on the newest one.

        An action is an id, its name, or a vector, of all streams; several are of each; {"keys":
        ["w"], "mouse": (0.1, 0.0)} mean what the names of actions say. A step that is interrupted
        leaves the streams as they were.

        Raises:
            ValueError: the stream has not begun, the actions do not fit, or a step makes several
                frames.
        """
        if self.block_size > 1 or self.world.autoencoder.config.is_video:
            raise ValueError("a step of this world makes several frames: step_video returns them")
        return self.step_video(actions)[:, 0]

    @torch.no_grad()
    def step_video(self, actions: Action | None = None) -> Float[Tensor, "b t 3 h w"]:
        """Generate the next latent frame, or block of them, of each stream; return its frames.

        Raises:
            ValueError: the stream has not begun, the actions do not fit, or frames are not finite.
        """
        conditions = self._steered(actions)
        clock = Clock(self.engine.device)
        context = self._context(conditions)
        context_s = clock.lap()
        latents = self._denoise(context)
        decoder_s = clock.lap()
        frames = self._decode(latents)
        autoencoder_s = clock.lap()
        refuse_not_finite(self.world, self.num_frames, latents, frames)
        self._update(latents, conditions)
        update_s = clock.lap()
        self.timing = Timing(
            encoder_s=context_s + update_s,
            decoder_s=decoder_s,
            autoencoder_s=autoencoder_s,
            update_s=update_s,
            num_frames=frames.shape[1],
        )
        return frames

    @torch.no_grad()
    def step_latents(self, actions: Action | None = None) -> Float[Tensor, "b *m c h w"]:
        """Generate what `step_video` shows as latents, which no decoder sees; it is not timed.

        Raises:
            ValueError: the stream has not begun, or the actions do not fit.
        """
        conditions = self._steered(actions)
        latents = self._denoise(self._context(conditions))
        self._update(latents, conditions)
        return latents

    def draft(self, actions: Action | None = None) -> Draft:
        """Do the first part of `step`, for a caller who denoises himself.

        The streams stay as they are until `keep`: a draft may be dropped, and made again for other
        actions.

        Raises:
            ValueError: the stream has not begun, or the actions do not fit.
        """
        return draft_all([self], [actions])[0]

    @torch.no_grad()
    def keep(self, draft: Draft, latent: Float[Tensor, "b *m c h w"]) -> None:
        """Do the last part of `step`: make the denoised latents of a draft part of the past."""
        self._update(latent, draft.conditions)

    def check(self, actions: Action | None) -> None:
        """Refuse actions that `step` would refuse (ValueError)."""
        self._steered(actions)

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
        return self._twice(self._noise(use, self.engine.shape.shape))

    def _denoise(self, context: Any) -> Tensor:
        noise = self._noise("frame", self.engine.shape.shape)
        return self.engine.denoise(
            context,
            noise,
            self.times,
            self.sampling.solver,
            self.guidance_scale,
            self._step_noise(),
        )

    def _decode(self, latents: Tensor) -> Tensor:
        """Turn latents [b c h w], or [b t c h w], into all frames that they stand for."""
        one_by_one = [latents] if latents.ndim == 4 else latents.unbind(1)
        frames = [self.decoder.next(latent) for latent in one_by_one]
        return frames[0] if len(frames) == 1 else torch.cat(frames, dim=1)

    @torch.no_grad()
    def observe(
        self,
        frames: Frames,
        actions: Action | None = None,
    ) -> None:
        """Put in the next frame of each stream and the actions that led to it.

        Args:
            frames: [streams 3 h w] in [-1, 1].
            actions: as `step` takes them.

        Raises:
            ValueError: frames of another type, size, range or number, or actions that do not fit.
        """
        card = self.world.card
        frames = as_frames(frames, "streams", (card.height, card.width))
        conditions = self._steered(actions)
        if frames.shape[0] != self.batch:
            raise ValueError(f"{self.batch} streams need as many frames, got {frames.shape[0]}")
        self._update(self._encode(frames[:, None])[:, 0], conditions)

    @torch.no_grad()
    def replay(
        self,
        latents: Float[Tensor, "b *m c h w"],
        actions: Action | None = None,
    ) -> None:
        """Put in what was `newest` at the next frame, and the actions that led to it.

        Raises:
            ValueError: the stream has not begun, or the actions do not fit.
        """
        self._update(latents, self._steered(actions))
        if not isinstance(self.decoder, FrameDecoder):
            # It must have seen every latent frame.
            self._decode(latents)

    def _encode(self, frames: Tensor) -> Tensor:
        latents = self.world.autoencoder.encode(frames.to(self.engine.device))
        return latents.to(self.engine.dtype)

    def _update(self, latents: Tensor, conditions: Conditions) -> None:
        """Make finished latents part of the past: the KV cache is updated."""
        self.engine.observe(self._state, self._twice(latents), conditions)
        self._past = with_frame(self.engine, self._past, latents, conditions, self.window)
        self.newest = latents
        self.num_frames += self.block_size

    def generate(
        self, actions: Plan | None = None, num_steps: Whole | None = None
    ) -> Float[Tensor, "b t2 3 h w"]:
        """Generate the frames of several steps, for actions that are known beforehand.

        On a GPU nothing waits between steps: while one's latents become pixels, the next is under
        way; the parts are not timed then.

        Args:
            actions: a list of what `step` takes, one for each step; a tensor or array of ids
                [steps] or [streams, steps], or of vectors in one axis more; or one action, which
                is that of all steps.
            num_steps: of the actions, the first so many are used; None: all.

        Raises:
            ValueError: the stream has not begun, actions that do not fit or are too few, or no
                step at all.
        """
        number = None if num_steps is None else as_whole(num_steps, "num_steps", 1)
        known = as_plan(actions, self.world.card, self.conditions.batch, number)
        if self.engine.device.type == "cuda":
            return self._generate_overlapped(known)
        return torch.cat([self.step_video(now) for now in known], dim=1)

    @torch.no_grad()
    def _generate_overlapped(self, actions: list[Tensor | None]) -> Tensor:
        """Decode each step on a CUDA stream of its own, beside the causal pass of the next one."""
        device = self.engine.device
        here, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        frames = []
        for now in actions:
            conditions = self._steered(now)
            latents = self._denoise(self._context(conditions))
            beside.wait_stream(here)
            with torch.cuda.stream(beside):
                frames.append(self._decode(latents))
            latents.record_stream(beside)
            self._update(latents, conditions)
        here.wait_stream(beside)
        for frame in frames:
            frame.record_stream(here)
        whole = torch.cat(frames, dim=1)
        refuse_not_finite(self.world, self.num_frames - len(frames) * self.block_size, whole)
        return whole

    def reset(self) -> None:
        """Go back to where `begin` left the streams.

        Raises:
            ValueError: they have not begun, or not with can_reset, or are futures of `fork(n)`.
        """
        if self._is_future:
            raise ValueError("futures have no beginning to go back to: fork their stream again")
        if self._start is None:
            raise ValueError("begin the stream first, with can_reset")
        start = self._start.fork()
        self._state, self._decoder, self.newest = start._state, start._decoder, start.newest
        self._past = start._past
        self.num_frames = self.num_given

    def end(self) -> None:
        """Give up the streams' memory; `begin` starts anew."""
        self._state = self._start = self.newest = None
        self._past = ()

    def fork(
        self, num_futures: Whole | None = None, seeds: Sequence[Whole] | None = None
    ) -> Rollout:
        """Return an independent copy of the streams as they are; the weights are shared.

        With a number, that many futures of each stream side by side in one batch, which share every
        call: row i of the batch is what `fork()` with seed `seeds[i]` would be alone. Of a batch of
        b streams the futures of one stand in a row: row j * num_futures + i is future i of stream
        j. They are steered by an action each, and cannot be `reset`.

        Args:
            num_futures: of each stream; None: one plain copy.
            seeds: of the noise of each future. None: future 0 keeps the stream's, and shows what
                the stream would show; each other one has its own, which follows from it. The same
                seed for all leaves the actions as the only difference.

        Raises:
            OutOfMemory: the futures need more memory than is free; nothing was allocated.
            ValueError: no future, another number of seeds, or streams that have not begun.
        """
        if num_futures is not None:
            return self._futures(num_futures, seeds)
        if seeds is not None:
            raise ValueError("seeds belong to futures, whose number was not given")
        twin = copy(self)
        if self._state is not None:
            twin._state = self._state.fork()
        if self._decoder is not None:
            twin._decoder = self._decoder.fork()
        return twin

    def remembered(self) -> dict[str, Tensor]:
        """Return what the streams keep beside their KV cache and conditions, by name."""
        kept = self.decoder.remembered().items()
        return named(self._past) | {f"decoder.{name}": tensor for name, tensor in kept}

    def recall(self, tensors: Mapping[str, Tensor]) -> None:
        """Put in what streams of as many frames have `remembered`."""
        self._past = past_named(self.engine, tensors)
        of = {name.partition(".")[2]: one for name, one in tensors.items() if "." in name}
        self.decoder.recall(of, self.num_frames)

    def _futures(self, num_futures: Whole, seeds: Sequence[Whole] | None) -> Rollout:
        num = as_whole(num_futures, "num_futures", 1)
        twin = copy(self)
        # Memory that is missing shows here, before anything else is as large.
        twin._state, twin._start, twin._is_future = self.state.fork(num), None, True
        twin._seeds = future_seeds(self._seeds, num, seeds)
        twin.batch = self.batch * num
        twin.newest = None if self.newest is None else self.newest.repeat_interleave(num, 0)
        if self._decoder is not None:
            twin._decoder = self._decoder.fork(num)
        twin._steering = self.conditions.repeat(num)
        twin._past = tuple(one.repeat(num) for one in self._past)
        return twin

    def _noise(self, use: NoiseUse, shape: tuple[int, ...]) -> Tensor:
        size = (self.batch, *shape)
        return self._placed(frame_noises(self._seeds, self._next(), use, size))

    def _step_noise(self) -> Tensor | None:
        number = num_step_noises(self.times, self.sampling.solver)
        if not number:
            return None
        size = (self.batch, *self.engine.shape.shape)
        return self._placed(step_noises(self._seeds, self._next(), number, size))

    def _next(self) -> range:
        """Return the numbers of the frames that the next step makes."""
        return range(self.num_frames, self.num_frames + self.block_size)

    def _placed(self, noise: Tensor) -> Tensor:
        if self.engine.device.type == "cuda":
            # From pinned memory the copy does not wait for the frame before.
            noise = noise.pin_memory()
        return noise.to(self.engine.device, non_blocking=True)
