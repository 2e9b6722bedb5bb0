"""All rewards of a recipe, ready to be called by TRL or by hand.

Rewards marked `rowwise: true` run in worker processes, each row with a time limit. All others run in place, on the
whole batch, because they may look at other rows or at the trainer. They cannot be killed; one with a `timeout` of its
own gets that many seconds per completion, as far as `rlbal.rewards.in_place` can enforce it.
"""

import asyncio
import inspect
import json
import os
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from rlbal.errors import RewardError
from rlbal.recipe import RewardSpec, RewardsSection
from rlbal.rewards import in_place
from rlbal.rewards.loading import TRAINER_ARGUMENTS, check_columns, check_spec, load_function, signature
from rlbal.rewards.outcomes import Failure, Fault, Outcome, merge
from rlbal.rewards.sandbox import Job, WorkerPool

RewardFunction = Callable[..., Any]
Scores = list[float | None]


class RewardSuite:
    """The rewards of a recipe.

    Args:
        section: the recipe's `rewards`.

    Raises:
        RewardError: a function cannot be loaded or does not fit its entry in the recipe.
    """

    def __init__(self, section: RewardsSection) -> None:
        self.section = section
        self.names = list(section.functions)
        self._loaded = {name: load_function(name, spec.function) for name, spec in section.functions.items()}
        for name, spec in section.functions.items():
            check_spec(name, spec, self._loaded[name])
        self._failures: list[Failure] = []
        self._lock = threading.Lock()
        self._pools = self._make_pools()
        self.functions: list[RewardFunction] = [self._callable(name) for name in self.names]

    def check_columns(self, columns: list[str]) -> None:
        """Check that the rewards find the columns they need among those of the dataset and the trainer.

        Raises:
            RewardError: naming the reward and the missing column.
        """
        check_columns(self.section, self._loaded, columns)

    def start(self) -> None:
        """Start all workers now rather than with the first batch, so that a problem shows at once.

        Raises:
            RewardError: a worker cannot import a reward.
        """
        for pool in self._pools.values():
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

    def score(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
    ) -> npt.NDArray[np.float64]:
        """Score completions outside TRL.

        Args:
            prompts, completions: N each, plain or conversational.
            completion_ids: the N completions' tokens.
            columns: dataset columns, N values each.

        Returns:
            (N, K) scores; NaN where a reward gave none or failed (see `take_failures`).
        """
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
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
        for pool in self._pools.values():
            pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_pools(self) -> dict[bool, WorkerPool]:
        """Workers for the rowwise rewards, apart for those that evaluate completions as code (`unsafe`)."""
        rewards: dict[bool, dict[str, dict[str, Any]]] = defaultdict(dict)
        for name, spec in self.section.functions.items():
            if spec.rowwise:
                where, _, function = spec.function.rpartition(":")
                path = os.path.abspath(where) if where.endswith(".py") or "/" in where else where
                args = self._arguments(name, spec)
                rewards[spec.unsafe][name] = {"function": f"{path}:{function}", "args": args}
        workers = self.section.workers or default_workers()
        return {
            unsafe: WorkerPool(of_pool, workers, self.section.memory_mb, fresh=unsafe)
            for unsafe, of_pool in rewards.items()
        }

    def _arguments(self, name: str, spec: RewardSpec) -> dict[str, Any]:
        named, _ = signature(self._loaded[name])
        return {**spec.args, "unsafe": spec.unsafe} if "unsafe" in named else dict(spec.args)

    def _callable(self, name: str) -> RewardFunction:
        """The function TRL gets: it never raises for a failing reward, but records it and gives None."""
        spec, loaded = self.section.functions[name], self._loaded[name]
        function: RewardFunction
        if spec.rowwise:

            def in_workers(completions: list[Any], **given: Any) -> Scores:
                jobs = make_jobs(name, spec, loaded, self.section.timeout, {"completions": completions, **given})
                return self._record(name, self._pools[spec.unsafe].score(jobs))

            function = in_workers
        elif in_place.is_async(loaded):

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

    def _bind(self, name: str, given: dict[str, Any]) -> Callable[[], Any]:
        """The reward with what it accepts of the given arguments; the recipe's `args` win over columns."""
        named, takes_any = signature(self._loaded[name])
        accepted = {key: value for key, value in given.items() if takes_any or key in named}
        return partial(self._loaded[name], **{**accepted, **self._arguments(name, self.section.functions[name])})

    def _record(self, name: str, judged: list[Outcome]) -> Scores:
        failures = [Failure(name, one.reason, 1, one.message) for one in judged if isinstance(one, Fault)]
        if failures:
            with self._lock:
                self._failures = merge([*self._failures, *failures])
        return [None if isinstance(one, Fault) else one for one in judged]


def limit(spec: RewardSpec, N: int) -> float | None:
    """Seconds that a reward in place may take for N completions; it has a limit only if the recipe gives it one."""
    return spec.timeout * N if spec.timeout else None


def make_jobs(
    name: str, spec: RewardSpec, function: RewardFunction, default_timeout: float, given: dict[str, Any]
) -> list[Job]:
    """One job per row, with the columns that the function names, or all that JSON can carry if it has `**kwargs`.

    Raises:
        RewardError: a column that the function names cannot be written as JSON, or has not one value per completion.
    """
    named, takes_any = signature(function)
    N, timeout = len(given["completions"]), spec.timeout or default_timeout
    columns: dict[str, list[Any]] = {}
    for column, values in given.items():
        if column in TRAINER_ARGUMENTS or column in spec.args or not (takes_any or column in named):
            continue
        try:
            json.dumps(values)
        except (TypeError, ValueError) as error:
            if column not in named:
                continue
            raise RewardError(
                f"reward `{name}`: column `{column}` cannot go to a worker process",
                why=f"rows travel as JSON: {error}",
                fix=f"set `rewards.functions.{name}.rowwise: false`, or turn the column into text or numbers",
            ) from None
        if len(values) != N:
            raise RewardError(f"reward `{name}`: column `{column}` has {len(values)} values for {N} completions")
        columns[column] = values
    rows = [{key: [values[n]] for key, values in columns.items()} for n in range(N)]
    return [Job(json.dumps({"reward": name, "timeout": timeout, "columns": row}), timeout, spec.range) for row in rows]


def default_workers() -> int:
    """This process's share of the cores it may run on."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
