"""The commands as people type them, in processes of their own: one launch over two processes, evaluation, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlbal.run import RunDirectory, read_jsonl
from tests.e2e.test_train import recipe_for

ROOT = Path(__file__).parents[2]


def rlbal(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line; a hang fails the test."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, "-m", "rlbal.cli", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def write_recipe(tmp_path: Path, function: str = "first") -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_for(tmp_path, function).dump())
    return path


def test_train_on_two_processes_then_evaluate(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    launch = ("--accelerate", "cpu_2proc", "--num-processes", "2")
    done = rlbal("train", str(recipe), "trainer.per_device_train_batch_size=4", *launch)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes x 4 rows per device" in done.stderr
    assert "Held-out evaluation" in done.stdout

    run = RunDirectory(tmp_path / "run")
    records = list(read_jsonl(run.metrics_path))
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["rollouts"] for record in records] == [8, 16, 24, 32]
    assert run.recipe().launch.num_processes == 2

    evaluated = rlbal("eval", str(run.path), "--json")
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    figures = json.loads(evaluated.stdout)
    after = list(read_jsonl(run.evaluations_path))[-1]
    # One process draws the same samples from the saved model as two drew from the model in training.
    assert figures["metrics"]["pass@1"] == pytest.approx(after["metrics"]["pass@1"])
    assert figures["metrics"]["length/mean"] == pytest.approx(after["metrics"]["length/mean"])


def test_a_reward_that_fails_on_one_process_ends_all_with_its_name(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "import os\n"
        "def first(completions, **kwargs):\n"
        "    if os.environ['RANK'] == '1' and kwargs.get('trainer_state'):\n"
        "        raise ValueError('only the second process has no thermometer')\n"
        "    return [0.5 for _ in completions]\n"
    )
    launch = ("--accelerate", "cpu_2proc", "--num-processes", "2")
    done = rlbal("train", str(recipe), "trainer.per_device_train_batch_size=4", *launch)
    assert done.returncode != 0
    assert "reward `first` failed" in done.stderr
    assert "only the second process has no thermometer" in done.stderr
    assert "--resume" in done.stderr
    assert RunDirectory(tmp_path / "run").latest_checkpoint().name == "checkpoint-0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer.lerning_rate=1", "Did you mean `learning_rate`?"),
        ("data.columns={answer: anser}", "anser"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl"),
        ("rewards.functions.first.function=FOLDER/my_rewards.py:frist", "Did you mean `first`?"),
        ("model={name_or_path: ./no-such-model}", "no-such-model"),
        ("lora={rank: 8}", "`lora.rank`"),
        ("trainer.max_completion_length=4096", "leaves no room for a prompt"),
    ],
)
def test_bad_input_ends_with_a_message_and_without_a_traceback(change: str, message: str, tmp_path: Path) -> None:
    done = rlbal("train", str(write_recipe(tmp_path)), change.replace("FOLDER", str(tmp_path)))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_recipe_leaves_no_run_behind(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    values["data"]["path"] = str(tmp_path / "missing.jsonl")
    recipe.write_text(yaml.safe_dump(values))
    assert rlbal("train", str(recipe)).returncode == 1
    assert not (tmp_path / "run").exists()


def test_ctrl_c_on_two_processes_saves_one_checkpoint(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = RunDirectory(tmp_path / "run")
    words = ["train", str(recipe), "--accelerate", "cpu_2proc", "--num-processes", "2"]
    words += ["trainer.per_device_train_batch_size=4", "trainer.max_steps=100000", "trainer.save_strategy=no"]
    words += ["evaluation.every=null", "evaluation.at_start=false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, "-m", "rlbal.cli", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 180
        while not (run.metrics_path.is_file() and len(list(read_jsonl(run.metrics_path))) >= 2):
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does: everybody gets it, and the launcher passes it on
        started.communicate(timeout=120)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode != 0
    last = max(record["step"] for record in read_jsonl(run.metrics_path))
    assert run.latest_checkpoint().name == f"checkpoint-{last}"
