"""Names of weights in files: what wrappers and trainers add to them, and other projects' own."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""What wrappers of a module put into its names, anywhere."""

PREFIXES = ("model.", "module.", "generator.", "diffusion_model.", "online_model.", "net.")
"""What checkpoints put in front of names."""

AVERAGED = (
    "generator_ema",
    "ema",
    "ema_model",
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
    "params_ema",
)
"""Where trainers keep averaged weights: a key of the file, or the beginning of names."""

MOVED = (
    "generator",
    "model",
    "state_dict",
    "model_state_dict",
    "online_model",
    "module",
    "net",
    "params",
    "weights",
)
"""Where they keep the weights that the optimiser moves."""

BESIDE = ("loss", "discriminator", "critic", "teacher", "lpips", "perceptual_loss")
"""What they keep beside them, by the beginning of its names."""

NO_WEIGHT = "_extra_state"
"""End of the name of an entry that a layer keeps for itself, and that is no tensor."""


class Chosen(NamedTuple):
    """Which of the weights in a file are meant."""

    state: Any
    """By their names there."""
    said: str = ""
    """For people, which these are where the file holds others too; empty: it holds no others."""
    key: str = ""
    """With which the names must begin; empty: any."""


def state_in(content: Any, key: str, where: str) -> Chosen:
    """Find the state dict in what a trainer wrote into a file, the averaged one if there are two.

    Args:
        content: of the file.
        key: under which it must lie; empty: under one of those that trainers use, or it is the
            file itself.
        where: name of the file, for errors.

    Raises:
        ValueError: there is none, or no such key.
    """
    said = ""
    if key:
        if not isinstance(content, Mapping) or key not in content:
            # A flat state dict may still hold it by the beginning of names: see `own_names`.
            if is_state(content) and any(_begins(bare(name), key) for name in content):
                return Chosen(content, key=key)
            held = _listed(content) if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(f"{where} has no {key!r}; it holds {held}")
        content = content[key]
    while not is_state(content):
        held = content if isinstance(content, Mapping) else {}
        there = [name for name in (*AVERAGED, *MOVED) if _may_hold_state(held.get(name))]
        if not there:
            _refuse(content, where)
        others = ", ".join(f"--key {name}" for name in there[1:])
        said = f"took the weights under {there[0]!r}" + (f" (others: {others})" if others else "")
        content = held[there[0]]
    return Chosen(content, said)


def is_state(content: Any) -> bool:
    """Tell whether something is a state dict: tensors by their names."""
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(
            isinstance(value, Tensor) or str(name).endswith(NO_WEIGHT)
            for name, value in content.items()
        )
    )


def _may_hold_state(value: Any) -> bool:
    return is_state(value) or (
        isinstance(value, Mapping)
        and any(_may_hold_state(value.get(name)) for name in (*AVERAGED, *MOVED))
    )


def _refuse(content: Any, where: str) -> NoReturn:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds no state dict but {type(content).__name__}")
    inside = [content, *(value for value in content.values() if isinstance(value, Mapping))]
    if any("shadow_params" in held for held in inside):
        raise ValueError(
            f"{where} holds averaged weights without their names ('shadow_params'): needed a state "
            "dict, as save_pretrained writes it"
        )
    raise ValueError(
        f"{where} holds no state dict but {_listed(content)}: name the one that is meant with --key"
    )


def _listed(content: Collection[Any]) -> str:
    names = sorted(map(str, content))
    return f"{names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def own_names(names: Iterable[str], key: str, where: str) -> tuple[dict[str, str], str]:
    """Choose the weights that are meant, and take off what wrappers and trainers put around them.

    Args:
        names: in the file.
        key: with which the names must begin; empty: any, the averaged ones where there are two.
        where: name of the file, for errors.

    Returns:
        Bare name -> name in the file, and what was chosen, for people; empty if all.

    Raises:
        ValueError: no name begins with the key, or two names are the same without what was added.
    """
    plain = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPERS)
        for name in names
        if not name.endswith(NO_WEIGHT)
    }
    said = ""
    if key:
        chosen = {own: name for own, name in plain.items() if _begins(name, key)}
        if not chosen:
            held = _listed({name.partition(".")[0] for name in plain.values()})
            raise ValueError(f"{where} has no {key!r}; the names in it begin with {held}")
        plain = {own: name.partition(".")[2] for own, name in chosen.items()}
    else:
        plain, said = _of_the_model(plain)
    bare_names: dict[str, str] = {}
    for own, name in plain.items():
        name = bare(name)
        if name in bare_names:
            raise ValueError(
                f"{where} holds {bare_names[name]!r} and {own!r}, which are the same weight once "
                "the names that wrappers add are taken off: needed one of them"
            )
        bare_names[name] = own
    return bare_names, said


def _of_the_model(plain: dict[str, str]) -> tuple[dict[str, str], str]:
    """Choose the averaged weights by the beginning of names, and leave out what lies beside."""
    for root in AVERAGED:
        averaged = {o: n.partition(".")[2] for o, n in plain.items() if _begins(n, root)}
        others = {bare(name) for own, name in plain.items() if own not in averaged}
        # Averages under names of another form, without dots, could not be told apart.
        if averaged and (not others or others & {bare(name) for name in averaged.values()}):
            return averaged, f"took the averaged weights, whose names begin with {root!r}"
    roots = (*BESIDE, *AVERAGED)
    kept = {o: n for o, n in plain.items() if not any(_begins(n, root) for root in roots)}
    if not kept or len(kept) == len(plain):
        return plain, ""
    left = {name.partition(".")[0] for own, name in plain.items() if own not in kept}
    return kept, f"left out the weights whose names begin with {_listed(left)}"


def _begins(name: str, root: str) -> bool:
    return name.startswith(root + ".")


def bare(name: str) -> str:
    """Take off what wrappers and checkpoints put into the name of a weight."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    while prefix := next((one for one in PREFIXES if name.startswith(one)), ""):
        name = name.removeprefix(prefix)
    return name


class Renaming:
    """Beginnings of another project's names of weights, and ours; there and back."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Take pairs of theirs and ours, in which {n} stands for a number."""
        pairs = list(pairs)
        self._to_ours = _rules(pairs)
        self._to_theirs = _rules((ours, theirs) for theirs, ours in pairs)

    def to_ours(self, name: str) -> str | None:
        """Turn their name into ours; None: it is not known."""
        return _renamed(name, self._to_ours)

    def to_theirs(self, name: str) -> str | None:
        """Turn our name into theirs; None: it is not known."""
        return _renamed(name, self._to_theirs)


Rules = list[tuple[re.Pattern[str], str]]
"""What names begin with, and what that is turned into."""


def _rules(pairs: Iterable[tuple[str, str]]) -> Rules:
    return [
        (
            re.compile("^" + re.escape(given).replace(r"\{n\}", r"(\d+)")),
            wanted.replace("{n}", r"\1"),
        )
        for given, wanted in pairs
    ]


def _renamed(name: str, rules: Rules) -> str | None:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return None
