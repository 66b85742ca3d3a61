"""Settings of what a model can learn to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scd.common.config import MAX_SIZE, added, at_least, within
from scd.models.wan.config import NUM_TIMES
from scd.optim.config import OptimConfig


@dataclass(frozen=True, kw_only=True)
class DenoiseConfig:
    """Settings of the denoising objective."""

    history: Literal["clean", "noisy"] = "clean"
    """What the model sees of earlier frames: the clean frames (teacher forcing, as in the paper),
    or the noisy frames themselves, some of them clean (the release's default for the separable
    model; FAR's training of the dense one)."""
    clean_fraction: float = 0.0
    """Share of frames that are given clean among the noisy ones and are left out of the loss, with
    history "noisy"; 0.1 in the release. The first frame of a model that must be given one is
    always among them."""
    num_draws: int = 2
    """Draws of (time, noise) per frame and step; one encoder pass serves them all: paper, section
    2.4."""
    num_target_frames: int = 0
    """Frames of each clip that are denoised, the last ones. 0: all that have a context."""
    time_mean: float = 0.0
    """Mean of the logit of time; 0 in the paper, above 0 gives more noise."""
    time_std: float = 1.0
    """Standard deviation of the logit of time."""
    context_noise: float = 0.05
    """Strength eta of the noise on the context in training: paper, equation 7. It must be 0 for a
    dense model, which has no context."""
    history_noise: float = 0.0
    """Largest deviation of noise on the clean history in training, drawn anew for each frame from
    0 to this (ours; 0 in the paper). Against drift: a stream reads its own imperfect frames."""
    condition_dropout: float = 0.1
    """Chance that an action or label is hidden, so that guidance has an unconditional branch."""

    def __post_init__(self) -> None:
        within(1, MAX_SIZE, num_draws=self.num_draws)
        at_least(0, num_target_frames=self.num_target_frames)
        for name in ("clean_fraction", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if min(self.context_noise, self.history_noise) < 0 or self.time_std <= 0:
            raise ValueError(
                "context_noise and history_noise must not be negative and time_std must be "
                f"positive, got {self.context_noise}, {self.history_noise} and {self.time_std}"
            )
        if self.history == "clean" and self.clean_fraction > 0:
            raise ValueError("clean_fraction has no effect on history='clean'")
        if self.history == "noisy" and self.history_noise > 0:
            raise ValueError("history_noise has no effect on history='noisy'")


@dataclass(frozen=True, kw_only=True)
class TeacherForcingConfig:
    """Settings of the loss. Where the paper is silent, the defaults are those of Self-Forcing."""

    shift: float = 5.0
    """Timestep shift of the table of times towards noise; 1: none."""
    weighting: Literal["bell", "none"] = "bell"
    """How errors count: by exp(-2 (time - 0.5)^2), less its smallest value, of mean 1 over the
    table, so that pure noise counts nothing; or all alike."""
    num_draws: int = 1
    """Draws of (time, noise) per frame and step; one encoder pass serves them all."""
    history_time: float = 0.0
    """Largest time of noise on the clean history, drawn for each frame from the entries of the
    table up to it; the model is told. 0: the history is clean."""
    context_noise: float = 0.0
    """Strength eta of noise on the context (paper, equation 7); 0 for a dense model, which has no
    context. The paper does not say whether it was used with Wan."""
    condition_dropout: float = 0.1
    """Chance that a clip's text gives way to the embedded empty prompt, so that guidance has an
    unconditional branch."""

    def __post_init__(self) -> None:
        within(1, MAX_SIZE, num_draws=self.num_draws)
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")
        if not 0 <= self.history_time <= 1 or not 0 <= self.condition_dropout < 1:
            raise ValueError(
                "history_time must lie in [0, 1] and condition_dropout in [0, 1), got "
                f"{self.history_time} and {self.condition_dropout}"
            )
        if self.context_noise < 0:
            raise ValueError(f"context_noise must be 0 or more, got {self.context_noise}")
        if self.history_time and not self.num_history_times:
            raise ValueError(
                f"history_time must be 0 or at least the table's smallest entry, got "
                f"{self.history_time}"
            )

    @property
    def num_history_times(self) -> int:
        """Entries of the table, its last ones, that are no larger than `history_time`."""
        # The table's formula turned round: time = shift u / (1 + (shift - 1) u).
        unbent = self.history_time / (self.shift - (self.shift - 1) * self.history_time)
        return int(unbent * NUM_TIMES + 1e-9)


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Settings of causal consistency distillation."""

    teacher: str = ""
    """World, run or step folder of the teacher; its latents and conditions are the student's."""
    guidance: float = 1.0
    """Strength with which the teacher's velocity is pushed away from that with hidden conditions;
    1: none, and one pass of the teacher instead of two."""
    num_grid_steps: int = 8
    """Steps of the grid of times between noise and frame on which the teacher's path is walked."""
    grid_shift: float = 1.0
    """Timestep shift of the grid; above 1 makes finer steps near noise."""
    num_teacher_steps: int = 4
    """Steps on the grid that the teacher takes before the target network jumps to the end. As many
    as the grid has: the teacher walks to the end, and the target network is not needed. One, as
    published, made a student that predicts clean frames collapse: docs/log.md."""
    target: Literal["online", "average"] = "online"
    """Weights of the network that jumps to the end: "online", the student's present ones, or
    "average", their moving average (`ema_decay`)."""
    huber: float = 0.03
    """Distance, as a deviation per value, from which on an error counts by its size and no longer
    by its square. 0: always by its square."""
    num_draws: int = 2
    """Draws of (time, noise) per frame and step; one encoder pass serves them all."""
    history_noise: float = 0.3
    """Largest deviation of noise on the clean history, the same for teacher and student, as in
    pre-training."""
    condition_dropout: float = 0.1
    """Chance that an action or label is hidden from teacher and student; 0 with guidance."""
    min_spread: float = 0.2
    """Stop if what the student generates varies less than this times as much as the data."""

    def __post_init__(self) -> None:
        _check_draws(self.num_draws, self.history_noise, self.condition_dropout)
        if not 1 <= self.num_teacher_steps <= self.num_grid_steps:
            raise ValueError(
                "num_teacher_steps must lie in 1 .. num_grid_steps, got "
                f"{self.num_teacher_steps} and {self.num_grid_steps}"
            )
        if self.grid_shift <= 0 or self.huber < 0 or self.guidance < 1:
            raise ValueError(
                "grid_shift must be above 0, huber 0 or more and guidance 1 or more, got "
                f"{self.grid_shift}, {self.huber} and {self.guidance}"
            )
        if self.target == "average" and self.num_teacher_steps == self.num_grid_steps:
            raise ValueError("target='average' has no effect: the teacher walks the whole grid")
        if self.guidance > 1 and self.condition_dropout > 0:
            raise ValueError(
                "a teacher guided by conditions has none to hide: condition_dropout must be 0, "
                f"got {self.condition_dropout}"
            )


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """Settings of plain regression at the times of the run's schedule."""

    num_draws: int = 2
    """Draws of (time, noise) per frame and step; one encoder pass serves them all."""
    history_noise: float = 0.3
    """Largest deviation of noise on the clean history, as in pre-training."""
    condition_dropout: float = 0.1
    """Chance that an action or label is hidden, so that guidance has an unconditional branch."""

    def __post_init__(self) -> None:
        _check_draws(self.num_draws, self.history_noise, self.condition_dropout)


def _check_draws(num_draws: int, history_noise: float, condition_dropout: float) -> None:
    within(1, MAX_SIZE, num_draws=num_draws)
    at_least(0, history_noise=history_noise)
    if not 0 <= condition_dropout < 1:
        raise ValueError(f"condition_dropout must lie in [0, 1), got {condition_dropout}")


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Settings of the matching of distributions."""

    teacher: str = ""
    """World, run or step folder of the teacher; its latents and conditions are the student's."""
    view: Literal["causal", "bidirectional"] = added("causal")
    """What teacher and critic see when they look at a frame: the clean frames before it; or all
    scored frames of the clip, as noisy as it is, as the published Wan does. Of dense Wan models
    only, with time_per "clip"."""
    critic_model: str = added("")
    """View "bidirectional": world of a dense Wan model, or folder of diffusers, that the critic
    begins as; empty: the teacher's. A smaller one saves memory."""
    critic_lora: int = added(0)
    """View "bidirectional", method "dmd": rank of low-rank additions (LoRA) that are the critic: it
    shares the teacher's weights, of which there is one copy then. Needs peft. 0: a critic of its
    own weights, all of which move."""
    method: Literal["dmd", "sid", "gan"] = "dmd"
    """How the student is pushed: by the difference of the scores, a constant (distribution
    matching); by score identity, with gradient through both networks; or by a discriminator on the
    critic's features."""
    guidance: float = 1.0
    """Strength with which the teacher's clean estimate is pushed away from that with hidden
    conditions; 1: none. Self-Forcing's 3 counts from the conditional one: it is 4 here."""
    num_given_frames: int = 4
    """Frames of each clip that are given; the others are generated. 0: from nothing."""
    num_scored_frames: int = 0
    """Last generated frames that carry gradient and are scored. 0: all."""
    num_draws: int = 2
    """Draws of (time, noise) per scored frame; one encoder pass serves them all."""
    score_shift: float = 5.0
    """Timestep shift of the uniform times of the scores towards noise; 1: none."""
    lowest_time: float = 0.02
    """Smallest time of a score."""
    highest_time: float = 0.98
    """Largest time of a score."""
    time_per: Literal["frame", "clip"] = "frame"
    """Whether each frame has its own time, and is normalised by itself, or all frames of a clip
    together as in Self-Forcing."""
    critic: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2e-5, decoder_lr_ratio=1.0, betas=(0.0, 0.999), warmup_steps=0, clip_norm=10.0
        )
    )
    """How the critic's weights move."""
    num_critic_updates: int = 5
    """Updates of the critic before each of the student, each on a rollout of its own."""
    critic_start: Literal["teacher", "student"] = "teacher"
    """Whose weights the critic starts from, and whose model it is."""
    max_rise: float = 10.0
    """Stop if the critic's loss is more than this times that of its first update, and worse than
    knowing nothing. 0: never."""
    min_spread: float = 0.2
    """Stop if what the student generates varies less than this times as much as the data."""
    alpha: float = 1.0
    """Method "sid": weight of the squared difference of the scores. 1 elsewhere."""
    relativistic: bool = False
    """Method "gan": only the difference of a real and a generated frame's logits counts."""
    roughness: float = 0.0
    """Method "gan": weight of the penalty on logits that change fast, around real and around
    generated frames (R1 and R2). 0: none."""

    def __post_init__(self) -> None:
        if not 0 < self.lowest_time < self.highest_time < 1 or self.score_shift <= 0:
            raise ValueError(
                "times of scores must rise from lowest_time to highest_time inside (0, 1) and "
                f"score_shift be above 0, got {self.lowest_time}, {self.highest_time} and "
                f"{self.score_shift}"
            )
        within(1, MAX_SIZE, num_draws=self.num_draws, num_critic_updates=self.num_critic_updates)
        at_least(1, guidance=self.guidance)
        at_least(
            0,
            num_given_frames=self.num_given_frames,
            num_scored_frames=self.num_scored_frames,
            max_rise=self.max_rise,
            min_spread=self.min_spread,
            roughness=self.roughness,
        )
        if self.view == "bidirectional":
            found = (self.time_per, self.critic_start, self.num_given_frames)
            if found != ("clip", "teacher", 0) or self.method == "gan":
                raise ValueError(
                    "view='bidirectional' needs time_per='clip', critic_start='teacher', "
                    "num_given_frames=0 and method 'dmd' or 'sid', got "
                    f"{', '.join(map(repr, found))} and {self.method!r}"
                )
        elif self.critic_model or self.critic_lora:
            raise ValueError("critic_model, critic_lora have no effect on view='causal'")
        within(0, MAX_SIZE, critic_lora=self.critic_lora)
        if self.critic_lora and (self.method != "dmd" or self.critic_model):
            raise ValueError(
                "critic_lora shares the teacher's weights: it needs method 'dmd' and no "
                f"critic_model, got {self.method!r} and {self.critic_model!r}"
            )
        if self.method == "gan" and self.guidance != 1:
            raise ValueError(f"guidance={self.guidance} has no effect on method='gan'")
        if self.method != "sid" and self.alpha != 1:
            raise ValueError(f"alpha={self.alpha} has no effect on method={self.method!r}")
        if self.method != "gan" and (self.relativistic or self.roughness):
            raise ValueError(f"relativistic, roughness have no effect on method={self.method!r}")

    @property
    def needs_clips(self) -> bool:
        """Whether it learns from recorded frames, not from prompts alone."""
        return self.method == "gan" or self.num_given_frames > 0

    def num_scored(self, num_frames: int, window: int) -> int:
        """Return how many frames of a clip, given and generated, are scored by teacher and critic
        that were trained on `window` frames; ValueError if none is generated or more than that are
        scored."""
        num_generated = num_frames - self.num_given_frames
        num_scored = self.num_scored_frames or num_generated
        if num_generated < 1 or num_scored > num_generated:
            raise ValueError(
                f"clips of {num_frames} frames, {self.num_given_frames} of them given, leave "
                f"{num_generated} to generate, of which {num_scored} are to be scored"
            )
        # What is scored must not look like the beginning of a clip where it is none.
        num_before = int(num_scored < num_frames and self.view == "causal")
        if num_scored + num_before > window:
            raise ValueError(
                f"{num_scored} scored frames and what they follow are more than the {window} "
                "frames that the teacher was trained on: set num_scored_frames lower"
            )
        return num_scored


ObjectiveConfig = (
    DenoiseConfig | TeacherForcingConfig | ConsistencyConfig | RegressionConfig | MatchConfig
)
"""What a model can learn to do."""
