"""The preflight: what would spoil a run, found before it starts.

Each step looks at one thing and adds findings; a step that fails leaves the ones that need it out. Problems make
`rlbal check` exit with 1; warnings are for a person to judge.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlbal.check_report import Report, Say, Status, render
from rlbal.gold import score_gold
from rlbal.probe import PROMPTS, probe
from rlbal.quiet import quiet_libraries
from rlbal.recipe import Recipe
from rlbal.rewards.outcomes import verdict
from rlbal.speed import describe

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOConfig

    from rlbal.batch_plan import BatchPlan
    from rlbal.prompts.data import PromptData
    from rlbal.rewards.suite import RewardSuite
    from rlbal.scoring import Table

__all__ = ["Report", "check_recipe", "render"]

GOLD_ROWS = 2000
HIGH_TRUNCATION = 0.5
GOLD_AT_LEAST, SHUFFLED_AT_MOST = 0.9, 0.1


@dataclass(frozen=True)
class Bound:
    """A recipe with TRL's settings and the batch arithmetic."""

    recipe: Recipe
    args: "GRPOConfig"
    plan: "BatchPlan"


def check_recipe(recipe: Recipe, name: str | None = None) -> Report:
    """Run every step of the preflight.

    Args:
        recipe: a recipe that could be read.
        name: what to call it; default its output directory.
    """
    quiet_libraries()
    report = Report(name or recipe.output_dir)
    bound = data = suite = model = tokenizer = rows = None
    with report.step("recipe") as say:
        bound = _bind(recipe, report, say)
    if bound is None:
        return report
    with report.step("rewards") as say:
        suite = _load_rewards(recipe, say)
    with report.step("data") as say:
        data = _load_data(bound, say)
    with tempfile.TemporaryDirectory() as folder, report.step("model") as say:
        model, tokenizer = _load_model(bound, Path(folder), say)
    with report.step("budget") as say:
        _check_budget(bound, model, say)
    if data is not None and tokenizer is not None:
        with report.step("prompt lengths") as say:
            rows = _check_lengths(bound, data.train, model, tokenizer, report, say)
    if model is not None:
        with report.step("memory") as say:
            _estimate(bound, model, report, say)
        with report.step("speed") as say:
            for line in describe(recipe, model, bound.args):
                say("ok", line)
    if suite is None or data is None:
        return report
    with suite, report.step("columns"):
        suite.check_columns(data.train.column_names)
        with report.step("gold answers") as say:
            _check_gold(bound, suite, data.train, report, say)
        if rows is not None:
            with report.step("probe") as say:
                _probe(bound, suite, rows, model, tokenizer, report, say)
    return report


def _bind(recipe: Recipe, report: Report, say: Say) -> Bound:
    from rlbal.trainer_args import bind_trainer, missing_package

    args, plan = bind_trainer(recipe)
    if missing := missing_package(args):
        say("warning", f"on this machine the run would stop: {missing}")
    say("ok", plan.explain())
    report.figures["batch"] = {"rollouts": plan.rollouts, "prompts": plan.prompts, "num_processes": plan.num_processes}
    return Bound(recipe, args, plan)


def _load_rewards(recipe: Recipe, say: Say) -> "RewardSuite":
    from rlbal.rewards.suite import RewardSuite

    suite = RewardSuite.for_recipe(recipe)
    suite.start()
    say("ok", f"{', '.join(suite.names)}; success: {recipe.rewards.success_name}; {suite.isolation}")
    return suite


def _load_data(bound: Bound, say: Say) -> "PromptData":
    from rlbal.prompts.data import load_data

    data = load_data(bound.recipe.data, bound.recipe.seed)
    held_out = len(data.eval) if data.eval is not None else 0
    columns = ", ".join(data.train.column_names)
    say("ok", f"{len(data.train)} training prompts, {held_out} held out; columns: {columns}")
    for note in data.notes:
        say("ok", note)
    if len(data.train) < bound.plan.prompts:
        say("problem", f"{len(data.train)} training prompts do not fill a generation batch of {bound.plan.prompts}")
    return data


