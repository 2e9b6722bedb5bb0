"""A sweep: one base recipe, arms that change it, and seeds that all arms share.

    output_dir: runs/balance_rewards        # runs go to <output_dir>/<arm>/seed-<n>/
    recipe: recipes/quickstart.yaml
    overrides: [trainer.max_steps=100]      # for every arm (optional)
    arms:                                   # name -> overrides
      fixed: []
      gradient: [weighting.method=gradient]
    seeds: [0, 1, 2, 3, 4]
    parallel: 2                             # runs at once (optional)
    gpus: [0, 1]                            # each run gets its own (optional)

This file reads sweeps and says what is to be done; `rlbal.experiments.running` does it. Every run is trained from a
copy of its resolved recipe, `seed-<n>.yaml`, so that a recipe edited meanwhile changes nothing.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rlbal.errors import RecipeError, RlbalError, RunError
from rlbal.experiments.arms import differing, flat
from rlbal.experiments.results import last_step, unfinished
from rlbal.recipe import Recipe, read_recipe
from rlbal.recipe_file import parse_yaml
from rlbal.run import RunDirectory
from rlbal.section import Section, UserPath

ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
SET_BY_SWEEP = ("seed", "output_dir")


class Sweep(Section):
    """A sweep file. Paths in it count from the working directory, as in recipes."""

    output_dir: UserPath = Field(description="Folder of all runs.")
    recipe: str = Field(description="The base recipe: a file, or a name that `rlbal recipes` lists.")
    overrides: list[str] = Field(default_factory=list, description="`key.sub=value` for every arm.")
    arms: dict[str, list[str]] = Field(description="Name -> `key.sub=value` of this arm; the first is the baseline.")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(description="Every arm runs with each of these.")
    parallel: int = Field(default=1, ge=1, description="Runs at once.")
    gpus: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="Device numbers; each run sees as many of its own as it has processes."
    )

    @field_validator("arms", mode="before")
    @classmethod
    def _no_overrides(cls, arms: Any) -> Any:
        """`fixed:` without a value is an arm without overrides."""
        return {name: [] if arm is None else arm for name, arm in arms.items()} if isinstance(arms, dict) else arms

    @model_validator(mode="after")
    def _runs(self) -> Self:
        if not self.arms:
            raise PydanticCustomError("arms", "`arms` is empty; name at least one, such as `base: []`")
        for name in self.arms:
            if not ARM_NAME.fullmatch(name):
                raise PydanticCustomError(
                    "arm_name",
                    f"the arm `{name}` becomes a folder: its name must start with a letter or digit and hold only "
                    "A-Z a-z 0-9 _ . + = -",
                )
        if not self.seeds:
            raise PydanticCustomError("seeds", "`seeds` is empty; a verdict needs several, such as [0, 1, 2, 3, 4]")
        if twice := {seed for seed in self.seeds if self.seeds.count(seed) > 1}:
            raise PydanticCustomError("seeds", f"`seeds` has {min(twice)} twice; keep one of them")
        if self.gpus is not None and len(set(self.gpus)) < max(self.parallel, len(self.gpus)):
            raise PydanticCustomError(
                "gpus",
                f"`gpus: {self.gpus}` must be different devices, one at least for each of the {self.parallel} "
                "runs at once (`parallel`)",
            )
        return self


State = Literal["finished", "resume", "overwrite", "start", "differs"]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: the resolved recipe with its seed and output_dir."""

    arm: str
    recipe: Recipe

    @property
    def label(self) -> str:
        return f"{self.arm}/seed-{self.recipe.seed}"

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.recipe.output_dir)

    @property
    def log(self) -> Path:
        return self.directory.path.with_name(f"seed-{self.recipe.seed}.log")

    @property
    def recipe_file(self) -> Path:
        return self.directory.path.with_name(f"seed-{self.recipe.seed}.yaml")

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run, if the recipe says so."""
        steps = self.recipe.trainer.get("max_steps", -1)
        return steps if isinstance(steps, int) and steps > 0 else None


@dataclass(frozen=True)
class Planned:
    """What is to be done about a run.

    Attributes:
        state: finished; resume from its newest checkpoint; overwrite what is there; start; or differs: there is a run
            of another recipe, which the user must decide about.
        keys: the keys in which the run there differs from what the sweep says.
    """

    run: SweepRun
    state: State
    keys: list[str]

    def describe(self) -> str:
        """The state in words."""
        directory = self.run.directory
        if self.state == "resume":
            return f"to be resumed from {directory.latest_checkpoint().name}"
        if self.state == "overwrite":
            return f"to be started afresh (stopped at step {last_step(directory)})"
        if self.state == "differs":
            return f"recorded with another recipe: {', '.join(self.keys)}"
        return {"finished": "finished", "start": "to be started"}[self.state]


def read_sweep(path: Path, parallel: int | None = None) -> Sweep:
    """Read and check a sweep file; `parallel` replaces its own.

    Raises:
        RecipeError: it is missing, not YAML, or not a sweep; names the key and the nearest valid one.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the sweep {path}", why=str(error)) from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error.what}", error.why, error.fix) from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a sweep: a mapping with `output_dir`, `recipe`, `arms` and `seeds`")
    if parallel is not None:
        values["parallel"] = parallel
    try:
        return Sweep.model_validate(values)
    except ValidationError as error:
        lines = [_line(item["loc"], item["msg"]) for item in error.errors()]
        raise RecipeError("\n".join([f"{path}:", *lines])) from None


