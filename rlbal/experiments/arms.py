"""Arms: runs whose recipes are equal but for the seed and the place they write to."""

import json
from dataclasses import dataclass
from typing import Any

from rlbal.errors import RunError, nearest
from rlbal.experiments.results import RunResult
from rlbal.recipe import Recipe

LONGEST_LABEL = 48


@dataclass(frozen=True)
class Arm:
    """An arm's label and its finished runs by seed, in ascending order; there is at least one."""

    label: str
    runs: dict[int, RunResult]

    @property
    def first(self) -> RunResult:
        return next(iter(self.runs.values()))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as `key.sub` -> value; lists and empty sections are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Keys of two flat mappings that have different values, or that only one has.

    Of an empty section and a filled one, the keys inside are named, not the section.
    """
    missing = object()
    keys = [key for key in dict.fromkeys([*first, *second]) if first.get(key, missing) != second.get(key, missing)]
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What makes an arm: the whole flat recipe but `seed` and `output_dir`."""
    values = flat(recipe.model_dump(mode="json"))
    return {key: value for key, value in values.items() if key not in ("seed", "output_dir")}


def group_arms(results: list[RunResult]) -> list[Arm]:
    """Group runs into arms, in order of their first run.

    Raises:
        RunError: two runs have the same recipe and seed.
    """
    groups: dict[str, dict[int, RunResult]] = {}
    for result in results:
        runs = groups.setdefault(json.dumps(_settings(result.recipe), sort_keys=True), {})
        if twin := runs.get(result.recipe.seed):
            raise RunError(
                f"{twin.path} and {result.path} have the same recipe and the same seed",
                why="counting one seed twice would make the interval too narrow",
                fix="name only one of them",
            )
        runs[result.recipe.seed] = result
    found = list(groups.values())
    return [Arm(label, dict(sorted(runs.items()))) for label, runs in zip(_labels(found), found, strict=True)]


def _labels(groups: list[dict[int, RunResult]]) -> list[str]:
    """A name for each group of runs: their folder, what sets their recipe apart, or the path of the first."""
    folders = [{run.path.resolve().parent.name for run in runs.values()} for runs in groups]
    names = [next(iter(folder)) for folder in folders if len(folder) == 1]
    if len(set(names)) == len(groups):
        return names
    recipes = [_settings(next(iter(runs.values())).recipe) for runs in groups]
    keys = sorted({key for recipe in recipes for key in differing(recipes[0], recipe)})
    # One key that sets all apart, else all keys in which they differ.
    for chosen in [*([key] for key in keys), keys]:
        labels = [", ".join(f"{key}={_short(recipe.get(key))}" for key in chosen) for recipe in recipes]
        if len(set(labels)) == len(groups) and max(map(len, labels)) <= LONGEST_LABEL:
            return labels
    return [str(next(iter(runs.values())).path) for runs in groups]


def unnamed_keys(arm: Arm, base: Arm) -> list[str]:
    """Keys in which two arms differ and of which neither's label speaks, where labels are made of keys."""
    recipes = [_settings(next(iter(one.runs.values())).recipe) for one in (arm, base)]
    keys = differing(*recipes)
    named = [key for key in keys if f"{key}=" in arm.label]
    return [key for key in keys if key not in named] if named else []


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def find_arm(label: str, arms: list[Arm]) -> Arm:
    """The arm of a label.

    Raises:
        RunError: no arm has it; names the nearest.
    """
    for arm in arms:
        if arm.label == label:
            return arm
    raise RunError(f"no arm is called `{label}`. {nearest(label, [arm.label for arm in arms])}".strip())
