"""From the arguments of a reward function to jobs for worker processes."""

import json
from typing import Any

from rlbal.errors import RewardError
from rlbal.recipe import RewardSpec
from rlbal.rewards.loading import MEAN_LENGTH, TRAINER_ARGUMENTS, Signature
from rlbal.rewards.sandbox import Job


def make_jobs(name: str, spec: RewardSpec, said: Signature, timeout: float, given: dict[str, Any]) -> list[Job]:
    """One job per row if the reward is rowwise, else one for the whole batch.

    Args:
        name: of the reward.
        spec: its entry in the recipe.
        said: the signature of its function.
        timeout: seconds per row.
        given: `completions` and whatever else there is for N rows.

    Raises:
        RewardError: a column that the function names cannot be written as JSON, or has not one value per completion.
    """
    N = len(given["completions"])
    columns = _columns(name, spec, said, given)
    if spec.rowwise:
        batches = [({key: [values[n]] for key, values in columns.items()}, 1) for n in range(N)]
    else:
        batches = [(columns, N)] if N else []
    return [
        Job(
            json.dumps({"reward": name, "rows": rows, "timeout": timeout * rows, "columns": batch}),
            rows,
            timeout * rows,
            spec.range,
            spec.rowwise,
        )
        for batch, rows in batches
    ]


def _columns(name: str, spec: RewardSpec, said: Signature, given: dict[str, Any]) -> dict[str, list[Any]]:
    """The columns that the function names, and all others that JSON can carry if it has `**kwargs`.

    Sorted by name, so that equal arguments make equal requests.
    """
    columns: dict[str, list[Any]] = {}
    for column, values in sorted(said.accepted(given).items()):
        if column in TRAINER_ARGUMENTS or column in spec.args:
            continue
        if spec.rowwise and column == MEAN_LENGTH and column not in said.named:
            continue
        try:
            json.dumps(values)
        except (TypeError, ValueError) as error:
            if column not in said.named:
                continue
            key = f"rewards.functions.{name}.rowwise"
            raise RewardError(
                f"reward `{name}`: column `{column}` cannot go to a worker process",
                why=f"rows travel as JSON: {error}",
                fix=f"turn the column into text or numbers{f', or set `{key}: false`' if spec.rowwise else ''}",
            ) from None
        if len(values) != len(given["completions"]):
            rows = len(given["completions"])
            raise RewardError(f"reward `{name}`: column `{column}` has {len(values)} values for {rows} completions")
        columns[column] = values
    return columns