def _load_model(bound: Bound, folder: Path, say: Say) -> tuple[Any, Any]:
    from rlbal.model import build_tiny, default_device, load_model, load_tokenizer
    from rlbal.trainer_args import completion_limit

    recipe = bound.recipe
    source: str | Path | None = recipe.model.name_or_path
    if recipe.model.tiny is not None:
        # The warm start takes minutes and does not depend on anything that is checked here.
        tiny = recipe.model.tiny.model_copy(update={"warm_start": None})
        cold = recipe.model_copy(update={"model": recipe.model.model_copy(update={"tiny": tiny})})
        source = folder / "tiny"
        build_tiny(cold, None, source, completion_limit(bound.args))
    assert source is not None
    tokenizer = load_tokenizer(source, recipe.model)
    model: Any = load_model(source, recipe.model)
    say("ok", f"{type(model).__name__}, {model.num_parameters():,} parameters")
    return model.to(default_device()), tokenizer


def _check_budget(bound: Bound, model: Any, say: Say) -> None:
    """Say the budget schedule in words, and whether the model has room for it."""
    from rlbal.budget_checks import check_positions
    from rlbal.model import context_length
    from rlbal.prompts.budget_words import in_words
    from rlbal.trainer_args import completion_limit

    section, limit = bound.recipe.budget, completion_limit(bound.args)
    words = in_words(section, limit, bound.args.max_steps)
    if words is None:
        return
    say("ok", words)
    if model is not None and (positions := context_length(model)) is not None:
        check_positions(section, limit, positions)


def _first_rows(bound: Bound, rows: "Dataset", count: int) -> "tuple[Table, int]":
    """The first rows as the first generation batch would have them, and where their completions would be cut off."""
    from rlbal.prompts.budget import longest_completion, make_budget, tell_budget
    from rlbal.trainer_args import completion_limit

    recipe, limit = bound.recipe, completion_limit(bound.args)
    budget = make_budget(recipe.budget, limit, bound.args.max_steps).tokens(0)
    return tell_budget(rows[:count], recipe, budget or limit), longest_completion(recipe.budget, budget, limit)


def _check_lengths(
    bound: Bound, rows: "Dataset", model: Any, tokenizer: Any, report: Report, say: Say
) -> "Dataset | None":
    """Look at the prompts in tokens; the rows that training would use, if there are any."""
    from rlbal.model import context_length
    from rlbal.prompts.lengths import prompt_token_lengths
    from rlbal.trainer_args import chat_options, completion_limit

    data, completion = bound.recipe.data, completion_limit(bound.args)
    lengths = prompt_token_lengths(rows, tokenizer, data, completion, chat_options(bound.args))
    median, high = (int(value) for value in np.percentile(lengths, [50, 99]))
    report.figures["prompt_tokens"] = {"median": median, "p99": high, "max": max(lengths)}
    say("ok", f"prompt tokens: median {median}, 99 % up to {high}, longest {max(lengths)}")
    limit = data.max_prompt_tokens or max(lengths)
    kept = [row for row, length in enumerate(lengths) if length <= limit]
    if over := len(lengths) - len(kept):
        status: Status = "warning" if data.overlong == "drop" else "problem"
        what = "are dropped" if data.overlong == "drop" else "would stop the run"
        say(status, f"{over} prompts {what}: they are longer than `data.max_prompt_tokens` ({limit})")
        if data.overlong == "drop" and len(kept) < bound.plan.prompts:
            say("problem", f"the {len(kept)} prompts left do not fill a generation batch of {bound.plan.prompts}")
    longest, context = min(max(lengths), limit), context_length(model)
    if context is not None and longest + completion > context:
        say(
            "problem",
            f"longest prompt {longest} + `trainer.max_completion_length` {completion} is more than the model's "
            f"{context} positions; lower it, or set `data.max_prompt_tokens` with `data.overlong: drop`",
        )
    return rows.select(kept) if kept else None