def _line(location: tuple[int | str, ...], message: str) -> str:
    key = ".".join(str(piece) for piece in location if piece != "[key]")
    return f"`{key}`: {message}" if key else message


def resolve_runs(sweep: Sweep, overrides: list[str]) -> list[SweepRun]:
    """All runs, seed by seed, so that a sweep that is stopped early has arms with the same seeds.

    Every arm is resolved and bound to TRL, and its rewards are loaded, so that a mistake in any shows before the first
    run. Overrides apply in order: the sweep's, the arm's, the command line's.

    Raises:
        RlbalError: what a recipe's check refuses, naming the arm; or two arms are the same.
    """
    recipes = {name: _resolve(sweep, name, overrides) for name in sweep.arms}
    seen: dict[str, str] = {}
    for name, recipe in recipes.items():
        twin = seen.setdefault(recipe.dump(), name)
        if twin != name:
            raise RecipeError(f"the arms `{twin}` and `{name}` are the same recipe", fix="drop one of them")
    processes = max(recipe.launch.num_processes for recipe in recipes.values())
    if sweep.gpus is not None and len(sweep.gpus) < sweep.parallel * processes:
        raise RecipeError(
            f"`gpus` has {len(sweep.gpus)} devices, but {sweep.parallel} runs at once of {processes} processes need "
            f"{sweep.parallel * processes}",
            fix="give more devices, or lower `parallel`",
        )
    folder = Path(sweep.output_dir)
    return [
        SweepRun(name, recipe.model_copy(update={"seed": seed, "output_dir": str(folder / name / f"seed-{seed}")}))
        for seed in sweep.seeds
        for name, recipe in recipes.items()
    ]


def _resolve(sweep: Sweep, arm: str, overrides: list[str]) -> Recipe:
    from rlbal.rewards.suite import RewardSuite
    from rlbal.trainer_args import bind_trainer

    changes = [*sweep.overrides, *sweep.arms[arm], *overrides]
    try:
        for change in changes:
            key = change.partition("=")[0].strip()
            if key in SET_BY_SWEEP:
                raise RecipeError(
                    f"override `{change}`: a sweep sets `{key}` itself",
                    fix="use the sweep's own `seeds` and `output_dir`",
                )
        recipe = read_recipe(sweep.recipe, changes)
        if recipe.launch.num_processes > 1 and recipe.launch.accelerate is None:
            raise RecipeError(
                f"`launch.num_processes: {recipe.launch.num_processes}` needs an accelerate configuration",
                fix="set `launch.accelerate` to a file of accelerate_configs/, or `launch.num_processes=1`",
            )
        bind_trainer(recipe)
        RewardSuite.for_recipe(recipe).close()
    except RlbalError as error:
        raise type(error)(f"arm `{arm}`: {error.what}", error.why, error.fix) from None
    # Both are the run's; equal recipes show equal here.
    return recipe.model_copy(update={"seed": 0, "output_dir": ""})


def plan(run: SweepRun, overwrite: bool) -> Planned:
    """Look at what is there of a run; changes nothing.

    Args:
        run: the run as the sweep has it.
        overwrite: do runs of another recipe again.

    Raises:
        RunError: something else than a run is in its place.
    """
    directory = run.directory
    if not directory.is_run:
        directory.check_free()
        return Planned(run, "start", [])
    try:
        recorded = directory.recipe()
        # A run may be moved together with its sweep: where it was started makes no difference.
        here = recorded.model_copy(update={"output_dir": run.recipe.output_dir})
        keys = differing(flat(here.model_dump(mode="json")), flat(run.recipe.model_dump(mode="json")))
        done = unfinished(directory, recorded) is None
    except RecipeError:
        keys, done = ["recipe.yaml is not readable"], True
    resumable = bool(directory.checkpoints())
    if keys and (done or resumable):
        return Planned(run, "overwrite" if overwrite else "differs", keys)
    if done:
        return Planned(run, "finished", [])
    return Planned(run, "resume" if resumable else "overwrite" if directory.has_results else "start", [])


def refuse_differing(planned: list[Planned]) -> None:
    """Stop before anything is mixed with runs of another recipe.

    Raises:
        RunError: naming each run and the keys in which it differs.
    """
    if other := [item for item in planned if item.state == "differs"]:
        lines = [f"{item.run.directory.path} is a run of another recipe: {', '.join(item.keys)}" for item in other]
        raise RunError(
            "\n".join(lines),
            why="its figures would not be those of the sweep",
            fix="choose another `output_dir`, or do these runs again with --overwrite",
        )
