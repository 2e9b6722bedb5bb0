"""All rewards of a recipe, ready to be called by TRL or by hand.

Rewards marked `rowwise: true` run in worker processes, each row with a time limit. All others run in place, on the
whole batch, because they may look at other rows or at the trainer. They cannot be killed; one with a `timeout` of its
own gets that many seconds per completion, as far as `rlbal.rewards.in_place` can enforce it.

A rowwise score depends on the function's arguments for its row and on nothing else. So it may be computed before it is
asked for (`RewardSuite.prefetch`), and serves for every row with equal arguments (`rlbal.rewards.pool`).

An isolated suite runs them all in workers and imports none of them here: for evaluating what somebody else wrote.
"""

import asyncio
import inspect
import os
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from rlbal.errors import RewardError
from rlbal.recipe import Recipe, RewardSpec, RewardsSection
from rlbal.rewards import in_place
from rlbal.rewards.gym_tasks import fit_to_data
from rlbal.rewards.jobs import make_jobs
from rlbal.rewards.loading import (
    WITHOUT_TRAINER,
    Signature,
    bind,
    can_overlap,
    check_columns,
    check_spec,
    load_function,
    required_columns,
    signature,
)
from rlbal.rewards.outcomes import LONGEST, Failure, Fault, Outcome, merge
from rlbal.rewards.pool import WorkerPool
from rlbal.rewards.sandbox import Job

RewardFunction = Callable[..., Any]
Scores = list[float | None]
SHIPPED = "reward_fns"


