"""A recipe: one YAML file that says everything about a run.

`read_recipe` turns a file and command-line overrides into a checked `Recipe` without importing torch;
`rlbal.trainer_args` then binds its `trainer:` section to TRL's own configuration.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from rlbal.errors import RecipeError, nearest

# Reward and evaluation names become metric names, column names and file contents.
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


class Section(BaseModel):
    """A part of a recipe. Unknown keys are refused with the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    hint = nearest(str(key), cls.model_fields)
                    raise PydanticCustomError("unknown_key", f"`{key}` is not a key here. {hint}".strip())
        return values


class AlgorithmSection(Section):
    """Which policy-gradient estimator; a preset of `advantage.baseline` and `advantage.scale`."""

    name: Literal["grpo", "rloo", "reinforce"] = Field(
        "grpo",
        description="grpo: group baseline and group std; rloo: leave-one-out baseline, no scale; "
        "reinforce: no baseline, no scale. `advantage.*` overrides either.",
    )
    rollouts_per_prompt: int = Field(8, ge=1, description="Completions sampled for each prompt (G in GRPO).")


class WarmStartSection(Section):
    """Supervised start of the tiny model on worked traces that carry a planted flaw (see `rlbal.warm_start`)."""

    steps: int = Field(2000, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(4e-3, gt=0)
    carry_error: float = Field(
        0.55, ge=0, le=1, description="Probability that a carry, borrow or change of sign is forgotten."
    )
    random_error: float = Field(0.05, ge=0, le=1, description="Probability that a step is off by a random amount.")
    repeat_step: float = Field(0.3, ge=0, le=1, description="Probability that a worked step is written twice.")
    drop_tag: float = Field(0.15, ge=0, le=1, description="Probability that one of the four tags is left out.")


class TinySection(Section):
    """A tiny Qwen2-style model built on the spot, with a byte tokenizer, for machines without a model hub."""

    hidden_size: int = Field(96, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    max_positions: int = Field(1024, ge=16)
    phrases: list[str] = Field(default_factory=list, description="Strings that become one ordinary token each.")
    warm_start: WarmStartSection | None = Field(None, description="Leave out for a random model.")


class ModelSection(Section):
    """The policy: a hub id, a folder, or a tiny model built on the spot."""

    name_or_path: str | None = None
    tiny: TinySection | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name_or_path is None) == (self.tiny is None):
            raise PydanticCustomError(
                "model_source", "give exactly one of `model.name_or_path` (hub id or folder) and `model.tiny`"
            )
        return self


class DataSection(Section):
    """What every data source has in common. Templates may name any column of the dataset as `{column}`."""

    prompt: str = Field("{question}", description="Prompt template over the dataset's columns.")
    system: str | None = Field(None, description="System prompt (template); implies a conversational prompt.")
    conversational: bool = Field(False, description="Render as chat messages and use the model's chat template.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Rename columns: new name -> name in the dataset, e.g. answer: solution."
    )
    max_rows: int | None = Field(None, ge=1, description="Use only the first rows of the training data.")
    eval_size: int = Field(128, ge=0, description="Rows held out by seed for evaluation; no training prompt repeats.")
    difficulty: str | None = Field(None, description="Column by which evaluation is broken down.")
    max_prompt_tokens: int | None = Field(None, ge=1, description="Longest prompt, in tokens of the model.")
    overlong: Literal["error", "drop"] = Field("error", description="What to do with longer prompts.")


class ReasoningGymData(DataSection):
    """Problems made by a reasoning-gym task (or its `composite` of several)."""

    source: Literal["reasoning_gym"]
    task: str
    config: dict[str, Any] = Field(default_factory=dict, description="The task's own options.")
    size: int = Field(10_000, ge=1, description="Problems generated before the held-out ones are split off.")


class FileData(DataSection):
    """Local JSONL, Parquet or CSV files."""

    source: Literal["file"]
    path: str | list[str]
    eval_path: str | list[str] | None = Field(None, description="Held-out files instead of a split by seed.")


class FolderData(DataSection):
    """A dataset saved with `datasets.Dataset.save_to_disk` (a DatasetDict needs `split`)."""

    source: Literal["folder"]
    path: str
    split: str | None = None
    eval_split: str | None = None


class HubData(DataSection):
    """A dataset on the Hugging Face hub."""

    source: Literal["hub"]
    path: str
    config: str | None = None
    split: str = "train"
    eval_split: str | None = None
    revision: str | None = None


AnyData = Annotated[ReasoningGymData | FileData | FolderData | HubData, Field(discriminator="source")]


class RewardSpec(Section):
    """One reward function. Its key under `rewards.functions` is its name in metrics and reports."""

    function: str = Field(description="`module:function` or `path/to/file.py:function`, TRL's reward signature.")
    args: dict[str, Any] = Field(default_factory=dict, description="Extra keyword arguments for the function.")
    weight: float = Field(1.0, description="Weight in the sum of rewards.")
    range: tuple[float, float] | None = Field(None, description="Lowest and highest value; others are errors.")
    rowwise: bool = Field(
        False,
        description="Each score depends on its own row alone: the function may run in killable worker processes.",
    )
    timeout: float | None = Field(None, gt=0, description="Seconds per completion; default `rewards.timeout`.")
    unsafe: bool = Field(False, description="Allow a scorer that evaluates the completion as code.")

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if ":" not in self.function:
            raise PydanticCustomError(
                "function", f"`{self.function}` names no function; write `module:function` or `path/to/file.py:function`"
            )
        if self.range is not None and not self.range[0] < self.range[1]:
            raise PydanticCustomError("range", f"`range` must be [low, high] with low < high, not {list(self.range)}")
        return self


class RewardsSection(Section):
    """The reward functions and what to do when one fails."""

    functions: dict[str, RewardSpec]
    success: str | None = Field(None, description="The reward that says a rollout succeeded; default: the first.")
    on_error: Literal["raise", "skip"] = Field(
        "raise", description="A failed score stops training (after a checkpoint), or the row goes without it."
    )
    max_failed_share: float = Field(
        0.5, ge=0, le=1, description="With `skip`: stop when more than this share of a batch fails for one reward."
    )
    timeout: float = Field(10.0, gt=0, description="Seconds per completion in a worker.")
    workers: int | None = Field(None, ge=1, description="Worker processes for rowwise rewards; default: the cores.")
    memory_mb: int = Field(2048, ge=64, description="Memory limit of one worker, in MiB, beyond what it starts with.")

    @model_validator(mode="after")
    def _names(self) -> Self:
        if not self.functions:
            raise PydanticCustomError("rewards", "`rewards.functions` is empty; name at least one reward function")
        for name in self.functions:
            if not NAME.fullmatch(name):
                raise PydanticCustomError(
                    "reward_name", f"reward name `{name}` must start with a letter and hold only A-Z a-z 0-9 _ . -"
                )
        if self.success is not None and self.success not in self.functions:
            raise PydanticCustomError(
                "success",
                f"`rewards.success` names `{self.success}`, which is not under `rewards.functions`. "
                + nearest(self.success, self.functions),
            )
        return self

    @property
    def success_name(self) -> str:
        return self.success or next(iter(self.functions))


class WeightingSection(Section):
    """How the weights of the rewards change while training."""

    method: Literal["fixed"] = "fixed"


class AdvantageSection(Section):
    """How rewards become advantages (see `rlbal.balance.advantages`). Unset keys follow `algorithm.name`."""

    baseline: Literal["group", "leave_one_out", "batch", "none"] | None = None
    scale: Literal["none", "group_std", "batch_std", "beta"] | None = None
    order: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    whiten: bool = Field(False, description="Standardise the final advantages over the batch (GDPO's last step).")


class BudgetSection(Section):
    """Token budgets for completions over time."""

    schedule: Literal["none"] = "none"


class AllocationSection(Section):
    """How many rollouts each prompt gets."""

    method: Literal["uniform"] = "uniform"


class EvaluationSection(Section):
    """Held-out evaluation with its own sampling settings, during training and by `rlbal eval`."""

    every: int | None = Field(None, ge=1, description="Optimizer steps between evaluations; unset: none in between.")
    at_start: bool = True
    at_end: bool = True
    prompts: int | None = Field(None, ge=1, description="Held-out prompts to use; default: all.")
    samples_per_prompt: int = Field(4, ge=1)
    pass_at: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [1])
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: off.")
    greedy: bool = Field(False, description="Also decode each prompt once greedily.")
    max_completion_length: int | None = Field(None, ge=1, description="Default: the trainer's.")
    batch_size: int = Field(64, ge=1, description="Completions generated at once per process.")
    best_metric: str = Field("pass@1", description="Keeps the best checkpoint: pass@k, mean@k or reward/<name>.")

    @model_validator(mode="after")
    def _pass_at(self) -> Self:
        if not self.pass_at:
            raise PydanticCustomError("pass_at", "`evaluation.pass_at` is empty; at least [1]")
        if max(self.pass_at) > self.samples_per_prompt:
            raise PydanticCustomError(
                "pass_at",
                f"pass@{max(self.pass_at)} needs as many samples: raise `evaluation.samples_per_prompt` "
                f"(now {self.samples_per_prompt}) or lower `evaluation.pass_at`",
            )
        return self


