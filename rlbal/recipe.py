"""A recipe: one YAML file that says everything about a run.

`read_recipe` turns a file and command-line overrides into a checked `Recipe` without importing torch;
`rlbal.trainer_args` then binds its `trainer:` section to TRL's own configuration. The sections are in `rlbal.sections`,
the YAML in `rlbal.recipe_file`.
"""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from rlbal.allocation_sections import ALLOCATIONS, AnyAllocation, UniformAllocation
from rlbal.balance_checks import check_advantage, check_weighting
from rlbal.balance_sections import (
    METHODS,
    AdvantageSection,
    AnyWeights,
    FixedWeights,
)
from rlbal.budget_checks import check_template
from rlbal.budget_sections import SCHEDULES, AnyBudget, NoBudgetSection
from rlbal.errors import RecipeError, nearest
from rlbal.ppo_checks import check_ppo, check_section
from rlbal.ppo_sections import PPOSection
from rlbal.recipe_file import apply_override, dump_yaml, parse_yaml
from rlbal.section import Section, UserPath
from rlbal.sections import (
    SOURCES,
    AlgorithmSection,
    AnyData,
    DataSection,
    EvaluationSection,
    FileData,
    FolderData,
    HubData,
    LaunchSection,
    ModelSection,
    ReasoningGymData,
    RewardSpec,
    RewardsSection,
    SpeedSection,
    TinySection,
    WarmStartSection,
)
from rlbal.shipped import shipped_dir

__all__ = [
    "ADVANTAGE_PRESETS",
    "AdvantageSection",
    "AlgorithmSection",
    "AnyData",
    "DataSection",
    "EvaluationSection",
    "FileData",
    "FolderData",
    "HubData",
    "LaunchSection",
    "ModelSection",
    "ReasoningGymData",
    "Recipe",
    "RewardSpec",
    "RewardsSection",
    "Section",
    "SpeedSection",
    "TinySection",
    "WarmStartSection",
    "apply_override",
    "parse_recipe",
    "parse_yaml",
    "read_recipe",
]

ADVANTAGE_PRESETS = {
    "grpo": {"baseline": "group", "scale": "group_std"},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
    "reinforce": {"baseline": "none", "scale": "none"},
    "ppo": {"baseline": "none", "scale": "none"},  # its critic compares, not the advantage section
}
# Section -> the key that chooses among its kinds, and what it may say.
CHOICES = {
    "weighting": ("method", METHODS),
    "budget": ("schedule", SCHEDULES),
    "allocation": ("method", ALLOCATIONS),
    "data": ("source", SOURCES),
}

# Sections with a kind that need not be named.
PLAIN = {"weighting": {"method": "fixed"}, "budget": {"schedule": "none"}, "allocation": {"method": "uniform"}}


