"""Hostile completions against the workers. `hostile_rewards.run_code` runs a completion as Python, so that a completion
can try everything that an exploited scorer could.
"""

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlbal.errors import RewardError
from rlbal.recipe import RewardsSection
from rlbal.rewards.outcomes import Fault
from rlbal.rewards.sandbox import Job, Worker, WorkerLost, _read_answer
from rlbal.rewards.suite import RewardSuite

HOSTILE = str(Path(__file__).parent / "hostile_rewards.py")
COUNT = itertools.count()


def suite_of(functions: dict[str, Any], **rest: Any) -> RewardSuite:
    settings = {"functions": functions, "workers": 1, "memory_mb": 256, "timeout": 1.0, **rest}
    return RewardSuite(RewardsSection.model_validate(settings))


@pytest.fixture(scope="module", params=[False, True], ids=["lasting", "fresh"])
def suite(request: pytest.FixtureRequest) -> Iterator[RewardSuite]:
    """Workers that last from row to row, and those that score each row in a copy (`unsafe: true`)."""
    os.environ["RLBAL_TEST_SECRET"] = "hunter2"
    functions = {"code": {"function": f"{HOSTILE}:run_code", "rowwise": True, "unsafe": request.param}}
    with suite_of(functions) as made:
        made.start()
        yield made
    del os.environ["RLBAL_TEST_SECRET"]


def outcome(suite: RewardSuite, code: str) -> tuple[float | None, str | None]:
    """Score and failure reason of a completion; the innocent rows before and after it must be right."""
    fresh = next(COUNT)  # else they would not run at all: equal rows are scored once
    completions = [f"score = 1.0  # {fresh}", textwrap.dedent(code), f"score = 0.5  # {fresh}"]
    before, score, after = suite.functions[0](prompts=["?"] * 3, completions=completions, completion_ids=[[1]] * 3)
    assert (before, after) == (1.0, 0.5)
    failures = suite.take_failures()
    assert sum(failure.count for failure in failures) == (score is None)
    return score, failures[0].reason if failures else None


def needs(suite: RewardSuite, *protections: str) -> None:
    kept_from = suite.isolation.partition(";")[0]
    for protection in protections:
        if protection not in kept_from:
            pytest.skip(f"this kernel cannot keep a process from: {protection}")


@pytest.mark.parametrize(
    "code", ["while True: pass", "score = 9**9**9**9", "import time; time.sleep(60)"], ids=["loop", "power", "sleep"]
)
def test_hanging_costs_one_time_limit(suite: RewardSuite, code: str) -> None:
    assert outcome(suite, code) == (None, "timeout")


@pytest.mark.parametrize(
    "code",
    ["import os; os._exit(0)", "import ctypes; ctypes.string_at(0)", "import resource as r; 1/0"],
    ids=["exit", "segfault", "exception"],
)
def test_dying_costs_one_row(suite: RewardSuite, code: str) -> None:
    assert outcome(suite, code) == (None, "raised" if "1/0" in code else "died")


@pytest.mark.parametrize("code", ["x = bytearray(10**12)", "x = []\nwhile True: x.append(bytearray(2**24))"])
def test_memory_is_limited(suite: RewardSuite, code: str) -> None:
    assert outcome(suite, code) == (None, "raised")


def test_no_file_is_written_changed_or_removed(suite: RewardSuite, tmp_path: Path) -> None:
    needs(suite, "files")
    precious, new = tmp_path / "precious", tmp_path / "new"
    precious.write_text("weights")
    for code in (
        f"open({str(new)!r}, 'w').write('x')",
        f"open({str(precious)!r}, 'w')",
        f"import os; os.truncate({str(precious)!r}, 0)",
        f"import os; os.remove({str(precious)!r})",
        f"import os; os.rename({str(precious)!r}, {str(new)!r})",
        f"import os; os.mkdir({str(new)!r})",
        "open('here', 'w').write('x')",
    ):
        assert outcome(suite, code) == (None, "raised")
    assert precious.read_text() == "weights"
    assert not new.exists()