class LaunchSection(Section):
    """The processes the recipe is meant for. Batch sizes are checked against these, not the processes at hand."""

    num_processes: int = Field(1, ge=1, description="Processes over all nodes, one per GPU.")
    accelerate: str | None = Field(None, description="Configuration in accelerate_configs/ (name) or a path.")


class Recipe(Section):
    """Everything about one run."""

    output_dir: str
    seed: int = 0
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    model: ModelSection
    data: AnyData
    rewards: RewardsSection
    weighting: WeightingSection = Field(default_factory=WeightingSection)
    advantage: AdvantageSection = Field(default_factory=AdvantageSection)
    budget: BudgetSection = Field(default_factory=BudgetSection)
    allocation: AllocationSection = Field(default_factory=AllocationSection)
    lora: dict[str, Any] | None = Field(None, description="Fields of peft's LoraConfig; leave out for full training.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    trainer: dict[str, Any] = Field(default_factory=dict, description="Fields of TRL's GRPOConfig.")
    launch: LaunchSection = Field(default_factory=LaunchSection)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """Fill `advantage.baseline` and `.scale` from the algorithm, so that a resolved recipe shows them."""
        if not isinstance(values, dict):
            return values
        algorithm, advantage = values.get("algorithm") or {}, values.get("advantage") or {}
        if not isinstance(algorithm, dict) or not isinstance(advantage, dict):
            return values
        preset = ADVANTAGE_PRESETS.get(str(algorithm.get("name", "grpo")), {})
        filled = {**advantage, **{key: value for key, value in preset.items() if advantage.get(key) is None}}
        return {**values, "advantage": filled}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        group_size, advantage = self.algorithm.rollouts_per_prompt, self.advantage
        if group_size == 1 and advantage.baseline in ("group", "leave_one_out"):
            raise PydanticCustomError(
                "group_of_one",
                f"`advantage.baseline: {advantage.baseline}` compares the rollouts of one prompt, but "
                "`algorithm.rollouts_per_prompt` is 1, so every advantage would be 0; use at least 2 rollouts, or "
                "`advantage.baseline: batch` or `none` (algorithm reinforce)",
            )
        if group_size == 1 and advantage.scale in ("group_std", "beta"):
            raise PydanticCustomError(
                "group_of_one",
                f"`advantage.scale: {advantage.scale}` needs several rollouts per prompt, but "
                "`algorithm.rollouts_per_prompt` is 1; use at least 2, or `advantage.scale: none` or `batch_std`",
            )
        if advantage.scale == "beta":
            if advantage.order != "normalize_then_sum":
                raise PydanticCustomError(
                    "order",
                    "`advantage.scale: beta` normalises each reward by its own Beta density, so it needs "
                    "`advantage.order: normalize_then_sum`",
                )
            if advantage.baseline != "group":
                raise PydanticCustomError(
                    "baseline",
                    "`advantage.scale: beta` is defined around the group mean: set `advantage.baseline: group`",
                )
            for name, spec in self.rewards.functions.items():
                if spec.range is None:
                    raise PydanticCustomError(
                        "range",
                        f"`advantage.scale: beta` maps rewards to [0, 1]: give `rewards.functions.{name}.range`",
                    )
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
        return [*pass_at, f"mean@{self.evaluation.samples_per_prompt}", *rewards]

    @property
    def has_eval_data(self) -> bool:
        explicit = getattr(self.data, "eval_path", None) or getattr(self.data, "eval_split", None)
        return bool(explicit) or self.data.eval_size > 0

    def dump(self) -> str:
        """The resolved recipe as YAML; reading it back gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


ADVANTAGE_PRESETS = {
    "grpo": {"baseline": "group", "scale": "group_std"},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
    "reinforce": {"baseline": "none", "scale": "none"},
}


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads `1e-5` as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise RecipeError(f"line {line}: the key `{key}` appears twice", fix="keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a signed exponent in a float; people write 1e-5.
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse YAML text safely (no Python tags).

    Raises:
        RecipeError: the text is not YAML, holds an unsafe tag, or repeats a key.
    """
    try:
        return yaml.load(text, _RecipeLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError("this is not YAML that a recipe may hold", why=str(error)) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in a raw recipe in place; the value is read as YAML.

    Raises:
        RecipeError: no `=`, or the path runs through something that is not a section.
    """
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"override `{override}` is not `key.sub=value`")
    *parents, last = path.strip().split(".")
    target = values
    for depth, key in enumerate(parents):
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise RecipeError(f"override `{override}`: `{'.'.join(parents[: depth + 1])}` is a value, not a section")
    target[last] = parse_yaml(text)


def _message(error: ValidationError, raw: Any) -> str:
    """One line per problem, each naming the key as it stands in the file."""
    lines = []
    for item in error.errors():
        path, here = [], raw
        for piece in item["loc"]:
            # Pydantic also puts the chosen union member into the location; that is no key of the file.
            if isinstance(here, dict) and piece in here:
                here = here[piece]
                path.append(str(piece))
            elif isinstance(here, list) and isinstance(piece, int):
                path.append(str(piece))
            elif piece == item["loc"][-1] and item["type"] == "missing":
                path.append(str(piece))
        shown = "" if item["type"] == "missing" or isinstance(here, dict | list) else f" (got {here!r})"
        key = ".".join(path)
        lines.append(f"`{key}`: {item['msg']}{shown}" if key else item["msg"])
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


def read_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `key.sub=value` overrides.

    Raises:
        RecipeError: the file is missing, not YAML, or not a recipe.
    """
    path = Path(path)
    if not path.is_file():
        here = sorted(str(found) for found in Path("recipes").glob("**/*.yaml")) if Path("recipes").is_dir() else []
        raise RecipeError(f"no recipe at {path}", fix=nearest(str(path), here) or "`rlbal recipes` lists those shipped")
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
