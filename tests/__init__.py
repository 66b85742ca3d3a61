"""A package, so that no `tests` of an installed package takes its place."""