def test_written_bytes_are_limited_even_without_landlock(tmp_path: Path) -> None:
    """The resource limit alone, as on an older kernel."""
    code = """
        import sys
        from rlbal.rewards import isolation
        isolation._landlock = lambda: False
        assert "files" in isolation.lock_down(256, False)
        try:
            with open(sys.argv[1], "w") as file:
                file.write("x")
        except OSError:
            sys.exit(7)
    """
    target = tmp_path / "new"
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(target)], check=False).returncode == 7
    assert target.read_text() == ""


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))",
    ],
)
def test_no_processes_and_no_signals(suite: RewardSuite, code: str) -> None:
    needs(suite, "processes")
    assert outcome(suite, code) == (None, "raised")


def test_threads_are_allowed(suite: RewardSuite) -> None:
    code = "import threading; t = threading.Thread(target=print); t.start(); t.join(); score = 0.25"
    assert outcome(suite, code) == (0.25, None)


def test_no_network(suite: RewardSuite) -> None:
    needs(suite, "network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        socket.create_connection(address, timeout=5).close()  # it can be reached from here
        assert outcome(suite, f"import socket; socket.create_connection({address})") == (None, "raised")


def test_the_environment_holds_no_secrets(suite: RewardSuite) -> None:
    assert outcome(suite, "import os; score = float('RLBAL_TEST_SECRET' in os.environ)") == (0.0, None)
    needs(suite, "files")  # the same means keeps it from looking into other processes
    assert Path(f"/proc/{os.getpid()}/environ").read_bytes()  # anyone else of this user may
    assert outcome(suite, f"open('/proc/{os.getpid()}/environ').read(); score = 1.0") == (None, "raised")


def test_printing_is_harmless(suite: RewardSuite) -> None:
    code = "import sys; print('x' * 10**6); print('y' * 10**6, file=sys.stderr); score = 0.25"
    assert outcome(suite, code) == (0.25, None)


@pytest.mark.parametrize(
    "reply",
    [
        r"b'garbage\n'",
        r"b'[' * 50_000 + b'\n'",
        r"b'\xff\xfe\n'",
        r"""b'{"token": "0123456789abcdef", "outcomes": [1.0]}\n'""",
        r"""b'{"outcomes": ["timeout", 3, 4]}\n'""",
        "b'x' * 10**8",
    ],
    ids=["garbage", "deep", "not-utf8", "forged", "misshapen", "endless"],
)
def test_meddling_with_the_answer_channel_costs_one_row(suite: RewardSuite, reply: str) -> None:
    code = f"""
        import os
        reply = memoryview({reply})
        for fd in range(3, 32):
            try:
                while reply:
                    reply = reply[os.write(fd, reply[:65536]):]
            except OSError:
                pass
        score = 1.0
    """
    assert outcome(suite, code) == (None, "died")


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"token": "other", "outcomes": [1.0, 1.0]},
        {"token": ["t"], "outcomes": [1.0, 1.0]},
        {"token": "t"},
        {"token": "t", "outcomes": 3},
        {"token": "t", "outcomes": [1.0]},
        {"token": "t", "outcomes": [1.0, 1.0, 1.0]},
        {"token": "t", "outcomes": [1.0, ["raised"]]},
        {"token": "t", "outcomes": [1.0, ["raised", 3]]},
        {"token": "t", "outcomes": [1.0, [["raised"], "x"]]},
        {"token": "t", "outcomes": [1.0, ["skipped", "x"]]},
    ],
)
def test_answers_that_no_worker_would_give(answer: dict[str, Any]) -> None:
    with pytest.raises(WorkerLost, match="unreadable"):
        _read_answer(answer, "t", Job("", 2, 1.0, None, False))


