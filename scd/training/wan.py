"""Stage two of Wan: a causal student of few steps, matched to the bidirectional model on prompts.

The recipe is Self-Forcing's, on the one loop: rollouts from nothing, scored as whole clips by the
published model, guided, and by a critic that follows the student. Source: paper
(distillation), Self-Forcing.
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
from scd.models.wan.config import NUM_TIMES
from scd.models.wan.timesteps import warped_times
from scd.objectives.config import MatchConfig
from scd.preprocessing.prompts import embed_prompts
from scd.training.config import TrainConfig
from scd.training.fit import check_rollout, like_initial
from scd.training.presets import WAN_DMD, WanDmdChoice
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
    steps = choice.steps
    descend = all(later < earlier for earlier, later in pairwise(steps))
    if not steps or steps[0] != NUM_TIMES or not descend or steps[-1] < 1 or choice.shift <= 0:
        raise ValueError(
            f"steps must descend from {NUM_TIMES} and stay above 0, and shift be above 0, got "
            f"{list(steps)} and {choice.shift}"
        )
    times = warped_times(steps, choice.shift)
    run = replace(
        like_initial(WAN_DMD, choice.run),
        out=f"runs/out/wan-dmd-{len(times)}",
        sampling=SamplingConfig(
            num_steps=len(times), schedule="listed", times=times, solver="renoise"
        ),
    )
    teacher = choice.teacher
    if (Path(teacher) / "last").is_file():
        # One step of a run, so that the teacher stays the same when its own training goes on.
        teacher = str(resolve(teacher))
    return replace(run, objective=replace(run.objective, teacher=teacher))


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
        ValueError: what `check_fit` refuses; no prompts, one that is too long, or several
            processes would embed them.
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
