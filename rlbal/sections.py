"""The sections of a recipe: their keys, types, defaults and what each refuses on its own."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from rlbal.errors import nearest
from rlbal.section import NAME, Section, UserPath


class AlgorithmSection(Section):
    """Which policy-gradient estimator; a preset of `advantage.baseline` and `advantage.scale`."""

    name: Literal["grpo", "rloo", "reinforce", "ppo"] = Field(
        default="grpo",
        description="grpo: group baseline and group std; rloo: leave-one-out baseline, no scale; "
        "reinforce: no baseline, no scale. `advantage.*` overrides either. ppo: a critic and `ppo.*` instead.",
    )
    rollouts_per_prompt: int = Field(default=8, ge=1, description="Completions sampled for each prompt (G in GRPO).")


class WarmStartSection(Section):
    """Supervised start of the tiny model on worked traces that carry a planted flaw (see `rlbal.warm_start`)."""

    steps: int = Field(default=1500, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=4e-3, gt=0)
    carry_error: float = Field(
        default=0.55, ge=0, le=1, description="Probability that a carry, borrow or change of sign is forgotten."
    )
    random_error: float = Field(
        default=0.05, ge=0, le=1, description="Probability that a step is off by a random amount."
    )
    repeat_step: float = Field(default=0.5, ge=0, le=1, description="Probability that a worked step is written twice.")
    drop_tag: float = Field(default=0.15, ge=0, le=1, description="Probability that one of the four tags is left out.")


class TinySection(Section):
    """A tiny Qwen3-style model built on the spot, with a byte tokenizer, for machines without a model hub."""

    hidden_size: int = Field(default=96, ge=8)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=4, ge=1)
    max_positions: int = Field(default=2048, ge=16)
    phrases: list[str] = Field(default_factory=list, description="Strings that become one ordinary token each.")
    warm_start: WarmStartSection | None = Field(default=None, description="Leave out for a random model.")


class ModelSection(Section):
    """The policy: a hub id, a folder, or a tiny model built on the spot."""

    name_or_path: UserPath | None = None
    tiny: TinySection | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attn_implementation: str | None = None
    quantization: Literal["4bit"] | None = Field(
        default=None,
        description="Hold the frozen weights under `lora` in 4 bits (QLoRA: NF4, double quantization, computing in "
        "bfloat16); needs the extra `qlora`. `dtype` is then that of the weights that stay as they are.",
    )
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

    prompt: str = Field(default="{question}", description="Prompt template over the dataset's columns.")
    system: str | None = Field(default=None, description="System prompt (template); implies a conversational prompt.")
    conversational: bool = Field(
        default=False, description="Render as chat messages and use the model's chat template."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Rename columns: new name -> name in the dataset, e.g. answer: solution."
    )
    max_rows: int | None = Field(default=None, ge=1, description="Use only the first rows of the training data.")
    eval_size: int = Field(
        default=128, ge=0, description="Rows held out by seed for evaluation; no training prompt repeats."
    )
    difficulty: str | None = Field(default=None, description="Column by which evaluation is broken down.")
    max_prompt_tokens: int | None = Field(default=None, ge=1, description="Longest prompt, in tokens of the model.")
    overlong: Literal["error", "drop"] = Field(default="error", description="What to do with longer prompts.")

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, values: Any) -> Any:
        if isinstance(values, dict) and "streaming" in values:
            raise PydanticCustomError(
                "streaming",
                "datasets are read whole, since prompts come again, get their shares of rollouts and may retire: leave "
                "out `data.streaming`, and use `data.max_rows` or a slice such as `split: train[:100000]` to read less",
            )
        return values


class ReasoningGymData(DataSection):
    """Problems made by a reasoning-gym task (or its `composite` of several)."""

    source: Literal["reasoning_gym"]
    task: str
    config: dict[str, Any] = Field(default_factory=dict, description="The task's own options.")
    size: int = Field(default=10_000, ge=1, description="Problems generated before the held-out ones are split off.")


class FileData(DataSection):
    """Local JSONL, Parquet or CSV files."""

    source: Literal["file"]
    path: UserPath | list[UserPath]
    eval_path: UserPath | list[UserPath] | None = Field(default=None, description="Held-out files, no split by seed.")


class FolderData(DataSection):
    """A dataset saved with `datasets.Dataset.save_to_disk` (a DatasetDict needs `split`)."""

    source: Literal["folder"]
    path: UserPath
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
SOURCES: list[str] = [
    get_args(kind.model_fields["source"].annotation)[0] for kind in (ReasoningGymData, FileData, FolderData, HubData)
]


class RewardSpec(Section):
    """One reward function. Its key under `rewards.functions` is its name in metrics and reports."""

    function: str = Field(description="`module:function` or `path/to/file.py:function`, TRL's reward signature.")
    args: dict[str, Any] = Field(default_factory=dict, description="Extra keyword arguments for the function.")
    weight: float = Field(default=1.0, description="Weight in the sum of rewards.")
    range: tuple[float, float] | None = Field(default=None, description="Lowest and highest value; others are errors.")
    rowwise: bool = Field(
        default=False,
        description="Each score depends on its own row alone: the function may run in killable worker processes, while "
        "other rows are still being generated, and once for rows with equal arguments.",
    )
    timeout: float | None = Field(default=None, gt=0, description="Seconds per completion; default `rewards.timeout`.")
    unsafe: bool = Field(default=False, description="Allow a scorer that evaluates the completion as code.")

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if ":" not in self.function:
            raise PydanticCustomError(
                "function",
                f"`{self.function}` names no function; write `module:function` or `path/to/file.py:function`",
            )
        if self.range is not None and not self.range[0] < self.range[1]:
            raise PydanticCustomError("range", f"`range` must be [low, high] with low < high, not {list(self.range)}")
        return self


class RewardsSection(Section):
    """The reward functions and what to do when one fails."""

    functions: dict[str, RewardSpec]
    success: str | None = Field(
        default=None, description="The reward that says a rollout succeeded; default: the first."
    )
    on_error: Literal["raise", "skip"] = Field(
        default="raise", description="A failed score stops training (after a checkpoint), or the row goes without it."
    )
    max_failed_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="With `skip`: stop when more than this share of a batch fails for one reward.",
    )
    timeout: float = Field(default=10.0, gt=0, description="Seconds per completion in a worker.")
    workers: int | None = Field(
        default=None, ge=1, description="Worker processes for rowwise rewards; default: the cores."
    )
    memory_mb: int = Field(
        default=2048, ge=64, description="Memory limit of one worker, in MiB, beyond what it starts with."
    )

    @model_validator(mode="after")
    def _names(self) -> Self:
        if not self.functions:
            raise PydanticCustomError("rewards", "`rewards.functions` is empty; name at least one reward function")
        for name in self.functions:
            if not NAME.fullmatch(name):
                raise PydanticCustomError(
                    "reward_name", f"reward name `{name}` must start with a letter and hold only A-Z a-z 0-9 _ -"
                )
        if all(spec.weight == 0 for spec in self.functions.values()):
            raise PydanticCustomError(
                "weights", "every reward has `weight: 0`, so there is nothing to learn; give at least one a weight"
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


class EvaluationSection(Section):
    """Held-out evaluation with its own sampling settings, during training and by `rlbal eval`."""

    every: int | None = Field(
        default=None, ge=1, description="Optimizer steps between evaluations; unset: none in between."
    )
    at_start: bool = True
    at_end: bool = True
    prompts: int | None = Field(default=None, ge=1, description="Held-out prompts to use; default: all.")
    samples_per_prompt: int = Field(default=4, ge=1)
    pass_at: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [1])
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0: off.")
    greedy: bool = Field(default=False, description="Also decode each prompt once greedily.")
    max_completion_length: int | None = Field(default=None, ge=1, description="Default: the trainer's.")
    batch_size: int = Field(default=64, ge=1, description="Completions generated at once per process.")
    best_metric: str = Field(
        default="pass@1",
        description="Keeps the best checkpoint: pass@k, mean@k or reward/<name>, with a `budget` also as budget/..., "
        "which compares checkpoints at different budgets.",
    )

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


class SpeedSection(Section):
    """Faster steps. None of these keys changes what is learned."""

    compact_micro_batches: bool = Field(
        default=True,
        description="Leave rows without advantage out of the backward pass, sort the rest by length and cut their "
        "padding; the gradient stays the same.",
    )
    max_tokens_per_micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Micro-batches of at most so many tokens, padding included, instead of as many as "
        "`trainer.per_device_train_batch_size` rows of the longest length would have.",
    )
    generation: Literal["rlbal", "transformers"] = Field(
        default="rlbal",
        description="Who decodes when neither vLLM nor continuous batching does: rlbal drops finished rows and shares "
        "the prefill of a prompt's rows; transformers keeps all rows to the end.",
    )
    rows_at_once: int | None = Field(
        default=None, ge=1, description="Rows that rlbal decodes at once per process, to save memory; default: all."
    )


class LaunchSection(Section):
    """The processes the recipe is meant for. Batch sizes are checked against these, not the processes at hand."""

    num_processes: int = Field(default=1, ge=1, description="Processes over all nodes, one per GPU.")
    accelerate: UserPath | None = Field(default=None, description="A name in accelerate_configs/, or a path.")
