"""Between processes travel numbers, a few for each row: neither prompts nor completions, nor what grows with them.

TRL by itself sends the text of every batch to every process (`gather_object`), whether or not anybody reads it there.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 2  # of every run
LARGEST = 16 * 8  # bytes for each row in a step, over all our exchanges: 16 numbers

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Run -> what its first process sent."""
    folder = tmp_path_factory.mktemp("communication")
    command = [sys.executable, str(ROOT / "tests/contract/communication_run.py"), str(folder / "noted.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "output").open("w+") as output:
        program = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = program.wait(timeout=400)
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
        output.seek(0)
        assert code == 0, output.read()[-5000:]
    return json.loads((folder / "noted.json").read_text())


def sent(run: dict[str, Any], owner: str) -> int:
    return sum(one["bytes"] for name, one in run["by_function"].items() if name.startswith(f"{owner}."))


def test_what_is_sent_is_seen(noted: dict[str, Any]) -> None:
    """Rewards travel through TRL's `gather`: 16 rows, two rewards, 4 bytes each, in two steps."""
    assert noted["long"]["by_function"]["trl._calculate_rewards"] == {"calls": STEPS, "bytes": STEPS * 16 * 2 * 4}
    assert noted["long"]["by_function"]["rlbal._gather_batch"]["calls"] == STEPS


@pytest.mark.parametrize("run", ["short", "long", "more rows"])
def test_no_text_and_no_object_leaves_a_process(run: str, noted: dict[str, Any]) -> None:
    assert noted[run]["pickled"] == []


def test_longer_texts_do_not_make_it_more(noted: dict[str, Any]) -> None:
    """Completions of 3 and of 15 tokens."""
    assert noted["short"]["by_function"] == noted["long"]["by_function"]


def test_ours_is_a_few_numbers_a_row(noted: dict[str, Any]) -> None:
    """Twice as many rows, and what is added for each: at least its prompt and lengths, at most 16 numbers."""
    more = (sent(noted["more rows"], "rlbal") - sent(noted["long"], "rlbal")) / STEPS / 16
    assert 3 * 8 <= more <= LARGEST


def test_only_names_are_sent_for_a_metric_of_a_reward(noted: dict[str, Any]) -> None:
    """It is logged on one process; the names are agreed upon, and its column of text stays there."""
    run = noted["metric on one process"]
    assert len(run["logs"]) == STEPS and all("letters" in entry for entry in run["logs"])
    assert run["pickled"] and sum(size for _, _, size in run["pickled"]) < STEPS * 200
    in_names = sum(size for owner, _, size in run["pickled"] if owner == "rlbal")
    assert sent(run, "rlbal") - in_names == sent(noted["long"], "rlbal")


def test_the_table_that_was_asked_for_is_whole(noted: dict[str, Any]) -> None:
    assert noted["table"]["table_rows"] == 32
    assert sum(size for _, _, size in noted["table"]["pickled"]) > STEPS * 16 * 15


def test_what_failed_is_told_in_short(noted: dict[str, Any]) -> None:
    """The reward's error repeats its completions 50 times, over 10,000 characters."""
    run = noted["failures"]
    assert [entry["reward/first/failed/raised"] for entry in run["logs"]] == [0.5, 0.5]
    assert sum(size for _, _, size in run["pickled"]) < STEPS * 2000
