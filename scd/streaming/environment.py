"""A world as a Gymnasium environment, so that agents can be trained inside it; several at once too.

An observation is a frame as 8-bit pixels [h, w, 3], an action what the world is steered by. A world
knows no rewards and never ends by itself: a function of yours says what a frame is worth and
whether it was the last, and episodes are cut off after a number of frames.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate
from torch import Tensor

from scd.data.actions import flat, space_of
from scd.data.clip import Conditions, check_actions, frames_to_pixels
from scd.data.given import Whole, as_whole
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.engine.interface import Engine
from scd.engine.open import open_engine
from scd.models.checkpoint import World, as_world
from scd.models.clips import Clips
from scd.models.flow import with_num_steps
from scd.streaming.rollout import Rollout
from scd.streaming.sessions import Session, Streams
from scd.streaming.start import NUM_GIVEN
from scd.streaming.steering import Action, as_actions, nothing
from scd.streaming.texts import WorldTexts

Frame = np.ndarray
"""Pixels [h, w, 3], uint8."""

Judgement = Callable[[Frame, Any], tuple[float, bool]]
"""Says of a frame, and the action that led to it, what it is worth and whether it was the last."""

SEEDS = 2**31
"""Seeds of streams are drawn below this number."""


def worthless(frame: Frame, action: Any) -> tuple[float, bool]:
    """Judge nothing: no rewards, no end."""
    return 0.0, False


MAX_PROMPT = 2000
"""Characters of a prompt that is an action; the text encoder takes a number of tokens."""


def spaces(card: DataCard) -> tuple[gym.spaces.Box, gym.Space]:
    """Return the spaces of a world's frames and of its actions; of a world that a text alone
    steers, an action is a prompt.

    Raises:
        ValueError: the world has neither actions nor a text, or needs labels.
    """
    spec: ConditionSpec = card.conditions
    if not (spec.has_actions or spec.has_text) or spec.num_labels:
        raise ValueError("an environment needs a world that is steered by actions or by a text")
    frames = gym.spaces.Box(0, 255, (card.height, card.width, 3), np.uint8)
    if spec.has_actions:
        return frames, space_of(spec)
    # What is typed; other characters are taken too.
    return frames, gym.spaces.Text(MAX_PROMPT, min_length=0, charset=string.printable)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where episodes begin: from nothing, or from frames of a clip drawn at random."""

    clips: Clips | None
    """None: from nothing."""
    num_given: int
    """Frames of a clip that a stream is given."""

    @staticmethod
    def of(world: World, clips: Clips | None, num_given: int | None) -> Start:
        """Begin from clips that are given, else the world's own, else from nothing.

        A world that was taught to begin from nothing does so unless clips are given. Without
        num_given: 16 frames of a clip, or all if it is shorter.

        Raises:
            ValueError: num_given that no clip has.
        """
        if clips is None and not world.begins_from_nothing and len(world.clips):
            clips = world.clips
        most = NUM_GIVEN if clips is None else min(NUM_GIVEN, clips.frames.shape[1])
        # Of video whole latent frames are given.
        whole = most - (most - 1) % world.autoencoder.config.frames_per_latent
        return Start(clips=clips, num_given=whole if num_given is None else num_given)

    def __post_init__(self) -> None:
        if self.clips is None:
            return
        length = self.clips.frames.shape[1]
        if not 0 < self.num_given <= length:
            raise ValueError(f"num_given must be 1 .. {length}, as a clip, got {self.num_given}")

    def draw(self, generator: np.random.Generator) -> tuple[int, Tensor | None, Conditions | None]:
        """Return the seed of a stream, its given frames [t 3 h w], and their conditions."""
        seed = int(generator.integers(SEEDS))
        if self.clips is None:
            return seed, None, None
        number = int(generator.integers(len(self.clips.frames)))
        actions = self.clips.actions[number, : self.num_given]
        frames = self.clips.pixels(number, self.num_given)
        return seed, frames, Conditions(actions=actions[None])


def as_given(action: Any, space: gym.Space[Any], spec: ConditionSpec) -> Any:
    """Return an action of a space as a model is given it, and others as they are typed.

    Raises:
        ValueError: a number outside a space that does not begin to count at 0.
    """
    if not spec.action_parts:
        return action
    if space.contains(action):
        return torch.as_tensor(flat(spec, action))[None]
    if spec.num_actions and not isinstance(action, (str, Mapping)):
        raise ValueError(f"an action must be in {space}, got {action!r}")
    return action


