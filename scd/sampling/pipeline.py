"""A run as a pipeline, called as those of diffusers are.

pipe = SCDPipeline.from_pretrained("runs/wan-4-steps").to("cuda")
frames = pipe("a red cat runs over the snow", num_frames=81).frames[0]
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from scd.autoencoders.config import FRAMES_PER_LATENT
from scd.common.config import Precision
from scd.common.names import refuse_unknown
from scd.common.runtime import choose_device, cpu_threads
from scd.data.clip import Conditions, frames_to_pixels, pixels_to_frames
from scd.models.names import find_world
from scd.models.weights import choose_dtype
from scd.sampling.settings import VideoConfig
from scd.sampling.text_to_video import TextToVideo, cover, is_steered_by_text, led_to
from scd.streaming.rollout import Rollout

PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""Precision of a model by the type of its weights."""

OutputType = Literal["np", "pt", "pil", "latent"]
"""Frames as arrays [b t h w 3] or tensors [b t 3 h w] in [0, 1], as lists of pictures, or latents
of unit scale [b t c h w]."""


@dataclass(frozen=True, kw_only=True)
class SCDPipelineOutput:
    """What a pipeline returns."""

    frames: Any
    """Of each prompt; see OutputType."""


class SCDPipeline:
    """Text to video, frame after frame, behind the call that users of diffusers know.

    The run is opened when it is first needed, so that `to` costs nothing. `stream` gives the frames
    as they come.
    """

    def __init__(self, config: VideoConfig) -> None:
        """Describe a pipeline; see `from_pretrained`."""
        if config.offload:
            raise ValueError("offload is for scd sample and scd vbench, which decode at the end")
        self.config = config
        self._parts: TextToVideo | None = None

    @classmethod
    def from_pretrained(
        cls,
        run: str | os.PathLike[str],
        source: str = "",
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        **settings: Any,
    ) -> SCDPipeline:
        """Describe a run's pipeline.

        Args:
            run: run or world folder whose model a text steers, or its name on the hub.
            source: folder with vae/, text_encoder/ and tokenizer/ as diffusers writes them, or its
                name on the hub; empty: where the run says.
            torch_dtype: of the model: float32 or bfloat16, or its name; None: bfloat16.
            dtype: the same, by its newer name.
            revision: branch, tag or commit on the hub; None: the newest.
            settings: other fields of VideoConfig.

        Raises:
            FileNotFoundError: no such run.
            ValueError: a run that no text steers, or settings that do not fit, such as `offload`.
        """
        names = {field.name for field in fields(VideoConfig)}
        unknown = {name: value for name, value in settings.items() if name not in names}
        refuse_unknown(unknown, cls.from_pretrained, names)
        wanted = choose_dtype(dtype, torch_dtype) or torch.bfloat16
        if wanted not in PRECISIONS:
            raise ValueError(f"torch_dtype must be float32 or bfloat16, got {wanted}")
        folder = os.fspath(find_world(run, revision))
        if not is_steered_by_text(folder):
            raise ValueError(f"{run} is not steered by a text: it takes no prompt")
        config = VideoConfig(run=folder, source=source, precision=PRECISIONS[wanted], **settings)
        return cls(config)

    def to(self, device: torch.device | str) -> SCDPipeline:
        """Let it run on a device from now on, and return itself.

        Raises:
            ValueError: the device does not exist here.
        """
        if choose_device(str(device)) != choose_device(self.config.device):
            self._parts = None
        self.config = replace(self.config, device=str(device))
        return self

    @property
    def parts(self) -> TextToVideo:
        """The run, opened.

        Raises:
            FileNotFoundError, ValueError: parts that are missing, or do not fit.
        """
        if self._parts is None:
            self._parts = TextToVideo(self.config)
        return self._parts

    @property
    def fps(self) -> float:
        """Frames per second at which the frames are meant to be watched."""
        return self.parts.fps

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        prompt_embeds: Float[Tensor, "b l _"] | None = None,
        image: Image.Image | Float[Tensor, "3 h w"] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> SCDPipelineOutput | tuple[Any]:
        """Make videos of prompts, one after the other.

        Args:
            prompt: one, or several.
            negative_prompt: what guidance leads away from; None: as the pipeline's settings say.
            height: rows of a frame; only the run's own will do.
            width: columns of a frame; only the run's own will do.
            num_frames: frames at the run's pace. Only latent frames as a whole are computed; what
                is too much is cut off.
            num_inference_steps: denoising steps per latent frame; None: as the checkpoint says.
            guidance_scale: 1: none; None: as the pipeline's settings say.
            generator: gives the seed of the noise, the one it was made with; each further prompt
                takes the next one. None: 0.
            prompt_embeds: embedded prompts instead of `prompt`.
            image: the first frame, in [0, 1] if it is a tensor.
            output_type: see OutputType.
            return_dict: return an object with `frames`, not a tuple.

        Raises:
            ValueError: neither prompt nor embeddings or both, prompts that are empty, another size
                than the run's.
        """
        if output_type not in get_args(OutputType):
            raise ValueError(
                f"output_type must be one of {list(get_args(OutputType))}, got {output_type!r}"
            )
        self._check_size(height, width)
        texts = self._texts(prompt, prompt_embeds)
        null_text = self.parts.embed_negative(negative_prompt, guidance_scale)
        given = None if image is None else self._encoded(image)
        seed = 0 if generator is None else generator.initial_seed()
        with cpu_threads(self.parts.threads):
            videos = []
            for number, text in enumerate(texts.split(1)):
                stream = self.parts.stream(seed + number, guidance_scale, num_inference_steps)
                steps = self._steps(stream, text, null_text, given, num_frames)
                if output_type == "latent":
                    videos.append(torch.cat([latents for _, latents in steps]))
                else:
                    videos.append(self._cut(torch.cat([frames for frames, _ in steps]), num_frames))
        frames = _as_output(videos, output_type)
        return SCDPipelineOutput(frames=frames) if return_dict else (frames,)

    def stream(
        self,
        prompt: str,
        num_frames: int = 81,
        generator: torch.Generator | None = None,
    ) -> Iterator[Float[Tensor, "t 3 h w"]]:
        """Give the frames of a video in [0, 1] as they come, those of a latent frame at a time."""
        text, null_text = self._texts(prompt, None), self.parts.embed_negative()
        seed = 0 if generator is None else generator.initial_seed()
        for frames, _ in self._steps(self.parts.stream(seed), text, null_text, None, num_frames):
            yield _unit(frames)

    def _steps(
        self,
        stream: Rollout,
        text: Tensor,
        null_text: Tensor | None,
        given: Tensor | None,
        num_frames: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Give frames [t 3 h w] and latents [t c h w] of one video, on the CPU, as they come."""
        held = sorted(self.parts.held().items())
        action = held[0][1] if held else None
        num_given = 0 if given is None else given.shape[1]
        led = led_to(self.parts.world.card.conditions, held, num_given)
        conditions = Conditions(actions=led, text=text, null_text=null_text)
        shown = stream.begin(conditions=conditions, latents=given, can_reset=False)
        if given is not None:
            yield shown[0].cpu(), given[0].cpu()
        num_latents = self.parts.num_latents(num_frames)
        while stream.num_frames < num_latents:
            frames = stream.step_video(action)
            assert stream.newest is not None
            # Of one stream: a latent frame, or a block of them.
            yield frames[0].cpu(), stream.newest.flatten(0, -4).float().cpu()

    def _texts(self, prompt: str | Sequence[str] | None, embedded: Tensor | None) -> Tensor:
        if (prompt is None) == (embedded is None):
            raise ValueError("needed either prompt or prompt_embeds")
        if embedded is not None:
            if not len(embedded):
                raise ValueError("needed one embedded prompt or more, got none")
            return embedded
        return self.parts.embed([prompt] if isinstance(prompt, str) else list(prompt or ()))

    def _check_size(self, height: int | None, width: int | None) -> None:
        card = self.parts.world.card
        if (height or card.height, width or card.width) != (card.height, card.width):
            raise ValueError(
                f"this run makes frames of {card.height}x{card.width}, got {height}x{width}"
            )

    def _encoded(self, image: Image.Image | Tensor) -> Tensor:
        card = self.parts.world.card
        if isinstance(image, Tensor):
            shape, dtype = list(image.shape), str(image.dtype).removeprefix("torch.")
            is_picture = image.ndim == 3 and shape[0] == 3 and image.is_floating_point()
            # NaN is passed on by both.
            low, high = (float(one) for one in image.aminmax()) if is_picture else (0.0, 0.0)
            if not is_picture or not (-0.01 <= low and high <= 1.01):
                raise ValueError(
                    f"an image is a picture of PIL, or floats [3, rows, columns] in [0, 1], got "
                    f"{dtype} {shape}" + (f" in {low:.4g} .. {high:.4g}" if is_picture else "")
                )
            frame = image.float() * 2 - 1
        else:
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
            frame = pixels_to_frames(pixels[None])[0]
        return self.parts.encode(cover(frame[None], card.height, card.width)[None])

    def _cut(self, frames: Tensor, num_frames: int) -> Tensor:
        """Cut off what is too much, if there is a frame of video for each at the run's pace."""
        whole = self.parts.decoder.pictures_per_latent == FRAMES_PER_LATENT
        return frames[:num_frames] if whole else frames


def _unit(frames: Tensor) -> Tensor:
    return (frames.clamp(-1, 1) + 1) / 2


def _as_output(videos: list[Tensor], output_type: str) -> Any:
    if output_type == "latent":
        return torch.stack(videos)
    if output_type == "pil":
        return [
            [Image.fromarray(picture) for picture in frames_to_pixels(video).numpy()]
            for video in videos
        ]
    frames = _unit(torch.stack(videos))
    return rearrange(frames, "b t c h w -> b t h w c").numpy() if output_type == "np" else frames
