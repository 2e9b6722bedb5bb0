"""Workers that score the rows of a batch, some of them before the batch is complete, and none of them twice."""

import json
import os
import tempfile
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, wait
from typing import Any

from rlbal.errors import RewardError
from rlbal.rewards.crew import Crew
from rlbal.rewards.loading import Signature
from rlbal.rewards.outcomes import Fault, Outcome
from rlbal.rewards.sandbox import Job, Worker

KEPT_SCORES = 65_536  # about 220 bytes each, 14 MiB in all
MOST_AHEAD = 16_384  # jobs of an incomplete batch; what is beyond waits for the batch

Futures = dict[bytes, Future[list[Outcome]]]


class RecentScores:
    """The scores of the `size` jobs used last, by `Job.key`."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._scores: OrderedDict[bytes, float | None] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._scores

    def __len__(self) -> int:
        return len(self._scores)

    def __getitem__(self, key: bytes) -> float | None:
        self._scores.move_to_end(key)
        return self._scores[key]

    def __setitem__(self, key: bytes, score: float | None) -> None:
        self._scores[key] = score
        self._scores.move_to_end(key)
        if len(self._scores) > self._size:
            self._scores.popitem(last=False)


class WorkerPool:
    """Workers that share the jobs of a batch.

    Args:
        rewards: name -> `{"function": path, "args": {...}, "unsafe": bool}` of every reward these workers serve.
        workers: how many processes.
        memory_mb: MiB that a worker may use beyond what it holds after its imports.
        fresh: score each row in an unspoilt process, for scorers that evaluate completions as code.
        sealed: give up all rights before importing the rewards, whose code is trusted no more than completions.
    """

    def __init__(
        self, rewards: dict[str, dict[str, Any]], workers: int, memory_mb: int, fresh: bool, sealed: bool
    ) -> None:
        settings = {"rewards": rewards, "memory_mb": memory_mb, "fresh": fresh, "sealed": sealed}
        setup, once = json.dumps(settings).encode() + b"\n", fresh and sealed  # who is sealed cannot copy itself
        self._names = set(rewards)
        self._folder = tempfile.TemporaryDirectory(prefix="rlbal-rewards-")
        self._workers = [Worker(setup, self._folder.name, once) for _ in range(workers)]
        self._crew = Crew(self._workers)
        self._lock = threading.Lock()  # one batch at a time; guards the two below
        self._ahead: dict[str, Futures] = {name: {} for name in rewards}
        self._scores = RecentScores(KEPT_SCORES)
        self.close = weakref.finalize(self, _close, os.getpid(), self._crew, self._folder)

    @property
    def missing(self) -> list[str]:
        """The protections that this machine does not give (`isolation.lock_down`); known once workers run."""
        return sorted({what for worker in self._workers for what in worker.missing})

    def start(self) -> None:
        """Start every worker now.

        Raises:
            RewardError: one cannot be started.
        """
        self._crew.start(len(self._workers))

    def signatures(self) -> dict[str, Signature]:
        """What a worker found the functions to be.

        Raises:
            RewardError: it cannot be started, or did not say.
        """
        self._crew.start(1)
        found = self._workers[0].signatures
        if set(found) != self._names:
            raise RewardError("a reward worker did not start", "it sent something else")
        return found

    def prefetch(self, reward: str, jobs: list[Job]) -> None:
        """Have rowwise jobs of a reward run until `score` asks for them; without effect while a batch is scored."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            room = MOST_AHEAD - sum(map(len, self._ahead.values()))
            self._submit(self._ahead[reward], jobs[: max(room, 0)])
        finally:
            self._lock.release()

    def score(self, reward: str, jobs: list[Job]) -> list[Outcome]:
        """Score all jobs that a batch has for a reward; the outcomes of their rows are in order.

        Jobs with equal requests run once. What was prefetched is used, then forgotten. The latest `KEPT_SCORES` scores
        of rowwise jobs are kept over batches; faults are not, because the machine's load may have caused them.
        """
        with self._lock:
            ahead = self._ahead[reward]
            try:
                return self._score(jobs, ahead)
            except BaseException:  # after Ctrl-C the workers end with the row they are at
                wait([future for of_reward in self._ahead.values() for future in _cancel(of_reward)])
                raise
            finally:
                _cancel(ahead)  # prefetched with other arguments than the batch turned out to have
                self._crew.forgive()

    def _score(self, jobs: list[Job], ahead: Futures) -> list[Outcome]:
        keys = [job.key for job in jobs]
        known: dict[bytes, list[Outcome]] = {key: [self._scores[key]] for key in keys if key in self._scores}
        self._submit(ahead, jobs)
        for key, job in zip(keys, jobs, strict=True):
            if key not in known:
                known[key] = _outcomes(ahead[key], job)
                if job.rowwise and not isinstance(score := known[key][0], Fault):
                    self._scores[key] = score
        return [one for key in keys for one in known[key]]

    def _submit(self, ahead: Futures, jobs: list[Job]) -> None:
        """Queue those jobs that are neither queued nor scored already."""
        new = {job.key: job for job in jobs}
        new = {key: job for key, job in new.items() if key not in ahead and key not in self._scores}
        ahead.update(zip(new, self._crew.submit(list(new.values())), strict=True))


def _outcomes(future: Future[list[Outcome]], job: Job) -> list[Outcome]:
    try:
        return future.result()
    except RewardError as error:
        return [Fault("died", f"could not be run: {error}")] * job.rows


def _cancel(ahead: Futures) -> list[Future[list[Outcome]]]:
    """Forget jobs and cancel those that still wait for a worker; returns the others."""
    begun = [future for future in ahead.values() if not future.cancel()]
    ahead.clear()
    return begun


def _close(owner: int, crew: Crew, folder: Any) -> None:
    if os.getpid() != owner:
        return  # a fork of the trainer, such as a dataloader's worker, must not end what it does not own
    crew.close()
    folder.cleanup()