def pixels(frame: Tensor) -> Frame:
    """Return a frame [3 h w] in [-1, 1] as pixels."""
    return frames_to_pixels(frame[None].cpu())[0].numpy()


def texts_of(world: World, *prompts: str) -> WorldTexts | None:
    """Return what embeds prompts of a world, with those at hand, where they are not empty; None: no
    text steers it.

    Raises:
        ValueError: a prompt for a world that takes none.
    """
    texts = WorldTexts(world) if world.card.conditions.has_text else None
    for prompt in filter(None, prompts):
        embedded(texts, prompt)
    return texts


def embedded(texts: WorldTexts | None, prompt: str) -> Tensor:
    """Embed a prompt (ValueError: it is empty, or of a world that takes none)."""
    if texts is None:
        raise ValueError("this world is not steered by a text: it takes no prompt")
    return texts.embed(prompt)


def text_of(texts: WorldTexts | None, prompt: str) -> Tensor | None:
    """Embed the prompt with which a stream begins; None: no text steers the world.

    Raises:
        ValueError: a world that a text steers needs a prompt, or takes none.
    """
    if texts is not None and not prompt:
        raise ValueError('a text steers this world: WorldEnv(..., prompt="a red car")')
    return embedded(texts, prompt) if prompt else None


class WorldEnv(gym.Env[Frame, Any]):
    """One stream of a world as an environment: `reset`, then `step` with an action per frame.

    Where a latent frame stands for several frames of video, a step makes all of them: the last one
    is observed, and all are in what `step` tells besides, as "frames" [t h w 3].

    A text that steers the world is its prompt, which `change_prompt` and the option "prompt" of
    `reset` change. Where a text alone steers it, an action is the prompt from that step on; an
    empty one leaves it as it is.
    """

    def __init__(
        self,
        world: World | str | PathLike[str],
        judge: Judgement = worthless,
        max_frames: Whole = 300,
        num_steps: Whole | None = None,
        clips: Clips | None = None,
        num_given: int | None = None,
        render_mode: str | None = None,
        prompt: str = "",
    ) -> None:
        """Wrap a world.

        Args:
            world: steered by actions, a text, or both; or its name, as `scd.load` takes it.
            judge: reward and end of a frame.
            max_frames: frames after which an episode is cut off (truncated).
            num_steps: denoising steps per frame; None: as the checkpoint says.
            clips: where episodes begin, drawn at random; None: the world's own, or from nothing
                where it has none or was taught to begin so.
            num_given: frames of a clip that the stream is given; None: 16, or all it has.
            render_mode: "rgb_array" or None.
            prompt: of a world that a text steers; empty: `reset` is told.

        Raises:
            ValueError: a world that neither actions nor a text steer, a prompt that none needs or
                that is too long, max_frames below 1, or num_given that no clip has.
            OSError: no world of this name.
        """
        world = as_world(world)
        length = as_length(max_frames, render_mode)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": world.card.fps}
        self.observation_space, self.action_space = spaces(world.card)
        self.render_mode, self.judge, self.max_frames = render_mode, judge, length
        self._start = Start.of(world, clips, num_given)
        self._rollout = Rollout(world, engine=open_engine(world.model, "fast"))
        if num_steps is not None:
            self._rollout.num_steps = num_steps
        self._texts = texts_of(world, prompt)
        self.prompt = prompt
        """In words; empty: none yet."""
        self._frame: Frame | None = None
        self._count = 0

    def change_prompt(self, prompt: str, recompute: bool = False) -> None:
        """Steer by another text from the next step on.

        Args:
            prompt: in words.
            recompute: as of `Rollout.change_text`.

        Raises:
            ValueError: before `reset`, no text steers this world, or a prompt that is empty.
        """
        self._rollout.change_text(embedded(self._texts, prompt), recompute=recompute)
        self.prompt = prompt

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """Begin an episode; the same seed begins the same one.

        Args:
            seed: of the starts from here on; None: as they come.
            options: "prompt" of a world that a text steers; none: as before.

        Raises:
            ValueError: a text steers the world and there is no prompt.
        """
        super().reset(seed=seed)
        rollout, spec = self._rollout, self._rollout.world.card.conditions
        prompt = (options or {}).get("prompt", self.prompt)
        text, self.prompt = text_of(self._texts, prompt), prompt
        self._count = 0
        rollout.seed, frames, conditions = self._start.draw(self.np_random)
        given = None if frames is None else frames[None]
        conditions = replace(conditions or Conditions(), text=text)
        rollout.begin(given, conditions, can_reset=False, from_nothing=True)
        if frames is None:
            idle = nothing(spec)[None] if spec.has_actions else None
            first = rollout.step_video(idle)[0, -1]
        else:
            first = frames[-1]
        self._frame = pixels(first)
        return self._frame.copy(), {}

    def step(self, action: Any) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """Take an action; return frame, reward, whether it ended, whether it was cut off, and
        "frames" where a step makes several.

        Args:
            action: as `Rollout.step` of one stream takes it; a prompt, where a text alone steers.

        Raises:
            ValueError: before `reset`, or an action outside the space.
        """
        if self._frame is None:
            raise ValueError("reset the environment first")
        frames = self._made(action)
        self._frame = pixels(frames[-1])
        self._count += 1
        reward, ended = self.judge(self._frame, action)
        told: dict[str, Any] = {}
        if self._rollout.world.autoencoder.config.is_video:
            told["frames"] = frames_to_pixels(frames.cpu()).numpy()
        cut = self._count >= self.max_frames
        return self._frame.copy(), float(reward), bool(ended), cut, told

    def _made(self, action: Any) -> Tensor:
        """Return the frames [t 3 h w] that an action leads to."""
        spec = self._rollout.world.card.conditions
        if spec.has_actions:
            return self._rollout.step_video(as_given(action, self.action_space, spec))[0]
        if not isinstance(action, str):
            raise ValueError(f"an action of this world is its prompt, or an empty one: {action!r}")
        if action:
            self.change_prompt(action)
        return self._rollout.step_video()[0]

    def render(self) -> Frame | None:  # type: ignore[override]
        """Return the newest frame with render_mode "rgb_array", else None."""
        if self.render_mode is None or self._frame is None:
            return None
        return self._frame.copy()


