"""Names under which Gymnasium makes worlds: `gymnasium.make("scd/Doom-v0")`.

Gymnasium finds no names of packages that are not imported, and takes a sixth of a second to import
itself. So `import scd` gives it the names at once where it is loaded already, and else as soon as
it is.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

LIBRARY = "gymnasium.envs"
"""The module that has registered Gymnasium's own environments once it is loaded."""

MODULE = "scd.streaming.environment"
"""Of the environments."""

WORLDS = {"scd/Doom-v0": {"world": "doom"}, "scd/World-v0": {}}
"""Names, and the arguments of `WorldEnv` that each fixes; World takes any `world=`."""


def register() -> None:
    """Give Gymnasium the names."""
    registration = import_module(f"{LIBRARY}.registration")
    for name, fixed in WORLDS.items():
        if name not in registration.registry:
            registration.register(
                name,
                entry_point=f"{MODULE}:WorldEnv",
                vector_entry_point=f"{MODULE}:WorldVectorEnv",
                kwargs=dict(fixed),
            )


class Wait(MetaPathFinder):
    """Stands among the finders of modules until Gymnasium is imported, then gives it the names."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec, with a loader that registers once it is loaded."""
        if fullname != LIBRARY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register_when_loaded() -> None:
    """Give Gymnasium the names now, or when it is imported."""
    if LIBRARY in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, Wait())
