"""Two processes give what one gives with the same global batch: every engine, GRPO and PPO, full and LoRA, all ways of
weighting, on scripted rollouts.

All runs are made by `engines_run.py`, once, from a program that imports everything before it forks. The engines are the
files of accelerate_configs/, as `accelerate launch` reads them.
"""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.e2e.engines_run import CASES, ON, STEPS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/e2e/engines_run.py"
# Engine -> what accelerate calls it, the class around the model, DeepSpeed's ZeRO stage, and whether weights are split.
ENGINES = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel", None, False),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine", 2, False),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine", 3, True),
    "fsdp2": ("FSDP", "FSDP", None, True),
}
USABLE = [engine for engine in ENGINES if not engine.startswith("zero") or find_spec("deepspeed")]
EVERY = [(engine, case) for engine in USABLE for case in ON[engine]]
# Wall time; what TRL takes per process, or per part whatever its size, before it averages; and padding, of which two
# processes have less.
OTHERWISE = ("time/", "gpu_seconds", "step_time", "clip_ratio/", "compaction/tokens")
# Another order of the same sums. Measured: up to 7e-6 of the way that the parameters went.
TOLERANCE = 5e-5

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs left."""
    folder = tmp_path_factory.mktemp("engines")
    command = [sys.executable, str(SCRIPT), str(folder), "alone", *USABLE]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "output").open("w+") as output:
        program = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = program.wait(timeout=500)
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)  # the forked processes too
                program.wait()
        output.seek(0)
        assert code == 0, output.read()[-5000:]
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Engine -> what each of its processes saw, by case."""
    return {
        engine: [json.loads((folder / f"{engine}-{rank}.json").read_text()) for rank in range(processes)]
        for engine, processes in [("alone", 1), *((engine, 2) for engine in USABLE)]
    }


def in_order(run: dict[str, Any]) -> dict[str, Any]:
    """With the rows by prompt; those of one prompt are already in the order of their turns."""
    order = sorted(range(len(run["prompts"])), key=lambda row: run["prompts"][row])
    return {**run, **{key: [run[key][row] for row in order] for key in ("prompts", "advantages", "rewards")}}


def close(mine: Any, theirs: Any) -> bool:
    absent = mine != mine and theirs != theirs  # NaN: most recipes have no budget
    return mine == theirs or absent or abs(mine - theirs) <= 1e-4 * max(1.0, abs(theirs))


@pytest.mark.parametrize(("engine", "case"), EVERY)
def test_it_was_what_it_is_called(engine: str, case: str, seen: dict[str, Any]) -> None:
    """Several configurations only look like two processes, or like an engine."""
    kind, wrapped, stage, split = ENGINES[engine]
    for process in seen[engine]:
        run = process[case]
        assert (run["num_processes"], run["distributed_type"], run["stage"]) == (2, kind, stage)
        assert run["wrapped"].startswith(wrapped)
        assert run["partitioned"] == (run["parameters"] if split else 0)
        assert run["engine_steps"] == (STEPS if kind == "DEEPSPEED" else None)
    alone = seen["alone"][0][case]
    assert (alone["num_processes"], alone["distributed_type"]) == (1, "NO")


