"""Rows scored before their batch is complete, and rows scored before.

`hostile_rewards.run_code` runs a completion as Python. A completion that counts the rows its worker has run gives
another score each time it runs, so equal scores mean that it did not run again. A completion that waits for a file (a
gate) keeps a worker busy for exactly as long as a test likes.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rlbal.errors import RewardError
from rlbal.recipe import RewardsSection
from rlbal.rewards.pool import RecentScores, WorkerPool
from rlbal.rewards.sandbox import Job, Worker
from rlbal.rewards.suite import RewardSuite

HOSTILE = str(Path(__file__).parent / "hostile_rewards.py")
CODE = {"function": f"{HOSTILE}:run_code", "rowwise": True}
LIMIT = 60.0  # seconds; reached by a test that fails only


def suite_of(functions: dict[str, Any], **rest: Any) -> RewardSuite:
    settings = {"functions": functions, "workers": 1, "timeout": LIMIT, **rest}
    return RewardSuite(RewardsSection.model_validate(settings))


def count(row: Any) -> str:
    return f"STATE['rows'] += 1; score = STATE['rows']  # {row}"


def gated(gate: Path, row: Any = 0) -> str:
    waiting = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.005)\n"
    return waiting + count(row)


def prefetch(suite: RewardSuite, completions: list[Any], **columns: list[Any]) -> None:
    n = len(completions)
    suite.prefetch(["?"] * n, completions, [[1]] * n, columns)


def score(suite: RewardSuite, completions: list[Any], k: int = 0, **columns: list[Any]) -> Any:
    """As TRL's trainer calls the reward, with the columns in another order."""
    n = len(completions)
    given = {**columns, "completion_ids": [[1]] * n, "completions": completions, "prompts": ["?"] * n}
    return suite.functions[k](trainer_state=None, log_extra=print, log_metric=print, **given)