class RewardSuite:
    """The rewards of a recipe.

    Args:
        section: the recipe's `rewards`.
        isolated: import and run every reward in workers; those that rlbal does not ship, in sealed ones. What TRL's
            trainer gives rewards (`trainer_state` and the like) is then None or without effect.
        has_budget: a budget schedule adds the column `token_budget`.

    Raises:
        RewardError: a function cannot be loaded or does not fit its entry in the recipe.
    """

    def __init__(self, section: RewardsSection, isolated: bool = False, has_budget: bool = False) -> None:
        self.section, self.isolated, self.names = section, isolated, list(section.functions)
        self.has_budget = has_budget
        specs = section.functions
        self._loaded = {} if isolated else {name: load_function(name, specs[name].function) for name in specs}
        self._failures: list[Failure] = []
        self._lock = threading.Lock()
        self._pools = self._make_pools()
        try:
            self._signatures = self._look_at_functions()
            for name, spec in specs.items():
                check_spec(name, spec, self._signatures[name])
        except BaseException:
            self.close()
            raise
        self._early = [name for name, spec in specs.items() if can_overlap(spec, self._signatures[name])]
        self.functions: list[RewardFunction] = [self._callable(name) for name in self.names]

    @classmethod
    def for_recipe(cls, recipe: Recipe, isolated: bool = False) -> Self:
        """The rewards of a recipe, fitted to its data (`rlbal.rewards.gym_tasks`) and its budget.

        Raises:
            RewardError: as the class itself; or a scorer would evaluate code without `unsafe: true`.
        """
        return cls(fit_to_data(recipe), isolated, recipe.budget.schedule != "none")

    def check_columns(self, columns: list[str]) -> None:
        """Check that the rewards find the columns they need among those of the dataset and those the trainer adds.

        Raises:
            RewardError: naming the reward and the missing column.
        """
        check_columns(self.section, self._signatures, columns, self.has_budget)

    def required_columns(self, name: str) -> tuple[str, ...]:
        """Dataset columns that a reward cannot do without."""
        return required_columns(self.section.functions[name], self._signatures[name])

    def start(self) -> None:
        """Start all workers now rather than with the first batch, so that a problem shows at once.

        Raises:
            RewardError: a worker cannot import a reward.
        """
        for pool in set(self._pools.values()):
            pool.start()

    def take_failures(self) -> list[Failure]:
        """What failed in this process since the last call, one entry per reward and reason."""
        with self._lock:
            failures, self._failures = merge(self._failures), []
        return failures

    @property
    def isolation(self) -> str:
        """What the workers are kept from, in words; complete once they run."""
        if not self._pools:
            return "no reward runs in workers"
        missing = {what for pool in self._pools.values() for what in pool.missing}
        kept = [what for what in ("network", "processes", "files") if what not in missing]
        lacking = f"; this machine cannot keep them from: {', '.join(sorted(missing))}" if missing else ""
        return f"workers have no access to: {', '.join(kept)}, the environment{lacking}"

    @property
    def overlaps(self) -> bool:
        """Whether `prefetch` does anything."""
        return bool(self._early)

    def prefetch(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
    ) -> None:
        """Begin to score some rows of a batch whose other rows are still being generated, and return at once.

        When the functions are then called for the batch, they use the scores of those rows whose arguments are exactly
        the ones given here. What cannot be scored is left to that call, which says why.

        Args:
            prompts, completions: n each, as the functions will get them.
            completion_ids: the n completions' tokens.
            columns: the columns that the functions will get besides, n values each.
        """
        given = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        for name in self._early:
            with suppress(RewardError):
                self._pools[name].prefetch(name, self._jobs(name, given))

    def score(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
    ) -> npt.NDArray[np.float64]:
        """Score completions outside TRL; what TRL's trainer gives rewards is None or without effect.

        Args:
            prompts, completions: N each, plain or conversational.
            completion_ids: the N completions' tokens.
            columns: dataset columns, N values each.

        Returns:
            (N, K) scores; NaN where a reward gave none or failed (see `take_failures`).
        """
        rollouts = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        given = {**WITHOUT_TRAINER, **rollouts, **columns}
        by_reward: dict[int, Scores] = {}
        waiting: dict[int, Awaitable[Scores]] = {}
        for k, function in enumerate(self.functions):
            if inspect.iscoroutinefunction(function):
                waiting[k] = function(**given)
            else:
                by_reward[k] = function(**given)
        if waiting:

            async def gather() -> list[Scores]:
                return await asyncio.gather(*waiting.values())

            with ThreadPoolExecutor(1) as thread:  # the caller's thread may have an event loop of its own
                by_reward |= dict(zip(waiting, thread.submit(asyncio.run, gather()).result(), strict=True))
        rewards_KN = [by_reward[k] for k in range(len(self.functions))]
        return np.array(rewards_KN, dtype=np.float64).reshape(len(self.functions), len(completions)).T

    def close(self) -> None:
        """End the workers."""
        for pool in set(self._pools.values()):
            pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_pools(self) -> dict[str, WorkerPool]:
        """The workers of each reward that runs in workers; `unsafe` and untrusted rewards have theirs apart."""
        rewards: dict[tuple[bool, bool], dict[str, dict[str, Any]]] = defaultdict(dict)
        for name, spec in self.section.functions.items():
            if spec.rowwise or self.isolated:
                where, _, function = spec.function.rpartition(":")
                path = os.path.abspath(where) if where.endswith(".py") or "/" in where else where
                shipped = where.partition(".")[0] == SHIPPED and path == where
                entry = {"function": f"{path}:{function}", "args": spec.args, "unsafe": spec.unsafe}
                rewards[spec.unsafe, self.isolated and not shipped][name] = entry
        workers = self.section.workers or default_workers()
        pools: dict[str, WorkerPool] = {}
        for (fresh, sealed), of_pool in rewards.items():
            pool = WorkerPool(of_pool, workers, self.section.memory_mb, fresh, sealed)
            pools |= dict.fromkeys(of_pool, pool)
        return pools

    def _look_at_functions(self) -> dict[str, Signature]:
        if not self.isolated:
            return {name: signature(function) for name, function in self._loaded.items()}
        found = [pool.signatures() for pool in set(self._pools.values())]
        return {name: said[name] for name in self.names for said in found if name in said}

    def _callable(self, name: str) -> RewardFunction:
        """The function TRL gets: it never raises for a failing reward, but records it and gives None."""
        spec = self.section.functions[name]
        function: RewardFunction
        if name in self._pools:

            def in_workers(completions: list[Any], **given: Any) -> Scores:
                jobs = self._jobs(name, {"completions": completions, **given})
                return self._record(name, self._pools[name].score(name, jobs))

            function = in_workers
        elif in_place.is_async(self._loaded[name]):

            async def awaited(completions: list[Any], **given: Any) -> Scores:
                bound, N = self._bind(name, {"completions": completions, **given}), len(completions)
                return self._record(name, await in_place.call_async(bound, N, spec.range, limit(spec, N)))

            function = awaited
        else:

            def called(completions: list[Any], **given: Any) -> Scores:
                bound, N = self._bind(name, {"completions": completions, **given}), len(completions)
                return self._record(name, in_place.call(bound, N, spec.range, limit(spec, N)))

            function = called
        function.__name__ = name
        return function

    def _jobs(self, name: str, given: dict[str, Any]) -> list[Job]:
        spec = self.section.functions[name]
        return make_jobs(name, spec, self._signatures[name], spec.timeout or self.section.timeout, given)

    def _bind(self, name: str, given: dict[str, Any]) -> Callable[[], Any]:
        spec = self.section.functions[name]
        return bind(self._loaded[name], spec.args, spec.unsafe, given)

    def _record(self, name: str, judged: list[Outcome]) -> Scores:
        failures = [Failure(name, one.reason, 1, one.message[:LONGEST]) for one in judged if isinstance(one, Fault)]
        if failures:
            with self._lock:
                self._failures = merge([*self._failures, *failures])
        return [None if isinstance(one, Fault) else one for one in judged]


def limit(spec: RewardSpec, N: int) -> float | None:
    """Seconds that a reward in place may take for N completions; it has a limit only if the recipe gives it one."""
    return spec.timeout * N if spec.timeout else None


def default_workers() -> int:
    """This process's share of the cores it may run on."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
