"""All that makes video of a prompt: a world that a text steers, its text encoder, its decoder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from scd.autoencoders.base import LaterDecoder, StreamDecoder
from scd.autoencoders.config import FRAMES_PER_LATENT
from scd.autoencoders.text_encoder import PromptEmbedder, TextConfig, default_cache, refuse_empty
from scd.autoencoders.tiny import open_tiny_decoder
from scd.autoencoders.wan import WanAutoencoder, WanStreamDecoder
from scd.common.config import to_json
from scd.common.memory import release
from scd.common.runtime import choose_device, choose_stream_precision
from scd.common.timing import Clock, Timing
from scd.data.clip import Conditions, held, pixels_to_frames
from scd.data.spaces import ConditionSpec
from scd.data.video import read_video
from scd.engine.open import open_engine, stream_threads
from scd.models.build import num_parameters
from scd.models.checkpoint import load_world, read_world_parts, resolve
from scd.models.config import Guidance
from scd.models.flow import with_num_steps
from scd.models.shipped import parts_beside
from scd.sampling.settings import VideoConfig
from scd.streaming.rollout import Rollout
from scd.streaming.steering import read_action


@dataclass(frozen=True, kw_only=True)
class Script:
    """What one video shows."""

    text: Float[Tensor, "1 l _"]
    """Embedded prompt."""
    num_latents: int
    """Latent frames of the whole video, given ones included."""
    null_text: Float[Tensor, "1 l _"] | None = None
    """What guidance leads away from; None: there is none."""
    given: Float[Tensor, "1 t c h w"] | None = None
    """Latents of given first frames; None: from nothing."""
    switches: Mapping[int, Float[Tensor, "1 l _"]] = field(default_factory=dict)
    """Other embedded prompts by the latent frame from which on they hold."""
    actions: Mapping[int, Tensor] = field(default_factory=dict)
    """What is held, [1] or [1 a], by the latent frame from which on, 0 among them; empty: no
    actions steer the world."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Frames of one stream and when they came."""

    given: Float[Tensor, "g 3 h w"]
    """Given first frames in [-1, 1], as the decoder shows them, on the CPU."""
    frames: Float[Tensor, "m 3 h w"]
    """Generated frames after them."""
    timings: list[Timing]
    """Of each step."""
    first_frame_s: float
    """Seconds from given frames, or the embedded prompt, to the first generated frame."""


