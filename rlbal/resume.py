"""Whether a checkpoint fits the recipe and the processes that are to go on from it, and what has changed since."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rlbal.batch_plan import BatchPlan
from rlbal.errors import RunError
from rlbal.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

# Without these a checkpoint's tensors, counts or random numbers mean something else.
TIED = (
    "seed",
    "model.tiny",
    "model.revision",
    "lora",
    "ppo.critic",
    "allocation.strata",
    "ppo.critic_learning_rate",
    # The optimizer and its schedule go on as they are in the checkpoint, whatever the recipe says.
    "trainer.optim",
    "trainer.learning_rate",
    "trainer.weight_decay",
    "trainer.adam_",
    "trainer.lr_scheduler_",
    "trainer.warmup_",
    "trainer.num_iterations",
)
# These decide where and how a run is recorded, not what it learns.
FREE = ("output_dir", "launch", "trainer.save_", "trainer.report_to", "trainer.logging_dir")
PROBED_ROWS = 1000


def differences(then: Any, now: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys in which two recipes, as JSON types, differ: dotted key -> (then, now); absent ones are None."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return {} if then == now else {path: (then, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*then, *(key for key in now if key not in then)]:
        found |= differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
    return found


def data_probe(rows: "Dataset") -> dict[str, Any]:
    """What tells one training set from another: its size and a digest of up to 1,000 rows spread over it."""
    indices = sorted({len(rows) * place // PROBED_ROWS for place in range(PROBED_ROWS)})
    text = json.dumps(rows[indices], ensure_ascii=True, sort_keys=True, default=str)
    return {"rows": len(rows), "digest": hashlib.sha256(text.encode()).hexdigest()}


def identity(recipe: Recipe, plan: BatchPlan, rows: "Dataset", engine: str) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it, as JSON types."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "plan": asdict(plan),
        "data": data_probe(rows),
        "engine": engine,
    }


def check_fits(saved: dict[str, Any], now: dict[str, Any], checkpoint: str, mid_cycle: bool) -> list[str]:
    """See whether a run may go on from a checkpoint.

    Args:
        saved, now: what `identity` gave then and gives now.
        checkpoint: its name.
        mid_cycle: it holds rollouts of each process that are still to be trained on.

    Returns:
        What has changed, in sentences: from here on it is not the run that was started.

    Raises:
        RunError: it does not fit; every key that differs is named.
    """
    changed = differences(saved["recipe"], now["recipe"])
    changed = {key: pair for key, pair in changed.items() if not key.startswith(FREE)}
    same_data = saved["data"] == now["data"]
    problems = [_describe(key, *pair) for key, pair in changed.items() if _is_tied(key, *pair, same_data=same_data)]
    if not same_data and not any(key.startswith("data.") for key in changed):
        problems.append(f"the training data ({saved['data']['rows']} rows then, {now['data']['rows']} now, other rows)")
    if _batch(saved["plan"]) != _batch(now["plan"]):
        problems.append(
            f"the batches ({_batch(saved['plan'])} then, {_batch(now['plan'])} now: "
            "`launch.num_processes`, `trainer.per_device_train_batch_size`, `trainer.gradient_accumulation_steps`, "
            "`trainer.steps_per_generation`, `algorithm.rollouts_per_prompt`)"
        )
    if saved["engine"] != now["engine"]:
        problems.append(_describe("launch.accelerate", saved["engine"], now["engine"]))
    processes = saved["plan"]["num_processes"], now["plan"]["num_processes"]
    if processes[0] != processes[1] and (mid_cycle or now["engine"] != "plain"):
        why = "it holds rollouts of each of them" if mid_cycle else "the optimizer's state is in as many pieces"
        problems.append(f"the number of processes ({processes[0]} then, {processes[1]} now; {why})")
    if problems:
        raise RunError(
            f"{checkpoint} does not fit the recipe",
            why="different are " + "; ".join(problems),
            fix="resume with the recipe in the run's directory, or start afresh with --overwrite",
        )
    notes = [f"resumed with another {_describe(key, *pair)}" for key, pair in changed.items()]
    if processes[0] != processes[1]:
        notes.append(f"resumed on {processes[1]} processes, not {processes[0]}: equal up to rounding at best")
    return notes


def _is_tied(key: str, then: Any, now: Any, same_data: bool) -> bool:
    if key.startswith("rewards.functions."):  # what a reward is may change, which rewards there are may not
        return key.count(".") == 2 and (then is None or now is None)
    if key == "algorithm.name":
        return "ppo" in (then, now)
    if key.startswith("data."):  # a file may have moved
        return not same_data
    if key == "model.name_or_path":  # a folder may have moved
        return Path(str(then)).name != Path(str(now)).name
    return any(key == tied or key.startswith(tied if tied.endswith("_") else f"{tied}.") for tied in TIED)


def _describe(key: str, then: Any, now: Any) -> str:
    before, after = (shorten(str(value), width=80, placeholder=" …") for value in (then, now))
    return f"`{key}` ({before} then, {after} now)"


def _batch(plan: dict[str, int]) -> str:
    """What must be equal for steps and generation batches to go on, whatever the number of processes."""
    per_step = plan["num_processes"] * plan["per_device"]
    rollouts = per_step * plan["steps_per_generation"]
    return (
        f"{rollouts} rollouts of {rollouts // plan['rollouts_per_prompt']} prompts, "
        f"{per_step * plan['accumulation']} rows a step"
    )
