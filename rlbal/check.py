"""The preflight: what would spoil a run, found before it starts.

Each step looks at one thing and adds findings; a step that fails leaves the ones that need it out. Problems make
`rlbal check` exit with 1; warnings are for a person to judge.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlbal.errors import RlbalError
from rlbal.evaluation import score_texts
from rlbal.gold import score_gold
from rlbal.quiet import quiet_libraries
from rlbal.recipe import EvaluationSection, Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOConfig

    from rlbal.prompts.data import PromptData
    from rlbal.rewards.suite import RewardSuite
    from rlbal.trainer_args import BatchPlan

PROBE_PROMPTS, PROBE_ROLLOUTS = 8, 8
GOLD_ROWS = 200
HIGH_TRUNCATION = 0.5
GOLD_AT_LEAST, SHUFFLED_AT_MOST = 0.9, 0.1

Status = Literal["ok", "warning", "problem"]


@dataclass
class Report:
    """Findings in order, and the figures behind them."""

    recipe: str
    findings: list[tuple[str, Status, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, step: str, status: Status, text: str) -> None:
        self.findings.append((step, status, text))

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[Status, str], None]]:
        """Findings of one step; an error a user can act on becomes a problem."""
        try:
            yield lambda status, text: self.add(name, status, text)
        except RlbalError as error:
            self.add(name, "problem", str(error))

    @property
    def problems(self) -> list[str]:
        return [f"{step}: {text}" for step, status, text in self.findings if status == "problem"]

    def to_json(self) -> dict[str, Any]:
        findings = [{"step": step, "status": status, "text": text} for step, status, text in self.findings]
        return {"recipe": self.recipe, "ok": not self.problems, "findings": findings, "figures": self.figures}


def check_recipe(recipe: Recipe, name: str = "recipe") -> Report:
    """Run every step of the preflight.

    Args:
        recipe: a recipe that could be read.
        name: what to call it.
    """
    quiet_libraries()
    report = Report(name)
    with report.step("recipe") as say:
        args, plan = _bind(recipe, report, say)
    if report.problems:
        return report
    data = suite = model = tokenizer = None
    with report.step("data") as say:
        data = _load_data(recipe, plan, say)
    with report.step("rewards") as say:
        suite = _load_rewards(recipe, data, say)
    with tempfile.TemporaryDirectory() as folder:
        with report.step("model") as say:
            model, tokenizer = _load_model(recipe, Path(folder), say)
        if data is not None and tokenizer is not None:
            with report.step("prompt lengths") as say:
                _check_lengths(recipe, args, data.train, model, tokenizer, report, say)
        if model is not None:
            with report.step("memory") as say:
                _estimate(recipe, args, plan, model, report, say)
        if suite is not None and data is not None:
            with suite:
                with report.step("gold answers") as say:
                    _check_gold(recipe, suite, data.train, report, say)
                if model is not None:
                    with report.step("probe") as say:
                        _probe(recipe, args, suite, data.train, model, tokenizer, report, say)
    return report


def _bind(recipe: Recipe, report: Report, say: Callable[[Status, str], None]) -> "tuple[GRPOConfig, BatchPlan]":
    from rlbal.launch import accelerate_config
    from rlbal.model import lora_config
    from rlbal.trainer_args import bind_trainer

    args, plan = bind_trainer(recipe)
    lora_config(recipe)
    if recipe.launch.accelerate is not None:
        accelerate_config(recipe.launch.accelerate)
    say("ok", plan.explain())
    report.figures["batch"] = {"rollouts": plan.rollouts, "prompts": plan.prompts, "num_processes": plan.num_processes}
    return args, plan


def _load_data(recipe: Recipe, plan: "BatchPlan", say: Callable[[Status, str], None]) -> "PromptData":
    from rlbal.prompts.data import load_data

    data = load_data(recipe.data, recipe.seed)
    held_out = len(data.eval) if data.eval is not None else 0
    columns = ", ".join(data.train.column_names)
    say("ok", f"{len(data.train)} training prompts, {held_out} held out; columns: {columns}")
    for note in data.notes:
        say("ok", note)
    if len(data.train) < plan.prompts:
        say("problem", f"{len(data.train)} training prompts do not fill a generation batch of {plan.prompts}")
    return data


def _load_rewards(recipe: Recipe, data: "PromptData | None", say: Callable[[Status, str], None]) -> "RewardSuite":
    from rlbal.rewards.suite import RewardSuite

    suite = RewardSuite(recipe.rewards)
    if data is not None:
        suite.check_columns(data.train.column_names)
    suite.start()
    say("ok", f"{', '.join(suite.names)}; success: {recipe.rewards.success_name}; {suite.isolation}")
    return suite


def _load_model(recipe: Recipe, folder: Path, say: Callable[[Status, str], None]) -> tuple[Any, Any]:
    from rlbal.model import build_tiny, load_model, load_tokenizer

    source: str | Path | None = recipe.model.name_or_path
    if recipe.model.tiny is not None:
        # The warm start takes minutes and does not depend on anything that is checked here.
        tiny = recipe.model.tiny.model_copy(update={"warm_start": None})
        cold = recipe.model_copy(update={"model": recipe.model.model_copy(update={"tiny": tiny})})
        source = folder / "tiny"
        build_tiny(cold, None, source)
    assert source is not None
    tokenizer, model = load_tokenizer(source, recipe.model), load_model(source, recipe.model)
    say("ok", f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    return model, tokenizer


def _check_lengths(
    recipe: Recipe,
    args: "GRPOConfig",
    rows: "Dataset",
    model: Any,
    tokenizer: Any,
    report: Report,
    say: Callable[[Status, str], None],
) -> None:
    from rlbal.model import context_length
    from rlbal.prompts.data import prompt_token_lengths

    lengths = prompt_token_lengths(rows, tokenizer, args.chat_template_kwargs)
    longest = max(lengths)
    median, high = (int(value) for value in np.percentile(lengths, [50, 99]))
    report.figures["prompt_tokens"] = {"median": median, "p99": high, "max": longest}
    say("ok", f"prompt tokens: median {median}, 99 % up to {high}, longest {longest}")
    limit = recipe.data.max_prompt_tokens
    if limit is not None and longest > limit:
        over = sum(length > limit for length in lengths)
        status: Status = "warning" if recipe.data.overlong == "drop" else "problem"
        say(status, f"{over} prompts are longer than `data.max_prompt_tokens` ({limit})")
    kept = longest if limit is None else min(longest, limit)
    context = context_length(model) if model is not None else None
    if context is not None and kept + args.max_completion_length > context:
        say(
            "problem",
            f"longest prompt {kept} + `trainer.max_completion_length` {args.max_completion_length} is more than the "
            f"model's {context} positions; lower it, or set `data.max_prompt_tokens` with `data.overlong: drop`",
        )


def _estimate(
    recipe: Recipe,
    args: "GRPOConfig",
    plan: "BatchPlan",
    model: Any,
    report: Report,
    say: Callable[[Status, str], None],
) -> None:
    from peft import get_peft_model

    from rlbal.launch import accelerate_config
    from rlbal.memory import GIB, estimate_memory, zero_stage
    from rlbal.model import lora_config

    parameters = sum(p.numel() for p in model.parameters())
    lora = lora_config(recipe)
    trainable = parameters
    if lora is not None:
        # The adapter is put on and taken off again: only its size is wanted.
        wrapped = get_peft_model(model, lora)
        trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        wrapped.unload()
    launch = recipe.launch
    tokens = report.figures.get("prompt_tokens", {}).get("max", 0)
    estimate = estimate_memory(
        model.config,
        parameters=parameters,
        trainable=trainable,
        dtype=recipe.model.dtype,
        stage=zero_stage(accelerate_config(launch.accelerate) if launch.accelerate else None),
        num_processes=launch.num_processes,
        rows=plan.per_device * plan.steps_per_generation,
        micro_rows=plan.per_device,
        prompt_tokens=tokens,
        completion_tokens=args.max_completion_length,
        reference=args.beta != 0.0 and lora is None,
    )
    parts = {
        "weights": estimate.weights,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer,
        "reference": estimate.reference,
        "generation cache": estimate.generation_cache,
    }
    listed = ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items() if size)
    report.figures["memory_gib_per_device"] = {name: size / GIB for name, size in parts.items()}
    report.figures["memory_gib_per_device"]["full logits"] = estimate.full_logits / GIB
    say(
        "ok",
        f"per device about {estimate.total / GIB:.3g} GiB before activations ({listed}); {trainable:,} of "
        f"{parameters:,} parameters train. The logits of a micro-batch would take {estimate.full_logits / GIB:.3g} "
        "GiB; TRL computes them in tiles",
    )


def _check_gold(
    recipe: Recipe, suite: "RewardSuite", rows: "Dataset", report: Report, say: Callable[[Status, str], None]
) -> None:
    result = score_gold(recipe, suite, rows.select(range(min(GOLD_ROWS, len(rows)))), recipe.seed)
    if result is None:
        say("warning", "no column holds gold answers, so the rewards cannot be tried on them")
        return
    report.figures["gold"] = result.to_json()
    for name, (gold, shuffled) in result.means.items():
        judged = name in result.correctness
        text = f"{name}: gold answers {gold:.3f}, answers of other rows {shuffled:.3f}"
        if judged:
            text += f" (equal to the row's own: {result.equal_share:.3f})"
        fine = not judged or (gold >= GOLD_AT_LEAST and shuffled <= result.equal_share + SHUFFLED_AT_MOST)
        say("ok" if fine else "problem", text if fine else f"{text}: it does not tell right from wrong; {result.hint}")
    for failure in suite.take_failures():
        say("warning", f"reward `{failure.reward}` {failure.reason} on {failure.count} of these: {failure.example}")


def _probe(
    recipe: Recipe,
    args: "GRPOConfig",
    suite: "RewardSuite",
    rows: "Dataset",
    model: Any,
    tokenizer: Any,
    report: Report,
    say: Callable[[Status, str], None],
) -> None:
    """A few real rollouts with the training settings."""
    from rlbal.rewards.outcomes import verdict
    from rlbal.sampling import generate_samples

    if recipe.model.tiny is not None and recipe.model.tiny.warm_start is not None:
        say("ok", "left out: the tiny model gets its warm start only when the run starts")
        return
    rows = rows.select(range(min(PROBE_PROMPTS, len(rows))))
    count = min(PROBE_ROLLOUTS, max(2, recipe.algorithm.rollouts_per_prompt))
    settings = EvaluationSection(
        samples_per_prompt=count, temperature=args.temperature, top_p=args.top_p, top_k=max(args.top_k, 0)
    )
    samples = generate_samples(
        model,
        tokenizer,
        rows["prompt"],
        settings,
        max_new_tokens=args.max_completion_length,
        seed=recipe.seed,
        progress=True,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    flat = [sample for row in samples for sample in row]
    rewards_NK = score_texts(suite, rows[:], [one.text for one in flat], [one.ids for one in flat])
    rewards_PGK = rewards_NK.reshape(len(samples), count, -1)
    truncated = float(np.mean([one.truncated for one in flat]))
    k = suite.names.index(recipe.rewards.success_name)
    spread = np.ptp(np.nan_to_num(rewards_PGK[:, :, k], nan=0.0), axis=1)
    dead = float(np.mean(spread == 0))
    means = {
        name: float(np.nanmean(column))
        for name, column in zip(suite.names, rewards_NK.T, strict=True)
        if not np.isnan(column).all()
    }
    report.figures["probe"] = {"rollouts": len(flat), "truncated": truncated, "dead_groups": dead, "means": means}
    listed = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    say(
        "ok",
        f"{len(flat)} rollouts of {len(samples)} prompts: {listed}; truncated {truncated:.0%}, dead groups {dead:.0%}",
    )
    if truncated > HIGH_TRUNCATION:
        say(
            "warning",
            f"{truncated:.0%} of completions are cut off: raise `trainer.max_completion_length`, or the reward may never be reached",
        )
    if dead == 1.0:
        say(
            "warning",
            f"every group scores the same on `{recipe.rewards.success_name}`: there is nothing to learn from yet; try an easier mix, more rollouts, or a better start",
        )
    reason = verdict(suite.take_failures(), len(flat), recipe.rewards)
    if reason is not None:
        say("problem", reason)


def render(report: Report, console: Console | None = None) -> None:
    """Print findings as a table, problems repeated at the end."""
    console = console or Console()
    marks = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "problem": ("problem", "bold red")}
    table = Table("step", "", "finding", title=Text(f"Preflight of {report.recipe}"))
    for step, status, text in report.findings:
        mark, style = marks[status]
        table.add_row(step, Text(mark, style), Text(text))
    console.print(table)
    if report.problems:
        console.print(Text(f"{len(report.problems)} problem(s):", "bold red"))
        for problem in report.problems:
            console.print(Text(f"- {problem}"))
    else:
        console.print(Text("no problems found", "green"))
