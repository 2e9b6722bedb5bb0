"""Which prompts the next generation batch has, and how many rollouts each: the recipe's `allocation` at work.

    pool -> P prompts     ledger -> what is believed of them     counts of the largest value -> rows, dealt to processes
    (all of it pure, in rlbal.prompts; here it is put together and its state kept)

Everything here depends on recipe, seed and gathered batches alone, so that every process decides the same by itself.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from rlbal.allocation_checks import strata_of
from rlbal.allocation_sections import KnapsackAllocation
from rlbal.balance.normalization import to_unit_interval
from rlbal.batch import RolloutBatch
from rlbal.batch_plan import BatchPlan
from rlbal.errors import DataError, RewardError
from rlbal.prompts.allocation import mean_counts, posterior_counts, uniform_counts
from rlbal.prompts.dealing import deal
from rlbal.prompts.ledger import PromptLedger
from rlbal.prompts.pool import Mask, PromptPool
from rlbal.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
BINS = 11  # success rates rounded to tenths


class RolloutAllocator:
    """Pool, ledger and shares of one run.

    Args:
        recipe: the run's recipe.
        plan: its batch arithmetic for the processes at hand.
        rows: training data, in the order of their `prompt_index`.
        shuffle: whether epochs are shuffled.

    Raises:
        DataError: the rows are a stream, or `allocation.strata` names no column or one of too many values.
    """

    def __init__(self, recipe: Recipe, plan: BatchPlan, rows: "Dataset", shuffle: bool) -> None:
        if not hasattr(rows, "__len__"):
            raise DataError(
                f"the training rows are a stream ({type(rows).__name__})",
                why="prompts come again, get their shares of rollouts and may retire, so they must be known by number",
                fix="give a `datasets.Dataset`, e.g. `Dataset.from_list(list(stream.take(100_000)))`",
            )
        self.recipe, self.section, self.plan, self.seed = recipe, recipe.allocation, plan, recipe.seed
        self.pool = PromptPool(len(rows), shuffle, recipe.seed, self.section.review_fraction)
        self.ledger = PromptLedger(len(rows), self.section.resolved_forgetting, strata_of(recipe, rows))
        self.accuracy = float("nan")  # of the policy on the training data, as far as the last batch shows
        self._tables: dict[str, Any] = {}

    def draw(self, step: int) -> Ints:
        """The prompts of the next generation batch, one for each rollout, the rows of the first process first: (N,).

        Args:
            step: policy updates so far.
        """
        retired = self._retired if self.section.retire_at is not None else None
        rng = np.random.default_rng((self.seed, self.pool.epoch, self.pool.position))
        prompts_P = self.pool.draw(self.plan.prompts, retired)
        if not isinstance(self.section, KnapsackAllocation):
            return np.repeat(prompts_P, uniform_counts(len(prompts_P), self.plan.rollouts))
        counts_P = self._counts(self.section, prompts_P, step, rng)
        expected_P = self.ledger.expected_lengths(prompts_P)
        return prompts_P[deal(expected_P, counts_P, self.plan.num_processes)]

    def _counts(self, section: KnapsackAllocation, prompts_P: Ints, step: int, rng: np.random.Generator) -> Ints:
        bounds = self.plan.rollouts, section.low, section.high
        if section.belief == "mean":
            return mean_counts(section.value, self.ledger.success_rates(prompts_P), *bounds, rng)
        return posterior_counts(section.value, *self.ledger.belief(prompts_P, step), *bounds, rng)

    def _retired(self, prompts: Ints) -> Mask:
        return self.ledger.retired_M[prompts]

    @property
    def exhausted(self) -> str | None:
        """In words, that too many prompts have retired for another batch; None if not."""
        if self.section.retire_at is None or not self.pool.empty(self.plan.prompts, self._retired):
            return None
        return (
            f"fewer prompts are left than a batch has ({self.plan.prompts}): the policy is believed to solve the "
            f"others at least {self.section.retire_at:.0%} of the time (`allocation.retire_at`)"
        )

    def believed(self, prompts: npt.ArrayLike, step: int) -> Floats:
        """The mean success believed of some prompts, in the order given.

        Where all but the last visit is forgotten, it is as of that visit: at any later step nothing would be left.
        """
        indices = np.asarray(prompts)
        at = np.maximum(self.ledger.last_seen_M[indices], 0) if self.ledger.forgetting == 1.0 else step
        a, b = self.ledger.belief(indices, at)
        return a / (a + b)

    def observe(self, batch: RolloutBatch, step: int) -> None:
        """Take in a batch over all processes.

        Args:
            batch: the batch.
            step: policy updates before it was generated.

        Raises:
            RewardError: something depends on successes, but their reward leaves [0, 1] and has no range.
        """
        success_N = self._successes(batch)
        index_N = batch.prompt_index_N.numpy()
        prompts_P, counts_P = np.unique(index_N, return_counts=True)
        scored_N = ~np.isnan(success_N)
        group_N = batch.group_N.numpy()
        scored_P = np.bincount(group_N, weights=scored_N)
        sums_P = np.bincount(group_N, weights=np.where(scored_N, success_N, 0.0))
        rate_P = np.divide(sums_P, scored_P, out=np.full(len(prompts_P), np.nan), where=scored_P > 0)
        self._tables = {
            "allocation/by_rate": _by_tenths(self.believed(prompts_P, step), counts_P),
            "allocation/by_success": _by_tenths(rate_P, counts_P),
        }
        self.ledger.observe(index_N, success_N, batch.completion_tokens_N.numpy(), step)
        if self.section.retire_at is not None:
            self.ledger.retire(prompts_P, self.section.retire_at)
        # By prompts, since allocation gives hard ones more rows, and with those that are no longer drawn.
        retired = float(self.ledger.retired_M.mean())
        self.accuracy = (
            (1 - retired) * float(np.mean(rate_P[scored_P > 0])) + retired if scored_P.any() else float("nan")
        )

    def _successes(self, batch: RolloutBatch) -> Floats:
        """How far each row succeeded, 0 to 1, NaN where it was not scored: (N,)."""
        rewards = self.recipe.rewards
        name, column = rewards.success_name, list(rewards.functions).index(rewards.success_name)
        ends = torch.tensor([rewards.functions[name].range or (0.0, 1.0)])
        success_N = to_unit_interval(batch.rewards_NK[:, [column]], ends)[:, 0].numpy()
        outside_N = (success_N < 0.0) | (success_N > 1.0)
        if outside_N.any() and self._decides_by_success:
            raise RewardError(
                f"reward `{name}` says whether a rollout succeeded and gave "
                f"{batch.rewards_NK[torch.from_numpy(outside_N), column][0]:g}, outside [0, 1]",
                why="what is known of a prompt is a share of successes",
                fix=f"set `rewards.functions.{name}.range` to the lowest and highest value it gives",
            )
        success_N[outside_N] = np.nan
        return success_N

    @property
    def _decides_by_success(self) -> bool:
        """Whether what is known of prompts decides anything."""
        budget = self.recipe.budget
        by_success = budget.schedule == "adaptive" or getattr(budget, "scope", "batch") == "prompt"
        return self.section.method != "uniform" or self.section.retire_at is not None or by_success

    def metrics(self) -> dict[str, float]:
        metrics = self.ledger.metrics()
        if self.section.retire_at is not None:
            metrics["ledger/retired"] = float(self.ledger.retired_M.mean())
        return metrics | {"allocation/epoch": float(self.pool.epoch)}

    def tables(self) -> dict[str, Any]:
        """`allocation/by_rate`: [prompts, rollouts] of the last batch, by the success that was believed before it, in
        tenths from 0 to 1; `allocation/by_success`: the same by the success it then had."""
        return self._tables

    def load_tables(self, tables: dict[str, Any]) -> None:
        """Go on in the middle of a generation cycle, whose steps all show the tables of its batch."""
        self._tables = tables

    def state_dict(self) -> dict[str, Any]:
        """All but the ledger, which has a file of its own."""
        return self.pool.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.pool.load_state_dict(state)


def _by_tenths(rate_P: Floats, counts_P: Ints) -> list[list[int]]:
    known_P = ~np.isnan(rate_P)
    tenth_P = np.floor(10 * rate_P[known_P] + 0.5).astype(np.int64)
    prompts = np.bincount(tenth_P, minlength=BINS)
    rollouts = np.bincount(tenth_P, weights=counts_P[known_P], minlength=BINS).astype(np.int64)
    return np.stack([prompts, rollouts], axis=1).tolist()