def test_a_real_launch_does_the_same(seen: dict[str, Any], folder: Path) -> None:
    """As `accelerate launch` starts it, and not as forked processes: to the last bit."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_configs/cpu_2proc.yaml", str(SCRIPT), str(folder), "launched"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "case=gradient"], cwd=ROOT, env=environment, check=True, timeout=300)
    for rank in (0, 1):
        real = json.loads((folder / f"launched-{rank}.json").read_text())["gradient"]
        for key in ("num_processes", "distributed_type", "wrapped", "digest", "advantages", "ledger"):
            assert real[key] == seen["ddp"][rank]["gradient"][key], key


@pytest.mark.parametrize(("engine", "case"), EVERY)
def test_all_processes_hold_the_same(engine: str, case: str, seen: dict[str, Any]) -> None:
    """Parameters, ledger, weights, budget and what they are told of the batch."""
    first, second = (process[case] for process in seen[engine])
    for key in ("digest", "ledger", "advantages", "rewards", "prompts", "draws", "tables"):
        assert first[key] == second[key], key
    first["state"]["totals"].pop("gpu_seconds", None), second["state"]["totals"].pop("gpu_seconds", None)
    assert first["state"] == second["state"]
    assert {"budget", "allocation", "weighting", "beta"} <= first["state"].keys()


@pytest.mark.parametrize(("engine", "case"), EVERY)
def test_two_processes_equal_one(engine: str, case: str, seen: dict[str, Any], folder: Path) -> None:
    one, two = in_order(seen["alone"][0][case]), in_order(seen[engine][0][case])
    assert max(map(abs, one["advantages"])) > 0.1
    assert two["advantages"] == pytest.approx(one["advantages"], abs=1e-5)
    assert two["ledger"] == one["ledger"] and two["prompts"] == one["prompts"]
    for key in ("allocation", "budget"):
        assert two["state"][key] == one["state"][key]

    moved, expected = (load_file(folder / f"{name}-{case}.safetensors") for name in (engine, "alone"))
    way = max(one.abs().max().item() for one in expected.values())
    assert way > 1e-2
    for name, there in expected.items():
        assert (moved[name] - there).abs().max().item() < TOLERANCE * way, name
    assert moved.keys() == expected.keys()

    assert len(two["metrics"]) == len(one["metrics"]) == STEPS
    for mine, theirs in zip(two["metrics"], one["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        same = {key for key in mine if key.startswith(OTHERWISE) or close(mine[key], theirs[key])}
        assert {key: (mine[key], theirs[key]) for key in mine.keys() - same} == {}


def test_the_cases_do_what_they_are_for(seen: dict[str, Any], folder: Path) -> None:
    """Otherwise their equality would show little."""
    (alone,) = seen["alone"]
    logs = {case: alone[case]["metrics"] for case in CASES}
    for engine in USABLE:
        covered = " ".join(str(sorted(CASES[case].items())) for case in ON[engine])
        for feature in ("gradient", "hypervolume", "knapsack", "lora", "ppo"):
            assert feature in covered, (engine, feature)
    figures = {"gradient": "weight/even", "schedule": "weight/even", "hypervolume": "hypervolume/factor"}
    assert {CASES[case].get("weighting", {}).get("method", "fixed") for case in CASES} == {"fixed", *figures}
    for case, changes in CASES.items():
        if "weighting" in changes:
            assert len({step[figures[changes["weighting"]["method"]]] for step in logs[case]}) > 1, case
        if "allocation" in changes:
            assert max(step["allocation/max"] for step in logs[case]) > 4, case
            # A group on both processes.
            assert any(set(draw[: len(draw) // 2]) & set(draw[len(draw) // 2 :]) for draw in alone[case]["draws"])
        moved = load_file(folder / f"alone-{case}.safetensors")
        assert all("lora_" in name or "critic." in name for name in moved) == ("lora" in changes)
    assert len({step["budget/tokens"] for step in logs["gradient"]}) > 1
    assert len({step["beta/alpha/even"] for step in logs["beta_lora"]}) > 1


PPO_CASES = [(engine, case) for engine, case in EVERY if case.startswith("ppo")]


@pytest.mark.parametrize(("engine", "case"), PPO_CASES)
def test_the_critic_trains_and_comes_back(engine: str, case: str, seen: dict[str, Any], folder: Path) -> None:
    moved = load_file(folder / f"{engine}-{case}.safetensors")
    critic = {name: tensor for name, tensor in moved.items() if name.startswith("critic.")}
    assert len(critic) == (28 if case == "ppo_separate" else 4)
    assert min(tensor.abs().max().item() for name, tensor in critic.items() if ".head." in name) > 1e-5
    saved, alone = (load_file(folder / f"{name}-{case}/model/critic/model.safetensors") for name in (engine, "alone"))
    assert {f"critic.{name}" for name in saved} == critic.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-6)
    if engine != "fsdp2" and case in ("ppo", "ppo_lora"):
        for process in seen[engine]:
            assert process[case]["digest_loaded"] == process[case]["digest"]


@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine, case in EVERY if case != "ppo_separate"])
def test_the_saved_policy_loads_by_itself(engine: str, case: str, folder: Path) -> None:
    """With AutoModelForCausalLM, an adapter too, and it is the one that was trained."""
    ids = torch.arange(40, 120).view(4, 20)

    def logits(path: Path) -> torch.Tensor:
        model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(report.values()), report
        with torch.no_grad():
            return model(ids).logits

    found, expected = (logits(folder / f"{name}-{case}/model") for name in (engine, "alone"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - logits(folder / "base")).abs().max() > 1e-3
