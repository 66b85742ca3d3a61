"""What clients ask for, checked against the world and the limits before the host hears of it."""

from __future__ import annotations

import numpy as np
from einops import rearrange

from scd.models.shipped import Clips
from scd.serving.events import Action, Start
from scd.serving.messages import (
    ActionValue,
    Beginning,
    GuidanceChoice,
    Limits,
    ProtocolError,
    WorldInfo,
)
from scd.serving.uploads import Uploads
from scd.streaming.rollout import Guidance


class Checks:
    """Turns fields of messages into what the host takes, or refuses them."""

    def __init__(
        self, world: WorldInfo, limits: Limits, clips: Clips | None, uploads: Uploads
    ) -> None:
        """Check against these."""
        self.world, self.limits, self._clips, self._uploads = world, limits, clips, uploads

    def action(self, action: ActionValue | None) -> Action:
        """Return an action that fits the world.

        Raises:
            ProtocolError: unknown_action.
        """
        world = self.world
        if action is None:
            return None
        if not world.actions:
            raise ProtocolError("unknown_action", "nothing steers this world: send no action")
        if isinstance(action, tuple) != bool(world.action_dim):
            wanted = f"a vector of {world.action_dim} numbers" if world.action_dim else "a number"
            raise ProtocolError("unknown_action", f"an action of this world is {wanted}")
        if isinstance(action, tuple):
            if len(action) != world.action_dim:
                raise ProtocolError(
                    "unknown_action", f"needed {world.action_dim} entries, got {len(action)}"
                )
        elif action >= len(world.actions):
            known = f"0 .. {len(world.actions) - 1}"
            raise ProtocolError("unknown_action", f"actions are {known}, got {action}")
        return action

    def steps(self, steps: int | None) -> int | None:
        """Return a number of denoising steps within the limits (ProtocolError bad_field)."""
        if steps is not None and steps > self.limits.max_steps:
            raise ProtocolError(
                "bad_field", f"steps: at most {self.limits.max_steps} here, got {steps}"
            )
        return steps

    def count(self, count: int) -> int:
        """Return a number of frames of one step within the limits (ProtocolError bad_field)."""
        if count > self.limits.max_step_count:
            raise ProtocolError(
                "bad_field", f"count: at most {self.limits.max_step_count} here, got {count}"
            )
        return count

    def guidance(self, choice: GuidanceChoice | None) -> Guidance | None:
        """Return guidance that this world can give (ProtocolError bad_field)."""
        if choice is None:
            return None
        if choice.kind not in self.world.guidance:
            raise ProtocolError(
                "bad_field", f"guidance: this world has {list(self.world.guidance)}"
            )
        try:
            return Guidance(**vars(choice))
        except ValueError as error:
            raise ProtocolError("bad_field", f"guidance: {error}") from None

    def beginning(self, asked: Beginning) -> Start:
        """Turn what a client asks for into what a session begins with.

        Raises:
            ProtocolError: bad_field, unknown_action, unknown_clip or unknown_upload.
        """
        frames, actions = self._given(asked)
        num_labels = self.world.num_labels
        if (asked.label is None) == bool(num_labels) or (asked.label or 0) >= max(1, num_labels):
            wanted = f"one of 0 .. {num_labels - 1}" if num_labels else "none"
            raise ProtocolError("bad_field", f"label: this world wants {wanted}, got {asked.label}")
        return Start(
            seed=asked.seed,
            frames=frames,
            actions=actions,
            label=asked.label,
            num_steps=self.steps(asked.steps),
            guidance=self.guidance(asked.guidance),
        )

    def _given(self, asked: Beginning) -> tuple[np.ndarray | None, tuple[Action, ...]]:
        for name in ("clip", "upload"):
            if (getattr(asked, name) is not None) != (asked.start == name):
                raise ProtocolError("bad_field", f"{name}: goes with start {name!r}, and only so")
        if asked.action is not None and asked.start != "upload":
            raise ProtocolError("bad_field", "action: goes with start 'upload', and only so")
        if asked.start == "clip":
            return self._clip(asked.clip or 0)
        if asked.start == "upload":
            frames = self._uploads.frames(asked.upload or "")
            return frames, self._led_to(asked.action, len(frames))
        if self.world.needs_start:
            raise ProtocolError("bad_field", "start: this world cannot begin from nothing")
        return None, ()

    def _clip(self, number: int) -> tuple[np.ndarray, tuple[Action, ...]]:
        if self._clips is None or number >= len(self._clips.frames):
            raise ProtocolError("unknown_clip", f"this world has {self.world.clips} clips")
        frames = rearrange(self._clips.frames[number].numpy(), "t c h w -> t h w c")
        actions: tuple[Action, ...] = ()
        if self.world.actions:
            actions = tuple(self._clips.actions[number].tolist())
        return np.ascontiguousarray(frames), actions

    def _led_to(self, action: ActionValue | None, num_frames: int) -> tuple[Action, ...]:
        if not self.world.actions:
            self.action(action)
            return ()
        default = (0.0,) * self.world.action_dim if self.world.action_dim else 0
        return (self.action(default if action is None else action),) * num_frames