def pool_of(suite: RewardSuite) -> WorkerPool:
    return suite._pools[suite.names[0]]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were handed to workers."""
    ran: list[Job] = []
    real = Worker.score

    def watched(self: Worker, job: Job) -> Any:
        ran.append(job)
        return real(self, job)

    monkeypatch.setattr(Worker, "score", watched)
    return ran


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "open"


# --- before the batch is complete ---


def test_prefetched_rows_run_while_nobody_waits_and_not_again(gate: Path) -> None:
    with suite_of({"code": CODE}, workers=2) as suite:
        stamped = [gated(gate) + f"\nscore = time.monotonic()  # {n}" for n in range(2)]
        prefetch(suite, stamped)  # would not return if it waited for the rows
        ahead = list(pool_of(suite)._ahead["code"].values())
        wait_for(lambda: all(future.running() for future in ahead))  # one on each worker
        gate.touch()
        wait(ahead)
        called = time.monotonic()
        # The clock is the machine's: both rows and no other were done before the call.
        early, late, again = score(suite, [stamped[0], "import time; score = time.monotonic()", stamped[1]])
        assert early < called < late and again < called
        assert suite.take_failures() == []


def test_rows_still_running_or_queued_are_waited_for(gate: Path) -> None:
    with suite_of({"code": CODE}) as suite:
        batch = [gated(gate), count("a"), count("b")]
        prefetch(suite, batch[:2])
        threading.Timer(0.1, gate.touch).start()
        assert score(suite, batch) == [1.0, 2.0, 3.0]
        assert score(suite, [count("c")]) == [4.0]


def test_a_fault_counts_once_and_is_not_kept(runs: list[Job]) -> None:
    second_time_lucky = "STATE['rows'] += 1; score = 1 / (STATE['rows'] - 1)"
    with suite_of({"code": CODE}) as suite:
        prefetch(suite, [second_time_lucky])
        assert score(suite, [second_time_lucky]) == [None]
        (failure,) = suite.take_failures()
        assert (failure.reason, failure.count, len(runs)) == ("raised", 1, 1)
        assert score(suite, [second_time_lucky]) == [1.0]  # the next batch
        assert (suite.take_failures(), len(runs)) == ([], 2)


@pytest.mark.parametrize("unsafe", [False, True], ids=["lasting", "fresh"])
def test_a_hanging_completion_costs_one_time_limit_however_often_it_is_there(unsafe: bool, runs: list[Job]) -> None:
    hang = "while True: pass"
    with suite_of({"code": {**CODE, "unsafe": unsafe, "timeout": 1.0}}) as suite:
        prefetch(suite, [hang])
        prefetch(suite, [hang, "score = 0.5"])
        assert score(suite, [hang, "score = 0.5", hang]) == [None, 0.5, None]
        (failure,) = suite.take_failures()
        assert (failure.reason, failure.count) == ("timeout", 2)  # completions
        assert ["while" in job.request for job in runs] == [True, False]


def test_one_reward_does_not_take_what_was_prefetched_for_another(runs: list[Job]) -> None:
    with suite_of({"code": CODE, "twin": CODE}) as suite:
        assert suite._pools["code"] is suite._pools["twin"]
        batch = [count("a"), count("b"), "1 / 0"]
        prefetch(suite, batch)
        assert score(suite, batch, k=0) == [1.0, 2.0, None]
        assert score(suite, batch, k=1) == [3.0, 4.0, None]
        assert len(runs) == 6
        assert [(one.reward, one.count) for one in suite.take_failures()] == [("code", 1), ("twin", 1)]


def test_what_the_batch_does_not_ask_for_is_dropped(gate: Path, tmp_path: Path) -> None:
    with suite_of({"code": CODE}) as suite:
        second = tmp_path / "second"
        prefetch(suite, [gated(gate), gated(second, "b"), *(count(n) for n in range(20))], level=[1] * 22)
        threading.Timer(0.1, gate.touch).start()
        assert score(suite, [gated(gate)], level=[1]) == [1.0]
        assert pool_of(suite)._ahead == {"code": {}}
        second.touch()
        # Of the others at most the one that had begun was run.
        assert score(suite, [count("new")])[0] <= 3.0


def test_no_more_than_so_many_rows_wait(gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlbal.rewards.pool.MOST_AHEAD", 3)
    with suite_of({"code": CODE, "twin": CODE}) as suite:
        batch = [gated(gate), *(count(n) for n in range(4))]
        prefetch(suite, batch[:2])
        prefetch(suite, batch[2:])
        assert sum(map(len, pool_of(suite)._ahead.values())) == 3
        gate.touch()
        assert sorted(score(suite, batch, k=0) + score(suite, batch, k=1)) == [float(n) for n in range(1, 11)]


def test_what_cannot_be_prefetched_says_so_when_called() -> None:
    functions = {"right": {"function": f"{HOSTILE}:matches", "rowwise": True}, "code": CODE}
    with suite_of(functions) as suite:
        prefetch(suite, [count("a")], answer=[object()])
        assert len(pool_of(suite)._ahead["code"]) == 1  # `**kwargs` goes without what JSON cannot carry
        with pytest.raises(RewardError, match="column `answer` cannot go to a worker"):
            score(suite, ["a"], answer=[object()])


def test_a_rowwise_reward_sees_the_batchs_mean_length_only_if_it_names_it(runs: list[Job]) -> None:
    functions = {
        "any": {"function": f"{HOSTILE}:mean_by_any", "rowwise": True},
        "name": {"function": f"{HOSTILE}:mean_by_name", "rowwise": True},
        "fixed": {"function": f"{HOSTILE}:mean_by_name", "rowwise": True, "args": {"mean_completion_length": [3.0]}},
        "place": {"function": f"{HOSTILE}:mean_by_any"},
    }
    with suite_of(functions) as suite:
        prefetch(suite, ["x"])
        assert {name: len(ahead) for name, ahead in pool_of(suite)._ahead.items()} == {"any": 1, "name": 0, "fixed": 1}
        assert [score(suite, ["x"], k, mean_completion_length=[8.0]) for k in range(4)] == [[-1.0], [8.0], [3.0], [8.0]]
        assert len(runs) == 3  # each once only
    whole = RewardsSection.model_validate({"functions": {"whole": functions["place"]}, "workers": 1})
    with RewardSuite(whole, isolated=True) as suite:
        assert score(suite, ["x"], mean_completion_length=[8.0]) == [8.0]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (CODE, True),
        ({"function": f"{HOSTILE}:run_code"}, False),
        ({"function": f"{HOSTILE}:mean_by_name", "rowwise": True}, False),
    ],
)
@pytest.mark.parametrize("isolated", [False, True])
def test_whether_anything_overlaps(reward: dict[str, Any], expected: bool, isolated: bool, runs: list[Job]) -> None:
    section = RewardsSection.model_validate({"functions": {"one": reward}, "workers": 1})
    with RewardSuite(section, isolated) as suite:
        assert suite.overlaps is expected
        prefetch(suite, ["score = 1.0"])
        assert [len(ahead) for pool in suite._pools.values() for ahead in pool._ahead.values()] in ([], [int(expected)])


# --- over batches ---


def test_every_argument_makes_a_row_another_one() -> None:
    row = {"prompts": ["?"], "completions": [count("a")], "completion_ids": [[1, 2]], "level": [1], "about": ["x"]}
    changes = {"prompts": ["!"], "completions": [count("b")], "completion_ids": [[1, 3]], "level": [2], "about": ["y"]}
    with suite_of({"code": CODE, "twin": CODE}) as suite:
        one, twin = suite.functions
        rows = [row, *({**row, key: value} for key, value in changes.items()), {**row, "more": [None]}]
        assert [one(**row)[0] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
        assert [one(**row)[0] for row in reversed(rows)] == [7, 6, 5, 4, 3, 2, 1]
        assert one(**dict(reversed(row.items()))) == [1]  # the order of the columns is none
        assert [twin(**row)[0] for row in rows] == [8, 9, 10, 11, 12, 13, 14]


def test_equal_rows_of_a_batch_run_once() -> None:
    with suite_of({"code": CODE}) as suite:
        assert score(suite, [count("a"), count("b"), count("a")]) == [1.0, 2.0, 1.0]


def test_the_scores_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    recent = RecentScores(2)
    recent[b"a"], recent[b"b"] = 1.0, None
    assert recent[b"a"] == 1.0  # used, so `b` is the next to go
    recent[b"c"] = 3.0
    assert (b"a" in recent, b"b" in recent, b"c" in recent, len(recent)) == (True, False, True, 2)

    monkeypatch.setattr("rlbal.rewards.pool.KEPT_SCORES", 2)
    with suite_of({"code": CODE}) as suite:
        batch = [count(n) for n in range(4)]
        assert score(suite, batch) == [1.0, 2.0, 3.0, 4.0]  # more in one batch than are kept
        assert score(suite, batch[::-1]) == [4.0, 3.0, 5.0, 6.0]
        assert len(pool_of(suite)._scores) == 2


def test_a_batch_that_was_scored_as_a_whole_is_not_kept() -> None:
    section = RewardsSection.model_validate({"functions": {"code": {**CODE, "rowwise": False}}, "workers": 1})
    with RewardSuite(section, isolated=True) as suite:
        assert [score(suite, [count("a")]) for _ in range(2)] == [[1.0], [2.0]]


def test_the_same_with_and_without_prefetch() -> None:
    random = Random(0)
    kinds = [
        "score = {}",
        "score = None  # {}",
        "score = float('nan')  # {}",
        "score = 'text {}'",
        "raise ValueError({})",
        "import os; os._exit({})",
    ]
    weights = [12, 2, 1, 1, 1, 1]
    functions = {"code": {**CODE, "range": [0, 20]}, "twin": {**CODE, "unsafe": True}}
    with suite_of(functions, workers=2) as plain, suite_of(functions, workers=2) as early:
        for _ in range(5):
            texts = [kind.format(random.randrange(25)) for kind in random.choices(kinds, weights, k=24)]
            levels = [random.randrange(2) for _ in texts]
            order = random.sample(range(24), 18)  # some are never prefetched, some with another level
            for rows in (order[:3], order[3:4], order[4:]):
                seen = [levels[n] if random.random() < 0.8 else 2 for n in rows]
                prefetch(early, [texts[n] for n in rows], level=seen)
            for k in range(2):
                assert score(early, texts, k, level=levels) == score(plain, texts, k, level=levels)
            failures = plain.take_failures()
            assert early.take_failures() == failures and failures


# --- ends ---


def test_closing_with_rows_in_the_queue(gate: Path) -> None:
    suite = suite_of({"code": CODE}, workers=2)
    prefetch(suite, [gated(gate, n) for n in range(40)])
    pool = pool_of(suite)
    futures = list(pool._ahead["code"].values())
    wait_for(lambda: sum(future.running() for future in futures) == 2)
    suite.close()
    assert not any(thread.is_alive() for thread in pool._crew._threads)
    assert all(worker._process is None for worker in pool._workers)
    assert sum(future.cancelled() for future in futures) == 38
    prefetch(suite, [count("late")])
    with pytest.raises(RewardError, match="closed"):
        score(suite, [count("late")])


def test_ctrl_c_leaves_nobody_at_work_on_the_batch(gate: Path, runs: list[Job]) -> None:
    batch = [gated(gate), *(count(n) for n in range(20))]
    with suite_of({"code": CODE, "twin": CODE}) as suite:

        def interrupt() -> None:
            wait_for(lambda: pool_of(suite)._lock.locked() and len(runs) == 1)
            time.sleep(0.1)  # until it waits
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # meanwhile it waits for the row that has begun
            gate.touch()

        prefetch(suite, batch)
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            score(suite, batch)
        thread.join()
        assert pool_of(suite)._crew._busy == 0
        assert score(suite, [count("after")]) == [2.0]
        assert suite.take_failures() == []


def test_workers_that_cannot_be_started_cost_a_batch_and_are_tried_again(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (tmp_path / "mine.py").write_text(f"import os\nassert not os.path.exists({str(broken)!r})\n")
    with (tmp_path / "mine.py").open("a") as file:
        file.write("def f(completions):\n    return [1.0] * len(completions)\n")
    with suite_of({"mine": {"function": f"{tmp_path}/mine.py:f", "rowwise": True}}, workers=2) as suite:
        broken.touch()
        prefetch(suite, ["a", "b", "c"])
        assert score(suite, ["a", "b", "c", "d"]) == [None] * 4
        (failure,) = suite.take_failures()
        assert (failure.reason, failure.count) == ("died", 4)
        assert "could not be run" in failure.example and "AssertionError" in failure.example
        broken.unlink()
        assert score(suite, ["a", "b", "c", "d"]) == [1.0] * 4
        assert suite.take_failures() == []
