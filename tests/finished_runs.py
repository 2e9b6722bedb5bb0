"""Run directories as a finished run leaves them, without the run: for tests of what reads them."""

from pathlib import Path
from typing import Any

from rlbal.experiments.results import SAVED_LAST
from rlbal.run import RunDirectory, append_jsonl
from tests.small_recipe import small


def finished_run(
    path: Path, *overrides: str, seed: int = 0, steps: int = 12, entropy: float = 0.5, rollouts: int = 96, **scores: Any
) -> RunDirectory:
    """A run of the small recipe with `steps` steps and one evaluation after the last.

    Args:
        path: the run directory.
        overrides: `key.sub=value`.
        entropy: metrics.jsonl's `entropy` in the last ten steps; 100 before.
        scores: metric -> value in the evaluation, with `at` for `@` and `__` for `/`; default pass@1 of 0.5.
    """
    run = RunDirectory(path)
    run.start(small(*overrides, f"seed={seed}", f"output_dir={path}"))
    for step in range(1, steps + 1):
        value = entropy if step > steps - 10 else 100.0
        append_jsonl(run.metrics_path, {"step": step, "entropy": value, "buffer": [[0.5]], "rollouts": 8 * step})
    metrics = {
        name.replace("at", "@").replace("__", "/"): value for name, value in (scores or {"passat1": 0.5}).items()
    }
    settings = {"max_new_tokens": 64, "seed": seed}
    cost = {"rollouts": rollouts, "tokens_generated": 1000, "gpu_seconds": 2.0}
    append_jsonl(run.evaluations_path, {"step": steps, **cost, "metrics": metrics, "settings": settings})
    run.model_path.mkdir()
    (run.model_path / SAVED_LAST).touch()
    return run
