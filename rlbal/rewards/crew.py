"""A queue of jobs, served by workers without pause."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from rlbal.errors import RewardError
from rlbal.rewards.outcomes import Outcome
from rlbal.rewards.sandbox import Job, Worker

CLOSING_SECONDS = 5.0


class Crew:
    """Workers, and the jobs that wait for them in the order in which they came.

    Each worker has a thread, made when there is work for it. It lives as long as the crew, because a worker is killed
    when the thread that started it ends; and it is a daemon, so that a job in progress does not hold up Python's exit.
    """

    def __init__(self, workers: list[Worker]) -> None:
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()  # guards all below
        self._waiting: deque[tuple[Job, Future[list[Outcome]]]] = deque()
        self._starting: dict[Worker, Future[None]] = {}
        self._busy = 0
        self._broken: dict[Worker, Exception] = {}
        self._closed = False

    def start(self, count: int) -> None:
        """Start the first `count` workers and wait until they are ready.

        Raises:
            RewardError: one cannot be started, or the crew is closed.
        """
        with self._changed:
            self._refuse_if_closed()
            self._hire(count)
            futures = [self._starting.setdefault(worker, Future()) for worker in self._workers[:count]]
            self._changed.notify_all()
        wait(futures)
        for future in futures:
            future.result()

    def submit(self, jobs: list[Job]) -> list[Future[list[Outcome]]]:
        """Queue jobs; their futures hold the outcomes of their rows, or raise RewardError if no worker can be started.

        A worker that could not be started costs the job it was started for, and takes no other before `forgive`:
        trying again for every row could take hours. The other workers go on.

        Raises:
            RewardError: the crew is closed.
        """
        futures: list[Future[list[Outcome]]] = [Future() for _ in jobs]
        with self._changed:
            self._refuse_if_closed()
            self._waiting.extend(zip(jobs, futures, strict=True))
            self._assign()
        return futures

    def forgive(self) -> None:
        """Let workers that could not be started try again."""
        with self._changed:
            self._broken.clear()
            self._assign()

    def close(self) -> None:
        """Cancel what waits and end the workers."""
        with self._changed:
            self._closed = True
            for _, waiting in self._waiting:
                waiting.cancel()
            for starting in self._starting.values():
                starting.cancel()
            self._waiting.clear()
            self._starting.clear()
            self._changed.notify_all()
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            if thread is not threading.current_thread():  # where the garbage collector may have called this
                thread.join(CLOSING_SECONDS)

    def _assign(self) -> None:
        """Have a thread for every job that waits, as far as there are workers; with none left, fail the jobs."""
        if len(self._broken) == len(self._workers):
            error = next(iter(self._broken.values()))
            while self._waiting:
                _, future = self._waiting.popleft()
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
        elif self._waiting:
            self._hire(min(self._busy + len(self._broken) + len(self._waiting), len(self._workers)))
            # Threads of broken workers wait as well, and might swallow a single call.
            self._changed.notify(len(self._threads) if self._broken else len(self._waiting))

    def _hire(self, count: int) -> None:
        for worker in self._workers[len(self._threads) : count]:
            thread = threading.Thread(target=self._serve, args=(worker,), name="rlbal-rewards", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RewardError("rewards cannot score any more", "their workers are closed")

    def _serve(self, worker: Worker) -> None:
        """What a worker's thread does."""
        while (task := self._next(worker)) is not None:
            future, action = task
            try:
                result = action()
            except Exception as error:
                self._done(worker, error)
                future.set_exception(error)
            else:
                self._done(worker, None)
                future.set_result(result)
        worker.kill()

    def _next(self, worker: Worker) -> tuple[Future[Any], Callable[[], Any]] | None:
        """Wait for something to do; None once closed."""
        with self._changed:
            while not self._closed:
                if worker in self._starting:
                    self._busy += 1
                    return self._starting.pop(worker), worker.start
                while self._waiting and worker not in self._broken:
                    job, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        self._busy += 1
                        return future, partial(worker.score, job)
                self._changed.wait()
        return None

    def _done(self, worker: Worker, error: Exception | None) -> None:
        with self._changed:
            self._busy -= 1
            if error is None:
                self._broken.pop(worker, None)
            else:
                self._broken[worker] = error
                self._assign()