def test_answers_are_judged_again_and_cleaned() -> None:
    job = Job("", 5, 1.0, (0, 1), False)
    fault = ["raised", "a\x1b[2J\ud800é" + "x" * 9999]
    right, high, nan, text, raised = _read_answer(
        {"token": "t", "outcomes": [0.5, 2.0, math.nan, "1", fault]}, "t", job
    )
    assert right == 0.5
    faults = [one for one in (high, nan, text, raised) if isinstance(one, Fault)]
    assert [one.reason for one in faults] == ["out_of_range", "nan", "not_a_number", "raised"]
    assert faults[-1].message.startswith("a?[2J?éx") and len(faults[-1].message) == 1000


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("score = float('nan')", "nan"),
        ("score = float('inf')", "infinite"),
        ("score = 'good'", "not_a_number"),
        ("raise KeyboardInterrupt", "raised"),
        ("raise SystemExit", "raised"),
    ],
)
def test_values_that_are_no_score(suite: RewardSuite, code: str, reason: str) -> None:
    assert outcome(suite, code) == (None, reason)


def test_what_a_completion_changes_is_gone_with_its_row(suite: RewardSuite) -> None:
    counts = [f"STATE['rows'] += 1; score = STATE['rows']  # {n}" for n in range(3)]
    scores = suite.functions[0](prompts=["?"] * 3, completions=counts, completion_ids=[[1]] * 3)
    # A lasting worker keeps what a completion changed, so whoever evaluates completions says `unsafe: true`.
    assert scores == ([1.0] * 3 if suite.section.functions["code"].unsafe else [scores[0] + n for n in range(3)])


def test_workers_do_not_import_torch_or_the_parents_main(suite: RewardSuite) -> None:
    code = "import sys; score = float('torch' in sys.modules) + float('pytest' in sys.modules)"
    assert outcome(suite, code) == (0.0, None)


def test_deep_latex_and_powers_do_not_stop_math_correct() -> None:
    bombs = [
        "\\boxed{" + "\\frac{" * 20_000,
        "$" + "{" * 20_000 + "1" + "}" * 20_000 + "$",
        "<answer>9**9**9**9</answer>",
        "<answer>9^{9^{9^{9}}}</answer>",
    ]
    with suite_of({"math": {"function": "reward_fns.accuracy:math_correct", "rowwise": True}}) as made:
        completions = [*bombs, "<answer>4</answer>"]
        columns = {"answer": ["4"] * len(completions)}
        scores = made.score(["?"] * len(completions), completions, [[1]] * len(completions), columns)[:, 0]
        assert scores[-1] == 1.0
        assert not (scores[:-1] > 0).any()
        assert sum(failure.count for failure in made.take_failures()) == (scores != scores).sum()


def test_a_power_bomb_for_countdown_costs_one_time_limit() -> None:
    entry = {"function": "reward_fns.reasoning_gym:score", "rowwise": True, "unsafe": True}
    metadata = json.dumps({"source_dataset": "countdown", "numbers": [2, 3], "target": 5})
    with suite_of({"right": entry}) as made:
        completions = ["<answer>2 + 3</answer>", "<answer>9**9**9**9</answer>", "<answer>3 + 2</answer>"]
        columns = {"question": ["?"] * 3, "answer": ["2 + 3"] * 3, "metadata": [metadata] * 3}
        scores = made.functions[0](prompts=["?"] * 3, completions=completions, completion_ids=[[1]] * 3, **columns)
        assert scores == [1.0, None, 1.0]
        assert [failure.reason for failure in made.take_failures()] in (["timeout"], ["died"], ["raised"])


def test_unsafe_tasks_fail_loudly_when_not_allowed() -> None:
    entry = {"function": "reward_fns.reasoning_gym:score", "rowwise": True}
    metadata = json.dumps({"source_dataset": "countdown", "numbers": [2, 3], "target": 5})
    with suite_of({"right": entry}) as made:
        columns = {"question": ["?"], "answer": ["5"], "metadata": [metadata]}
        assert made.functions[0](
            prompts=["?"], completions=["<answer>5</answer>"], completion_ids=[[1]], **columns
        ) == [None]
        (failure,) = made.take_failures()
        assert failure.reason == "raised" and "`countdown`" in failure.example and "unsafe: true" in failure.example