@dataclass(frozen=True, kw_only=True)
class VectorState:
    """All that a WorldVectorEnv is at some moment; for its `set_state`, and nobody else."""

    engine: Engine
    """Of the environment it is of."""
    rollouts: tuple[Rollout, ...]
    """Copies of the streams."""
    frames: np.ndarray
    """Newest frame of each."""
    counts: np.ndarray
    """Frames of each episode so far."""
    is_over: np.ndarray
    """Which of them begin anew in the next step."""
    generator: Mapping[str, Any]
    """State of what draws starts and seeds."""
    prompts: tuple[str, ...]
    """Of each, of a world that a text steers."""


class WorldVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Several streams of a world that share calls of the network, each with episodes of its own.

    A stream whose episode has ended, or was cut off, begins a new one in the next `step`, whatever
    action it is given there (Gymnasium's next-step mode), unless `reset` began it before.

    `get_state` and `set_state` go back to a moment: the same actions then lead to the same frames,
    rewards and starts, to the bit.

    Of a world that a text steers each stream has a prompt, which `change_prompt` and the option
    "prompt" of `reset` change. Where a text alone steers it, actions are prompts from that step on;
    an empty one leaves its stream as it is. Where a latent frame stands for several frames of
    video, what `step` tells has "frames", an array [t h w 3] of each stream.
    """

    def __init__(
        self,
        world: World | str | PathLike[str],
        num_envs: Whole,
        judge: Judgement = worthless,
        max_frames: Whole = 300,
        num_steps: Whole | None = None,
        clips: Clips | None = None,
        num_given: int | None = None,
        prompt: str | Sequence[str] = "",
    ) -> None:
        """Wrap a world; arguments as of WorldEnv, and how many streams.

        Raises:
            ValueError: as WorldEnv, num_envs below 1, or another number of prompts.
        """
        world = as_world(world)
        number = as_whole(num_envs, "num_envs", 1)
        self.prompts = _each_prompt(prompt, number)
        """Of each stream, in words; empty: none yet."""
        self._texts = texts_of(world, *self.prompts)
        self.num_envs, self.judge, self.max_frames = number, judge, as_length(max_frames, None)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_fps": world.card.fps}
        self.single_observation_space, self.single_action_space = spaces(world.card)
        self.observation_space = batch_space(self.single_observation_space, number)
        self.action_space = batch_space(self.single_action_space, number)
        self._start = Start.of(world, clips, num_given)
        steps = None if num_steps is None else as_whole(num_steps, "num_steps", 1)
        sampling = with_num_steps(world.sampling, steps)
        engine = open_engine(world.model, "fast")
        self._streams = Streams(world, engine, sampling, max_rows=number)
        self._sessions: list[Session] = []
        shape = self.single_observation_space.shape or ()
        self._frames = np.zeros((number, *shape), dtype=np.uint8)
        self._made: list[np.ndarray] = [self._frames[:0]] * number
        self._counts = np.zeros(number, dtype=np.int64)
        self._is_over = np.ones(number, dtype=bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:  # type: ignore[override]
        """Begin an episode in every stream; the same seed begins the same ones.

        Args:
            seed: of the starts from here on; None: as they come.
            options: "reset_mask", a Boolean for each stream: only those begin, the others stay.
                "prompt" of a world that a text steers, of all streams or of each; none: as before.

        Raises:
            ValueError: a mask of another shape, or of some streams where none has begun, or a text
                steers the world and there is no prompt.
            RuntimeError: a stream was stopped, with the reason.
        """
        mask = self._reset_mask(options)
        prompts = _each_prompt((options or {}).get("prompt", self.prompts), self.num_envs)
        for prompt in prompts:
            text_of(self._texts, prompt)
        self.prompts = prompts
        if seed is not None:
            self._np_random, self._np_random_seed = np_random(seed)
        if mask.all():
            self._close()
        for number in np.flatnonzero(mask):
            self._renew(int(number))
        self._wait()
        return self._frames.copy(), {}

    def _reset_mask(self, options: dict[str, Any] | None) -> np.ndarray:
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if mask.dtype != bool or mask.shape != (self.num_envs,):
            raise ValueError(
                f"reset_mask must be {self.num_envs} Booleans, got {mask.dtype} {list(mask.shape)}"
            )
        if not self._sessions and not mask.all():
            raise ValueError("reset all environments first")
        return mask

    def change_prompt(self, prompt: str | Sequence[str], recompute: bool = False) -> None:
        """Steer by other texts from the next step on.

        Args:
            prompt: of all streams, or of each.
            recompute: as of `Rollout.change_text`.

        Raises:
            ValueError: before `reset`, no text steers this world, or a prompt that is empty.
        """
        prompts = _each_prompt(prompt, self.num_envs)
        texts = [embedded(self._texts, one) for one in prompts]
        if not self._sessions:
            raise ValueError("reset the environments first")
        for session, text in zip(self._sessions, texts, strict=True):
            session.rollout.change_text(text, recompute=recompute)
        self.prompts = prompts

    def step(
        self, actions: Action
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take an action in each stream, or begin anew where an episode is over.

        Args:
            actions: of all streams or of each, as `Rollout.step` takes them.

        Raises:
            ValueError: before `reset`, or actions outside the space.
            RuntimeError: a stream was stopped, with the reason.
        """
        if not self._sessions:
            raise ValueError("reset the environments first")
        taken, known = self._taken(actions)
        begins, self._made = self._is_over.copy(), [self._frames[:0]] * self.num_envs
        for number, action in enumerate(taken):
            if begins[number]:
                self._renew(number)
            else:
                self._streams.request(self._sessions[number], action)
        self._wait()
        frames = self._frames.copy()
        rewards, ended = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=bool)
        for number in np.flatnonzero(~begins):
            rewards[number], ended[number] = self.judge(frames[number], known[int(number)])
        self._counts += ~begins
        cut = ~begins & (self._counts >= self.max_frames)
        self._is_over = ended | cut
        is_video = self._streams.world.autoencoder.config.is_video
        return frames, rewards, ended, cut, {"frames": self._made} if is_video else {}

    def _taken(self, actions: Action) -> tuple[Sequence[Tensor | None], Sequence[Any]]:
        """Return the action of each stream as the model takes it, and as a judge is told it."""
        card, each = self._streams.world.card, None
        if not card.conditions.has_actions:
            prompts = _each_prompt(actions, self.num_envs)
            if any(prompts):
                pairs = zip(prompts, self.prompts, strict=True)
                self.change_prompt([new or old for new, old in pairs])
            return [None] * self.num_envs, prompts
        if card.conditions.action_parts and self.action_space.contains(actions):
            each = list(iterate(self.action_space, actions))
            actions = torch.from_numpy(np.stack([flat(card.conditions, one) for one in each]))
        taken = as_actions(actions, card, self.num_envs)
        if taken is None or len(taken) != self.num_envs:
            came = "none" if taken is None else len(taken)
            raise ValueError(f"{self.num_envs} environments need as many actions, got {came}")
        check_actions(card.conditions, taken)
        return list(taken), each or list(taken.numpy(force=True))

    def get_state(self) -> VectorState:
        """Return all that the streams are now: past, noise, episodes, and the draws to come.

        It takes as much memory as they do, and stays as it is.

        Raises:
            ValueError: before `reset`, or a stream was stopped.
        """
        if not self._sessions:
            raise ValueError("reset the environments first")
        for session in self._sessions:
            if not session.is_open:
                raise ValueError(f"reset the environments first: {session.reason}")
        return VectorState(
            engine=self._streams.engine,
            rollouts=tuple(session.rollout.fork() for session in self._sessions),
            frames=self._frames.copy(),
            counts=self._counts.copy(),
            is_over=self._is_over.copy(),
            generator=self.np_random.bit_generator.state,
            prompts=self.prompts,
        )

    def set_state(self, state: object) -> None:
        """Go back to a moment of these environments, as often as wanted.

        Raises:
            ValueError: it is not what `get_state` of these environments returned.
        """
        if not isinstance(state, VectorState):
            raise ValueError(f"needed what get_state returned, got {type(state).__name__}")
        if state.engine is not self._streams.engine:
            raise ValueError("needed a state of these environments, got one of others")
        self._close()
        self._sessions = [self._streams.adopt(rollout.fork()) for rollout in state.rollouts]
        self._frames, self.prompts = state.frames.copy(), state.prompts
        self._counts, self._is_over = state.counts.copy(), state.is_over.copy()
        self.np_random.bit_generator.state = dict(state.generator)

    def _close(self) -> None:
        for session in self._sessions:
            self._streams.close(session)
        self._sessions = []

    def _renew(self, number: int) -> None:
        """Open a stream in the place of one; its first frame is given, or asked for."""
        seed, given, conditions = self._start.draw(self.np_random)
        if number < len(self._sessions):
            self._streams.close(self._sessions[number])
        text = text_of(self._texts, self.prompts[number])
        session = self._streams.open(given, replace(conditions or Conditions(), text=text), seed)
        self._sessions[number : number + 1] = [session]
        self._counts[number], self._is_over[number] = 0, False
        if given is None:
            spec = self._streams.world.card.conditions
            self._streams.request(session, nothing(spec) if spec.has_actions else None)
        else:
            self._frames[number] = pixels(given[-1])

    def _wait(self) -> None:
        """Make all frames that were asked for."""
        while self._streams.is_busy:
            for finished in self._streams.tick():
                if finished.frames is None:
                    raise RuntimeError(finished.error)
                number = self._sessions.index(finished.session)
                self._made[number] = frames_to_pixels(finished.frames.cpu()).numpy()
                self._frames[number] = self._made[number][-1]


def _each_prompt(prompt: Any, num_envs: int) -> tuple[str, ...]:
    """Return the prompt of each stream (ValueError: neither words nor as many as streams)."""
    prompts = (prompt,) * num_envs if isinstance(prompt, str) else prompt
    is_list = isinstance(prompts, Sequence | np.ndarray) and len(prompts) == num_envs
    if not is_list or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"{num_envs} environments take a prompt, or one of each, got {prompt!r}")
    return tuple(map(str, prompts))


def as_length(max_frames: Whole, render_mode: str | None) -> int:
    """Return the length of episodes; settings that no environment can have are refused.

    Raises:
        ValueError: max_frames below 1, or a mode of rendering that there is not.
    """
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be 'rgb_array' or None, got {render_mode!r}")
    return as_whole(max_frames, "max_frames", 1)