def _estimate(bound: Bound, model: Any, report: Report, say: Say) -> None:
    from rlbal.launch import accelerate_config
    from rlbal.memory import GIB, critic_parameters, estimate_memory, zero_stage
    from rlbal.model import adapter_parameters, lora_config
    from rlbal.trainer_args import completion_limit

    recipe, plan, lora = bound.recipe, bound.plan, lora_config(bound.recipe)
    parameters = trainable = model.num_parameters()
    if lora is not None:
        trainable = adapter_parameters(model, lora)
    critic = 0
    if recipe.ppo is not None:
        backbone = model.base_model.num_parameters() if recipe.ppo.critic == "separate" else 0
        critic = critic_parameters(model.config.get_text_config().hidden_size, backbone)
    accelerate = recipe.launch.accelerate
    estimate = estimate_memory(
        model.config,
        parameters=parameters,
        trainable=trainable,
        dtype=recipe.model.dtype,
        stage=zero_stage(accelerate_config(accelerate) if accelerate else None),
        num_processes=recipe.launch.num_processes,
        rows=plan.per_device * plan.steps_per_generation,
        micro_rows=plan.per_device,
        prompt_tokens=report.figures.get("prompt_tokens", {}).get("max", 0),
        completion_tokens=completion_limit(bound.args),
        reference=bound.args.beta != 0.0 and lora is None,
        critic=critic,
        weight_bytes=None if recipe.model.quantization is None else model.get_memory_footprint(),
    )
    parts = {name: size / GIB for name, size in estimate.parts().items()}
    report.figures["memory"] = {"gib_per_device": {**parts, "full logits": estimate.full_logits / GIB}}
    listed = ", ".join(f"{name} {size:.3g}" for name, size in parts.items() if size)
    say(
        "ok",
        f"per device about {estimate.total / GIB:.3g} GiB before activations ({listed}); {trainable:,} of "
        f"{parameters:,} parameters train. The logits of a micro-batch would take {estimate.full_logits / GIB:.3g} "
        "GiB; TRL computes them in tiles",
    )


def _check_gold(bound: Bound, suite: "RewardSuite", rows: "Dataset", report: Report, say: Say) -> None:
    recipe = bound.recipe
    result = score_gold(suite, _first_rows(bound, rows, GOLD_ROWS)[0], recipe.seed)
    if result is None:
        say("warning", "no column holds gold answers, so the rewards cannot be tried on them")
        return
    report.figures["gold"] = result.to_json()
    for name, (gold, shuffled) in result.means.items():
        text = f"{name}: gold answers {gold:.3f}, answers of other rows {shuffled:.3f}"
        if name not in result.correctness:
            say("ok", text)
            continue
        text += f" ({result.equal_share:.3f} are equal to the row's own)"
        if gold >= GOLD_AT_LEAST and shuffled <= result.equal_share + SHUFFLED_AT_MOST:
            say("ok", text)
        else:
            hint = "look at its `args`, at `data.columns`, and at the form of the answers"
            say("problem", f"{text}: it does not tell right from wrong; {hint}")
    _report_failures(recipe, suite, result.completions, say)


def _probe(
    bound: Bound, suite: "RewardSuite", rows: "Dataset", model: Any, tokenizer: Any, report: Report, say: Say
) -> None:
    recipe = bound.recipe
    if recipe.model.tiny is not None and recipe.model.tiny.warm_start is not None:
        say("ok", "left out: the tiny model gets its warm start only when the run starts")
        return
    table, limit = _first_rows(bound, rows, PROMPTS)
    result = probe(recipe, bound.args, suite, table, limit, model, tokenizer)
    report.figures["probe"] = result.to_json()
    listed = ", ".join(f"{name} {mean:.3f}" for name, mean in result.means.items())
    say(
        "ok",
        f"{result.rollouts} rollouts of {result.prompts} prompts: {listed}; truncated {result.truncated:.0%}, "
        f"dead groups {result.dead_groups:.0%}",
    )
    if result.truncated > HIGH_TRUNCATION:
        say("warning", "most completions are cut off before their answer: raise `trainer.max_completion_length`")
    if result.dead_groups == 1.0:
        say(
            "warning",
            f"every group scores the same on `{recipe.rewards.success_name}`: there is nothing to learn from yet; "
            "try easier problems, more rollouts per prompt, or a better start",
        )
    _report_failures(recipe, suite, result.rollouts, say)


def _report_failures(recipe: Recipe, suite: "RewardSuite", N: int, say: Say) -> None:
    """What would have stopped a run is a problem; other failures are warnings."""
    failures = suite.take_failures()
    if reason := verdict(failures, N, recipe.rewards):
        say("problem", reason)
        return
    for failure in failures:
        say("warning", f"reward `{failure.reward}` {failure.reason} on {failure.count} of {N}: {failure.example}")
