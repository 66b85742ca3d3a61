"""Stage two of Wan: a causal student of few steps.

Its start is Causal-Forcing's: consistency along the path of the causal teacher itself, on recorded
latents. Then Self-Forcing's recipe: rollouts from nothing on prompts, scored as whole clips by the
published model, guided, and by a critic that follows the student. Both are runs of the one loop.
Source: paper (distillation), Self-Forcing, Causal-Forcing.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from scd.autoencoders.text_encoder import TextConfig
from scd.common.launcher import num_started
from scd.data.prompts import PromptsInfo, is_prompts, read_prompts_info
from scd.models.checkpoint import resolve
from scd.models.config import SamplingConfig
from scd.models.flow import schedule
from scd.models.wan.config import FEW_STEPS, NUM_TIMES
from scd.models.wan.timesteps import warped_times
from scd.objectives.config import MatchConfig
from scd.preprocessing.prompts import embed_prompts
from scd.training.config import TrainConfig
from scd.training.fit import check_rollout, like_initial
from scd.training.presets import (
    WAN_CONSISTENCY,
    WAN_DMD,
    WanConsistencyChoice,
    WanDmdChoice,
    WanSteps,
)
from scd.training.teacher import find_bidirectional


def wan_distillation(choice: WanDmdChoice) -> TrainConfig:
    """Return the run that a choice means: an ordinary run, whose every field may be changed.

    Raises:
        FileNotFoundError: there is nothing to start from.
        ValueError: prompts or teacher are not named, or the world is not of Wan.
    """
    for name in ("prompts", "teacher"):
        if not getattr(choice, name):
            raise ValueError(f"scd distill wan-dmd RUN needs --{name}")
    run = like_initial(WAN_DMD, choice.run)
    if run.model.conditions.has_actions:
        raise ValueError(
            f"{choice.run} is steered by actions, which no bidirectional teacher knows: scd "
            "distill TEACHER --data LATENTS --method dmd matches it to the causal one"
        )
    return _of_teacher(run, choice, choice.teacher, "wan-dmd")


def wan_consistency(choice: WanConsistencyChoice) -> TrainConfig:
    """Return the run that a choice means: an ordinary run, whose every field may be changed.

    Raises:
        FileNotFoundError: there is no teacher, or nothing to start from.
        ValueError: no data is named, or the world is not of Wan.
    """
    if not choice.data:
        raise ValueError(
            "scd distill wan-consistency TEACHER needs --data LATENTS, with prompts (scd encode)"
        )
    run = like_initial(WAN_CONSISTENCY, choice.initial or choice.teacher)
    return replace(_of_teacher(run, choice, choice.teacher, "wan-consistency"), data=choice.data)


def _of_teacher(run: TrainConfig, choice: WanSteps, teacher: str, name: str) -> TrainConfig:
    """Return a run with its student's steps and its teacher."""
    sampling = _few_steps(choice, run.sampling)
    if (Path(teacher) / "last").is_file():
        # One step of a run, so that the teacher stays the same when its own training goes on.
        teacher = str(resolve(teacher))
    return replace(
        run,
        out=f"runs/out/{name}-{sampling.num_steps}",
        sampling=sampling,
        objective=replace(run.objective, teacher=teacher),
    )


def _few_steps(choice: WanSteps, start: SamplingConfig) -> SamplingConfig:
    """Return the student's steps; `start` are those of the world that it starts from."""
    if not choice.steps and start.solver == "renoise":
        times, first = tuple(schedule(start).tolist()[:-1]), start.first_times
    else:
        times, first = _warped("steps", choice.steps or FEW_STEPS, choice.shift), ()
    if choice.first_steps:
        first = _warped("first_steps", choice.first_steps, choice.shift)
    return SamplingConfig(
        num_steps=len(times), schedule="listed", times=times, solver="renoise", first_times=first
    )


def _warped(name: str, steps: tuple[int, ...], shift: float) -> tuple[float, ...]:
    descend = all(later < earlier for earlier, later in pairwise(steps))
    if steps[0] != NUM_TIMES or not descend or steps[-1] < 1 or shift <= 0:
        raise ValueError(
            f"{name} must descend from {NUM_TIMES} and stay above 0, and shift be above 0, got "
            f"{list(steps)} and {shift}"
        )
    return warped_times(steps, shift)


def check_fit(config: TrainConfig) -> None:
    """Refuse a run that cannot be done before any weights are read: no teacher, one that does not
    fit the student, or rollouts longer than can be scored."""
    objective = config.objective
    if not isinstance(objective, MatchConfig) or objective.view != "bidirectional":
        raise ValueError("scd distill wan-dmd has objective.view='bidirectional'")
    for path in dict.fromkeys((objective.teacher, objective.critic_model or objective.teacher)):
        theirs, _ = find_bidirectional(config, path)
        objective.num_scored(config.num_frames, theirs.cache.window)
    check_rollout(config)


def with_prompts(choice: WanDmdChoice, config: TrainConfig) -> tuple[TrainConfig, PromptsInfo]:
    """Check a run, with all its fields as they are to be, and return it with its prompts, which are
    embedded now if they were not yet.

    Raises:
        FileNotFoundError, FileExistsError: no such file, or a folder that holds something else.
        ValueError: what `check_fit` refuses; no prompts, or several processes would embed them.
    """
    check_fit(config)
    if is_prompts(choice.prompts):
        return replace(config, data=choice.prompts), read_prompts_info(choice.prompts)
    folder = choice.embedded or f"{config.out.rstrip('/')}-prompts"
    if num_started() > 1 and not is_prompts(folder):
        raise ValueError(
            f"{choice.prompts} is embedded by one process: run the command once without a launcher "
            "and with --only-embed"
        )
    text = TextConfig(
        length=config.model.conditions.text_length,
        precision=choice.text_precision,
        device=choice.text_device,
    )
    source = choice.source or getattr(config.autoencoder, "source", "")
    if not source:
        raise ValueError(
            f"{choice.run} does not say where Wan's text encoder lies: name it with --source"
        )
    info = embed_prompts(choice.prompts, source, folder, choice.negative_prompt, text)
    return replace(config, data=folder), info
