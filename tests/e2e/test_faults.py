"""Real runs on two processes of which one dies, hangs or fails: the job ends, says which and why, and can go on.

All runs are started by one fixture, a few at a time, since those with a hanging process mostly wait.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml

from rlbal.run import RunDirectory, read_jsonl

ROOT = Path(__file__).parents[2]
AT_ONCE = 2
TIMEOUT = 20  # seconds, where a process hangs; the launcher gives it 30 s more before it kills it
FAR_TOO_LONG = 500
# name -> engine, the fault and the process that has it, and what standard error says of the cause
CASES = {
    "killed": ("cpu_2proc", "kill 1", ["process 1 (pid", "died without a word: killed"]),
    "stopped": ("cpu_2proc", "stop 1", ["process 1 (pid", "is stopped (SIGSTOP", f"({TIMEOUT} s)"]),
    "hanging reward": ("cpu_2proc", "hang 1", ["process 1 did not come", "in `commit`", "faulty_rewards.py, line"]),
    "reward that exits": ("cpu_2proc", "exit 0", ["process 0 (pid", "died without a word", "exit status 3"]),
    "reward that raises": ("cpu_2proc", "raise 1", ["reward `even` failed on 8 of 16", "KeyError: 'the unit table'"]),
    "bug": ("cpu_2proc", "break 1", ["process 1 ended with an error", "ValueError: no metrics today"]),
}
if find_spec("deepspeed"):
    CASES["stopped under ZeRO-2"] = ("zero2", "stop 0", ["process 0 (pid", "is stopped (SIGSTOP", f"({TIMEOUT} s)"])
HANGING = ("stop", "hang")

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


@dataclass(frozen=True)
class Ended:
    """A launch that is over."""

    folder: Path
    code: int
    error: str
    left: list[int]  # pids of its processes that still run

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.folder / "run")


def write_recipe(folder: Path, fault: str) -> None:
    (folder / "fault").write_text(fault)
    even = {"function": f"{ROOT / 'tests/e2e/faulty_rewards.py'}:even_share", "range": [0, 1]}
    exact = {"function": "reward_fns.accuracy:exact_match", "rowwise": True}
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {"tiny": {"hidden_size": 32, "layers": 2, "heads": 2, "max_positions": 128}},
        "data": {"source": "reasoning_gym", "task": "chain_sum", "size": 64, "eval_size": 0},
        "algorithm": {"name": "grpo", "rollouts_per_prompt": 4},
        "rewards": {"functions": {"even": even, "exact": exact}},
        "evaluation": {"at_start": False, "at_end": False},
        "launch": {"num_processes": 2},
        "trainer": {
            "per_device_train_batch_size": 8,
            "max_completion_length": 16,
            "max_steps": 4,
            "save_steps": 1,
            "gradient_checkpointing": False,
            "ddp_timeout": TIMEOUT if fault.startswith(HANGING) else 600,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def launch(folder: Path, engine: str, *options: str) -> Ended:
    """Run the folder's recipe on two processes, and see what is left of them afterwards."""
    command = [sys.executable, "-m", "rlbal.launcher", "--config_file", f"accelerate_configs/{engine}.yaml"]
    command += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]
    command += ["-m", "rlbal.train", str(folder / "recipe.yaml"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": str(folder / "fault")}
    with (folder / "error").open("w+") as error:
        program = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=error, start_new_session=True
        )
        try:
            code = program.wait(FAR_TOO_LONG)
            left = still_running(folder)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            for pid in still_running(folder, patience=0.0):
                os.kill(pid, signal.SIGKILL)
        error.seek(0)
        return Ended(folder, code, error.read(), left)


def still_running(folder: Path, patience: float = 20.0) -> list[int]:
    """Of the processes noted at the fault, those that run after a while: it takes a moment until children are gone."""
    family = [one for path in folder.glob("family*.json") for one in json.loads(path.read_text())]
    deadline = time.monotonic() + patience
    while (left := [pid for pid, born in family if runs(pid, born)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def runs(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Ended]]]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {}
        for name, (engine, fault, _) in CASES.items():
            folder = tmp_path_factory.mktemp("fault")
            write_recipe(folder, fault)
            futures[name] = pool.submit(launch, folder, engine)
        yield futures


@pytest.mark.parametrize("name", CASES)
def test_the_job_ends_and_names_the_cause(name: str, ended: dict[str, Future[Ended]]) -> None:
    (engine, fault, words), it = CASES[name], ended[name].result()
    assert it.code == 1, it.error
    assert len(list(it.folder.glob("family*.json"))) == 2, it.error
    assert not it.left
    for part in words:
        assert part in it.error, it.error
    assert it.error.count("training cannot go on") == (0 if fault.startswith("raise") else 1), it.error
    last = it.error.strip().splitlines()[-1]
    assert last.startswith("process ") and "ended first" in last
    assert it.run.latest_checkpoint().name == "checkpoint-2"
    whole = list(it.folder.glob("run/checkpoint-2/global_step2/*zero_pp_rank_1*"))
    assert bool(whole) == (engine == "zero2"), "ZeRO keeps each process's part of the optimizer"


def test_the_run_can_go_on(ended: dict[str, Future[Ended]]) -> None:
    it = ended["killed"].result()
    (it.folder / "fault").write_text("none 0")
    again = launch(it.folder, CASES["killed"][0], "--resume")
    assert again.code == 0, again.error
    assert [record["step"] for record in read_jsonl(it.run.metrics_path)] == [1, 2, 3, 4]
    assert (it.run.model_path / "model.safetensors").is_file() and not again.left