def test_rows_keep_their_order_over_several_workers() -> None:
    with suite_of({"code": {"function": f"{HOSTILE}:run_code", "rowwise": True}}, workers=2) as made:
        completions = [f"import time; time.sleep({0.02 if n % 3 else 0}); score = {n}" for n in range(30)]
        scores = made.functions[0](prompts=["?"] * 30, completions=completions, completion_ids=[[1]] * 30)
        assert scores == list(range(30))


def test_a_worker_that_cannot_import_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = tmp_path / "picky.py"
    reward.write_text("import os\nos.environ['HF_TOKEN']\ndef f(completions, **kwargs):\n    return [1.0]\n")
    monkeypatch.setenv("HF_TOKEN", "here only")
    with suite_of({"picky": {"function": f"{reward}:f", "rowwise": True}}) as made:
        with pytest.raises(RewardError, match=r"worker did not start(.|\n)*KeyError: 'HF_TOKEN'"):
            made.start()
        assert made.functions[0](prompts=["?"], completions=["x"], completion_ids=[[1]]) == [None]
        (failure,) = made.take_failures()
        assert failure.reason == "died" and "HF_TOKEN" in failure.example


def test_an_import_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = tmp_path / "slow.py"
    reward.write_text(
        "import os, time\nif 'PWD_OF_TRAINER' not in os.environ: time.sleep(60)\ndef f(completions): ...\n"
    )
    monkeypatch.setenv("PWD_OF_TRAINER", "set here only")
    monkeypatch.setattr("rlbal.rewards.sandbox.STARTUP_SECONDS", 1.0)
    slow = {"function": f"{reward}:f", "rowwise": True}
    with suite_of({"slow": slow}) as made:
        with pytest.raises(RewardError, match=r"did not start(.|\n)*took over 1 s"):
            made.start()
        # Given up for the whole batch, not tried again for every row.
        rows = [str(n) for n in range(50)]
        assert made.functions[0](prompts=["?"] * 50, completions=rows, completion_ids=[[1]] * 50) == [None] * 50
        (failure,) = made.take_failures()
        assert (failure.reason, failure.count) == ("died", 50) and "took over 1 s" in failure.example


def test_closing_ends_the_workers_and_their_folder() -> None:
    with suite_of({"code": {"function": f"{HOSTILE}:run_code", "rowwise": True}}) as made:
        made.start()
        (worker,) = made._pools["code"]._workers
        assert worker._process is not None
        pid, folder = worker._process.pid, Path(made._pools["code"]._folder.name)
        assert Path(f"/proc/{pid}").exists() and folder.is_dir()
    assert not Path(f"/proc/{pid}").exists() and not folder.exists()


def test_a_closed_worker_is_not_started_again(tmp_path: Path) -> None:
    """A thread may be about to start it when the rewards are closed."""
    worker = Worker(b"", str(tmp_path), once=False)
    worker.close()
    with pytest.raises(RewardError, match="closed"):
        worker.start()
    assert worker._process is None


def test_busy_workers_end_when_the_trainer_is_killed(tmp_path: Path) -> None:
    code = f"""
        import tempfile, threading, time
        from rlbal.recipe import RewardsSection
        from rlbal.rewards.suite import RewardSuite
        tempfile.tempdir = {str(tmp_path)!r}
        entry = {{"function": {HOSTILE!r} + ":run_code", "rowwise": True}}
        section = {{"functions": {{"code": entry}}, "workers": 1, "timeout": 60}}
        suite = RewardSuite(RewardsSection.model_validate(section))
        suite.start()
        row = dict(prompts=["?"], completions=["while True: pass"], completion_ids=[[1]])
        threading.Thread(target=suite.functions[0], kwargs=row, daemon=True).start()
        time.sleep(0.5)
        print(suite._pools["code"]._workers[0]._process.pid, flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        worker = Path(f"/proc/{int(trainer.stdout.readline())}")
        assert worker.exists()
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        deadline = time.monotonic() + 20
        while worker.exists() and "Z" not in (worker / "stat").read_text().rpartition(")")[2][:3]:
            assert time.monotonic() < deadline, "the worker outlived the trainer"
            time.sleep(0.02)
