"""The queue of jobs, with workers that run in the test itself."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest

from rlbal.errors import RewardError
from rlbal.rewards.crew import Crew
from rlbal.rewards.outcomes import Outcome
from rlbal.rewards.sandbox import Job


class Scripted:
    """A worker that scores a job by the number in its request, unless it cannot be started."""

    def __init__(self, gate: threading.Event) -> None:
        self.works, self.gate, self.starts, self.jobs, self.killed = True, gate, 0, [], False

    def start(self) -> None:
        self.starts += 1
        if not self.works:
            raise RewardError("a reward worker did not start")

    def score(self, job: Job) -> list[Outcome]:
        self.start()
        self.gate.wait(60)
        self.jobs.append(job.request)
        return [float(job.request)]

    def kill(self) -> None:
        self.killed = True

    def close(self) -> None:
        self.gate.set()


Crews = Callable[[int], tuple[Crew, list[Any]]]


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


@pytest.fixture
def crew_of(gate: threading.Event) -> Iterator[Crews]:
    made: list[Crew] = []

    def make(count: int) -> tuple[Crew, list[Any]]:
        workers: list[Any] = [Scripted(gate) for _ in range(count)]
        made.append(Crew(workers))
        return made[-1], workers

    yield make
    for crew in made:
        crew.close()


def jobs(*numbers: int) -> list[Job]:
    return [Job(str(number), 1, 1.0, None, True) for number in numbers]


def failed(future: Future[list[Outcome]]) -> bool:
    return isinstance(future.exception(60), RewardError)


def test_jobs_are_taken_in_order(crew_of: Crews, gate: threading.Event) -> None:
    crew, (worker,) = crew_of(1)
    futures = [*crew.submit(jobs(0, 1)), *crew.submit(jobs(2)), *crew.submit([]), *crew.submit(jobs(3, 4))]
    futures[2].cancel()
    gate.set()
    assert [future.result(60) for future in futures if not future.cancelled()] == [[0.0], [1.0], [3.0], [4.0]]
    assert worker.jobs == ["0", "1", "3", "4"]


def test_no_more_workers_than_jobs(crew_of: Crews, gate: threading.Event) -> None:
    crew, workers = crew_of(3)
    gate.set()
    for number in range(20):
        (future,) = crew.submit(jobs(number))
        assert future.result(60) == [float(number)]
    assert [worker.starts for worker in workers] == [20, 0, 0]
    gate.clear()
    futures = crew.submit(jobs(1, 2))
    gate.set()
    wait(futures)
    assert workers[2].starts == 0


def test_the_first_workers_or_all_start_without_a_job(crew_of: Crews) -> None:
    crew, workers = crew_of(3)
    crew.start(1)
    assert [worker.starts for worker in workers] == [1, 0, 0]
    workers[1].works = False
    with pytest.raises(RewardError, match="did not start"):
        crew.start(3)
    assert [worker.starts for worker in workers] == [2, 1, 1]
    workers[1].works = True
    crew.start(3)


def test_a_worker_that_does_not_start_costs_one_job(crew_of: Crews, gate: threading.Event) -> None:
    crew, workers = crew_of(2)
    gate.set()
    workers[0].works = False
    (first,) = crew.submit(jobs(0))
    assert failed(first)
    (lone,) = crew.submit(jobs(1))
    assert lone.result(60) == [1.0]
    assert [future.result(60) for future in crew.submit(jobs(2, 3, 4))] == [[2.0], [3.0], [4.0]]
    (lone,) = crew.submit(jobs(5))  # nor does the idle thread of the broken worker swallow the call
    assert lone.result(60) == [5.0]
    assert (workers[0].starts, workers[1].jobs) == (1, ["1", "2", "3", "4", "5"])


def test_without_any_worker_every_job_fails_at_once_until_forgiven(crew_of: Crews, gate: threading.Event) -> None:
    crew, workers = crew_of(2)
    gate.set()
    for worker in workers:
        worker.works = False
    assert all(failed(future) for future in crew.submit(jobs(*range(50))))
    assert all(failed(future) for future in crew.submit(jobs(*range(50))))
    assert [worker.starts for worker in workers] == [1, 1]
    for worker in workers:
        worker.works = True
    crew.forgive()
    assert [future.result(60) for future in crew.submit(jobs(7, 8))] == [[7.0], [8.0]]


def test_closing_cancels_what_waits_and_ends_the_threads(crew_of: Crews) -> None:
    crew, workers = crew_of(2)
    futures = crew.submit(jobs(*range(10)))
    deadline = time.monotonic() + 60
    while sum(future.running() for future in futures) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    crew.close()
    assert sum(future.cancelled() for future in futures) == 8
    assert all(worker.killed for worker in workers)
    assert not any(thread.is_alive() for thread in crew._threads)
    for action in (lambda: crew.submit(jobs(1)), lambda: crew.start(1)):
        with pytest.raises(RewardError, match="closed"):
            action()