class Recipe(Section):
    """Everything about one run."""

    output_dir: UserPath
    seed: int = Field(0, ge=0, lt=2**32)
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    model: ModelSection
    data: AnyData
    rewards: RewardsSection
    weighting: AnyWeights = Field(default_factory=FixedWeights)
    advantage: AdvantageSection = Field(default_factory=AdvantageSection)
    ppo: PPOSection | None = Field(default=None, description="Settings of `algorithm.name: ppo`.")
    budget: AnyBudget = Field(default_factory=NoBudgetSection)
    allocation: AnyAllocation = Field(default_factory=UniformAllocation)
    lora: dict[str, Any] | None = Field(
        default=None, description="Fields of peft's LoraConfig; leave out for full training."
    )
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    trainer: dict[str, Any] = Field(default_factory=dict, description="Fields of TRL's GRPOConfig.")
    speed: SpeedSection = Field(default_factory=SpeedSection)
    launch: LaunchSection = Field(default_factory=LaunchSection)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """Fill `advantage.baseline` and `.scale` from the algorithm, so that a resolved recipe shows them."""
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if value is not None}  # an empty section is all defaults
        algorithm, advantage = values.get("algorithm", {}), values.get("advantage", {})
        if not isinstance(algorithm, dict) or not isinstance(advantage, dict):
            return values
        check_section(values, algorithm.get("name") == "ppo")
        if algorithm.get("name") == "ppo":
            values = {"ppo": {}, **values}
        preset = ADVANTAGE_PRESETS.get(str(algorithm.get("name", "grpo")), {})
        unequal = isinstance(values.get("allocation"), dict) and values["allocation"].get("method") == "knapsack"
        preset = {**preset, "aggregation": "prompt" if unequal else "loss"}
        filled = {**advantage, **{key: value for key, value in preset.items() if advantage.get(key) is None}}
        if filled.get("scale") == "beta" and filled.get("beta") is None:
            filled["beta"] = {}
        for section, plain in PLAIN.items():
            if isinstance(values.get(section), dict):
                values[section] = plain | values[section]
        return {**values, "advantage": filled}

    @model_validator(mode="after")
    def _balance_possible(self) -> Self:
        check_weighting(self)
        check_advantage(self)
        check_ppo(self)
        return self

    @model_validator(mode="after")
    def _budget_possible(self) -> Self:
        check_template(self)
        return self

    @model_validator(mode="after")
    def _evaluation_possible(self) -> Self:
        if self.evaluation.best_metric not in (metrics := self.evaluation_metrics()):
            raise PydanticCustomError(
                "best_metric",
                f"`evaluation.best_metric: {self.evaluation.best_metric}` is not measured. "
                + nearest(self.evaluation.best_metric, metrics),
            )
        if self.evaluation.every is not None and not self.has_eval_data:
            raise PydanticCustomError(
                "eval_data", "`evaluation.every` is set but no rows are held out: set `data.eval_size` above 0"
            )
        return self

    def evaluation_metrics(self) -> list[str]:
        """Names that `evaluation.best_metric` may take."""
        pass_at = [f"pass@{k}" for k in self.evaluation.pass_at]
        rewards = [f"reward/{name}" for name in self.rewards.functions]
        plain = [*pass_at, f"mean@{self.evaluation.samples_per_prompt}", *rewards]
        at_budget = [] if isinstance(self.budget, NoBudgetSection) else [f"budget/{name}" for name in plain]
        return plain + at_budget

    @property
    def has_eval_data(self) -> bool:
        explicit = getattr(self.data, "eval_path", None) or getattr(self.data, "eval_split", None)
        return bool(explicit) or self.data.eval_size > 0

    def dump(self) -> str:
        """The resolved recipe as YAML; reading it back gives an equal recipe."""
        # Under PPO `advantage` says nothing, and may not be given.
        return dump_yaml(self.model_dump(mode="json", exclude={"advantage"} if self.ppo is not None else None))


def _message(error: ValidationError, raw: Any) -> str:
    """One line per problem, each naming the key as it stands in the file."""
    lines = []
    for item in error.errors():
        path, here = [], raw
        for piece in item["loc"]:
            # Pydantic also puts the chosen union member into the location; that is no key of the file.
            inside = piece in here if isinstance(here, dict) else isinstance(here, list) and piece in range(len(here))
            if inside:
                here = here[piece]
            if inside or (item["type"] == "missing" and piece == item["loc"][-1]):
                path.append(str(piece))
        shown = "" if item["type"] == "missing" or isinstance(here, dict | list) else f" (got {here!r})"
        if item["type"] == "string_type" and isinstance(here, dict):
            shown = "; put quotes around text that starts with {"
        text, key = item["msg"] + shown, ".".join(path)
        if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
            name, options = CHOICES[str(item["loc"][-1])]
            chosen = here.get(name)
            key, text = f"{key}.{name}", f"{chosen!r} is no {name} of {key}. {nearest(str(chosen), options)}"
        if item["type"] in ("model_type", "dict_type", "model_attributes_type"):
            text = "this is a section: give it keys of its own" + shown
        lines.append(f"`{key}`: {text}" if key else text)
    return "\n".join(lines)


def parse_recipe(values: Any, source: str = "recipe") -> Recipe:
    """Check raw values against the recipe's sections.

    Raises:
        RecipeError: unknown keys, wrong types or impossible combinations, each with its key.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{source} is not a mapping of sections such as `model:` and `data:`")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source}:\n{_message(error, values)}") from None


def find_recipe(path: str | Path) -> Path:
    """A recipe file by its path, or by the name under which `rlbal recipes` lists it, from any folder.

    Raises:
        RecipeError: there is no such file; names the nearest shipped recipe.
    """
    home = shipped_dir("recipes").parent
    for found in (Path(path), home / path):
        if found.is_file():
            return found
    shipped = [recipe.relative_to(home).as_posix() for recipe in shipped_dir("recipes").glob("**/*.yaml")]
    hint = nearest(str(path), shipped) or "`rlbal recipes` lists those shipped"
    raise RecipeError(f"no recipe at {path}", fix=hint)


def read_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file (see `find_recipe`) and apply `key.sub=value` overrides.

    Raises:
        RecipeError: the file is missing, not YAML, or not a recipe.
    """
    path = find_recipe(path)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a text file", why=str(error)) from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error.what}", error.why, error.fix) from None
    if isinstance(values, dict):
        for override in overrides:
            apply_override(values, override)
    return parse_recipe(values, str(path))