class TextToVideo:
    """A run and its parts, opened. `embed` prompts, then `stream` any number of videos."""

    def __init__(self, config: VideoConfig, prompts: Sequence[str] = ()) -> None:
        """Embed prompts, then open a run.

        Args:
            config: the run, and how it makes video.
            prompts: that will be needed. They are embedded first: what does not fit is refused
                before the model is loaded, and never are text encoder and model in memory at once.

        Raises:
            FileNotFoundError: no such run, or parts of the source are missing.
            ValueError: a run that no text steers, parts that do not fit it, or a prompt that is
                empty.
        """
        self.config = config = settled(config)
        self.device = choose_device(config.device)
        if not is_steered_by_text(config.run):
            raise ValueError(f"{config.run} is not steered by a text: it takes no prompt")
        parts = read_world_parts(resolve(config.run))
        described, spec = parts["autoencoder"], parts["model"].conditions
        if not described.has_text_encoder:
            raise ValueError(f"{config.run}: its frames are no latents of Wan's autoencoder")
        self.source = config.source or parts_beside(config.run) or described.source
        if not self.source:
            raise ValueError(
                f"{config.run} does not say where Wan's autoencoder and text encoder lie: name the "
                "folder that diffusers wrote with --source"
            )
        self._embedder = PromptEmbedder(self.source, self._text_config(spec.text_length))
        self._text_dim = spec.text_dim
        if prompts:
            refuse_empty(prompts)
            self._embedder.prepare(prompts)
            self.embed(prompts[:1])
            self.embed_negative()
        place = replace(described, source=self.source)
        self.autoencoder = WanAutoencoder(place).place(self.device, config.decoder_precision)
        self._tiny = self._open_tiny()
        if self._tiny is None:
            # Even where it is given back at once: what is missing shows before any work.
            self.autoencoder.load()
        if config.offload:
            self.autoencoder.release()
        self.world = load_world(config.run, config.weights, self.device)
        self.decoder = self._stand_in() if config.offload else self._open_decoder()
        self.sampling = with_num_steps(self.world.sampling, config.steps)
        self.threads = stream_threads(config.threads, self.world.model.config)
        self.num_parameters = num_parameters(self.world.model)
        self.engine = open_engine(self.world.model, config.engine, config.precision, release=True)

    def _text_config(self, length: int) -> TextConfig:
        config = self.config
        cache = default_cache() if config.text_cache is None else config.text_cache
        device = str(self.device) if config.text_device == "auto" else config.text_device
        return TextConfig(
            length=length, precision=config.text_precision, device=device, cache=cache
        )

    @property
    def described(self) -> dict[str, Any]:
        """The model, how it is run, and which decoder makes the pictures, for result files."""
        return {
            "kind": type(self.world.model).__name__,
            "parameters": self.num_parameters,
            "sampling": to_json(self.sampling),
            "precision": self.config.precision,
            "decoder": self.decoder.name,
            "decoder_precision": self.config.decoder_precision,
            "window": self.config.window or self.engine.config.cache.window,
        }

    def held(self, switches: Mapping[int, str] | None = None) -> dict[int, Tensor]:
        """Return what is held from which latent frame on, first as the settings say.

        Raises:
            ValueError: no such action in this world.
        """
        words = {0: self.config.action} | dict(switches or {})
        actions = {place: read_action(word, self.world.card) for place, word in words.items()}
        return {place: action for place, action in actions.items() if action is not None}

    @property
    def fps(self) -> float:
        """Frames per second at which what the decoder makes is meant to be watched."""
        card = self.world.card
        return card.fps * self.decoder.pictures_per_latent / FRAMES_PER_LATENT

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b l c"]:
        """Embed prompts, 1 or more and none of them empty; none is embedded twice.

        Raises:
            ValueError: no prompt, one that is empty, or embeddings of another width than the
                model's.
        """
        refuse_empty(prompts)
        return self._embed(prompts)

    def embed_negative(
        self, prompt: str | None = None, scale: float | None = None
    ) -> Float[Tensor, "1 l c"] | None:
        """Embed a negative prompt, which may be empty; None without guidance.

        Args:
            prompt: None: as the settings say.
            scale: of the guidance; None: as the settings say.
        """
        scale = self.config.guidance_scale if scale is None else scale
        prompt = self.config.negative_prompt if prompt is None else prompt
        return None if scale == 1 else self._embed([prompt])

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        embedded = self._embedder.embed(prompts)
        self._embedder.release()
        if embedded.shape[-1] != self._text_dim:
            raise ValueError(
                f"the text encoder of {self.source} makes {embedded.shape[-1]} entries of a "
                f"token, the model reads {self._text_dim}"
            )
        return embedded

    def stream(
        self, seed: int, scale: float | None = None, num_steps: int | None = None
    ) -> Rollout:
        """Return a stream that has yet to begin; it shares the weights.

        Args:
            seed: of its noise.
            scale: of the guidance; None: as the settings say.
            num_steps: per latent frame; None: as the settings say.
        """
        scale = self.config.guidance_scale if scale is None else scale
        # Of those of the world: custom times there and back would be others.
        sampling = with_num_steps(self.world.sampling, num_steps or self.config.steps)
        return Rollout(
            self.world,
            sampling,
            None if scale == 1 else Guidance(kind="conditions", scale=scale),
            seed,
            self.config.window,
            self.engine,
            self.decoder.fork(),
        )

    def encode(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t2 c h2 w2"]:
        """Turn given first frames, 1 + 4n of them, into latents.

        Raises:
            ValueError: frames of another size, or another number of them.
        """
        card = self.world.card
        if frames.shape[-2:] != (card.height, card.width):
            raise ValueError(
                f"given frames must be {card.height}x{card.width}, "
                f"got {frames.shape[-2]}x{frames.shape[-1]}"
            )
        latents = self.autoencoder.encode(frames)
        if self.config.offload:
            self.autoencoder.release()
        return latents

    def num_latents(self, num_frames: int) -> int:
        """Return how many latent frames it takes to have a number of frames at the card's pace.

        With a model that makes blocks of latent frames, whole blocks.
        """
        latents = 1 + max(0, -(-(num_frames - 1) // FRAMES_PER_LATENT))
        block = self.engine.config.frames_per_block
        return -(-latents // block) * block

    def _open_tiny(self) -> StreamDecoder | None:
        config, channels = self.config, self.autoencoder.config.channels
        if not config.tiny:
            return None
        return open_tiny_decoder(config.tiny, channels, self.device, config.decoder_precision)

    def _open_decoder(self) -> StreamDecoder:
        return self._tiny or self.autoencoder.stream_decoder()

    def _stand_in(self) -> LaterDecoder:
        card, meant = self.world.card, self._tiny or WanStreamDecoder
        return LaterDecoder(meant.name, meant.pictures_per_latent, (card.height, card.width))

    def video(self, seed: int, script: Script, is_last: bool = False) -> Stream:
        """Stream one video, as `render` does.

        Args:
            seed: of its noise.
            script: what it shows.
            is_last: with the setting `offload`, give the model up before anything is decoded:
                `world` and `engine` are no more.

        Raises:
            ValueError: as of `render`.
        """
        rollout = self.stream(seed)
        video = render(rollout, script)
        later, block = rollout.decoder, rollout.block_size
        if not isinstance(later, LaterDecoder):
            return video
        del rollout
        if is_last:
            del self.world, self.engine
        release()
        made = self._decoded(video, later.kept, block)
        self.autoencoder.release()
        return made

    def _decoded(self, video: Stream, latents: Sequence[Tensor], block: int) -> Stream:
        """Return a video with the frames of its latents, and the seconds that they took."""
        decoder, clock = self._open_decoder().fork(), Clock(self.device)
        num_given = len(latents) - block * len(video.timings)
        given = [decoder.next(latent)[0].cpu() for latent in latents[:num_given]]
        first_s = video.first_frame_s + clock.lap()
        # All steps come before the first picture.
        first_s += video.timings[0].update_s
        first_s += sum(timing.total_s for timing in video.timings[1:])
        frames, timings = [], []
        for timing, start in zip(video.timings, range(num_given, len(latents), block), strict=True):
            made = [decoder.next(latent)[0].cpu() for latent in latents[start : start + block]]
            frames.append(torch.cat(made))
            timings.append(replace(timing, autoencoder_s=clock.lap(), num_frames=len(frames[-1])))
        return Stream(
            given=torch.cat([video.given, *given]),
            frames=torch.cat(frames),
            timings=timings,
            first_frame_s=first_s + timings[0].autoencoder_s,
        )


def is_steered_by_text(run: str) -> bool:
    """Tell whether a run's model takes a prompt, from its settings alone.

    Raises:
        FileNotFoundError: no such run.
        ValueError: its settings cannot be read.
    """
    return read_world_parts(resolve(run))["model"].conditions.has_text


def settled(config: VideoConfig) -> VideoConfig:
    """Return settings whose precision is decided, as its device has instructions."""
    precision = choose_stream_precision(config.precision, choose_device(config.device))
    return replace(config, precision=precision)


def latent_at(second: float, fps: float) -> int:
    """Return the first latent frame none of whose frames is shown before a second."""
    frame = round(second * fps)
    return 1 + -(-(frame - 1) // FRAMES_PER_LATENT) if frame > 0 else 0


def render(rollout: Rollout, script: Script) -> Stream:
    """Stream one video of one batch row; the rollout begins anew.

    Raises:
        ValueError: no frame left to generate, or what the rollout refuses.
    """
    given, num_given = script.given, 0 if script.given is None else script.given.shape[1]
    if given is not None and num_given >= script.num_latents:
        raise ValueError(
            f"the {num_given} given latent frames leave none to generate of {script.num_latents}"
        )
    waiting, held_down = sorted(script.switches.items()), sorted(script.actions.items())
    began = time.perf_counter()
    led = led_to(rollout.engine.config.conditions, held_down, num_given)
    conditions = Conditions(actions=led, text=script.text, null_text=script.null_text)
    shown = rollout.begin(conditions=conditions, latents=given, can_reset=False)[0].cpu()
    frames, timings, first_s = [], [], 0.0
    while rollout.num_frames < script.num_latents:
        while waiting and waiting[0][0] <= rollout.num_frames:
            rollout.change_text(waiting.pop(0)[1])
        step_began = time.perf_counter()
        frames.append(rollout.step_video(_latest(held_down, rollout.num_frames))[0].cpu())
        timings.append(rollout.timing)
        first_s = first_s or step_began - began + rollout.timing.ready_s
    return Stream(given=shown, frames=torch.cat(frames), timings=timings, first_frame_s=first_s)


def led_to(
    spec: ConditionSpec, held_down: Sequence[tuple[int, Tensor]], num_given: int
) -> Tensor | None:
    """Return the actions that led to given latent frames, [1 t ...]; None: there are none."""
    actions = [_latest(held_down, place) for place in range(num_given)]
    each = [held(spec, action) for action in actions if action is not None]
    return torch.stack(each, dim=1) if each else None


def _latest(held_down: Sequence[tuple[int, Tensor]], place: int) -> Tensor | None:
    """Return what is held at a latent frame; None: no actions steer the world."""
    return next((action for start, action in reversed(held_down) if start <= place), None)


def read_picture(path: str | Path, height: int, width: int) -> Float[Tensor, "1 1 3 h w"]:
    """Read a picture, or the first frame of a video, as a frame in [-1, 1].

    It is scaled until it covers the frame, and what stands out on two sides is cut off.

    Raises:
        FileNotFoundError, ValueError: no such file, or neither picture nor video.
    """
    return cover(pixels_to_frames(torch.from_numpy(read_video(path, 0, 1))), height, width)[None]


def cover(frames: Float[Tensor, "t 3 h w"], height: int, width: int) -> Float[Tensor, "t 3 h2 w2"]:
    """Scale frames in [-1, 1] until they cover a size, and cut off what stands out."""
    rows, columns = frames.shape[-2:]
    if (rows, columns) == (height, width):
        return frames
    scale = max(height / rows, width / columns)
    size = (max(height, round(rows * scale)), max(width, round(columns * scale)))
    frames = functional.interpolate(frames, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[..., top : top + height, left : left + width]
