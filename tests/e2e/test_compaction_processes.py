"""On two processes and every engine: compaction leaves the gradient as it was, and sampling does not see the processes.

All runs are made by `compaction_run.py`, once, from a program that imports everything before it forks.
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

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/e2e/compaction_run.py"
# Engine -> what accelerate calls it, the class around the model, and DeepSpeed's ZeRO stage.
ENGINES = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel", None),
    "zero1": ("DEEPSPEED", "DeepSpeedEngine", 1),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine", 2),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine", 3),
    "fsdp2": ("FSDP", "FSDPQwen3ForCausalLM", None),
}
# FSDP2 has one run here: rollouts of a policy in pieces. Its gradients are looked at in test_engines.py.
USABLE = [engine for engine in ENGINES if engine == "ddp" or (engine != "fsdp2" and find_spec("deepspeed"))]
LOSSES = ("grpo", "bnpo", "dapo")
# As in tests/contract/test_compaction_equals_trl.py: another order of the same sums. Measured: up to 3e-6.
TOLERANCE = 5e-5

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Engine -> what each of its processes saw, by run."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(SCRIPT), str(folder), "alone", "fsdp2", *USABLE]
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
    return {
        engine: [json.loads((folder / f"{engine}-{rank}.json").read_text()) for rank in range(processes)]
        for engine, processes in [("alone", 1), ("fsdp2", 2), *((engine, 2) for engine in USABLE)]
    }


def assert_engine(engine: str, run: dict[str, Any]) -> None:
    """It was what it is called: several configurations only look like it."""
    kind, wrapped, stage = ENGINES[engine]
    assert run["num_processes"] == 2
    assert run["distributed_type"] in (kind, kind.replace("CPU", "GPU"))
    assert (run["wrapped"], run["stage"]) == (wrapped, stage)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("engine", USABLE)
def test_the_gradient_stays_the_same(engine: str, loss: str, seen: dict[str, Any]) -> None:
    compact, whole = ([process[f"{loss} {how}"] for process in seen[engine]] for how in ("compact", "whole"))
    for run in (*compact, *whole):
        assert_engine(engine, run)
    assert compact[0]["moved"] == compact[1]["moved"]
    way = max(map(abs, whole[0]["moved"]))
    assert way > 1e-3
    apart = max(abs(a - b) for a, b in zip(compact[0]["moved"], whole[0]["moved"], strict=True))
    assert apart < TOLERANCE * way
    assert compact[0]["losses"] == pytest.approx(whole[0]["losses"], rel=TOLERANCE, abs=1e-6)


@pytest.mark.parametrize("engine", USABLE)
def test_the_runs_were_compacted_and_uneven(engine: str, seen: dict[str, Any]) -> None:
    """Otherwise the equality above would show nothing."""
    for loss in LOSSES:
        first, second = [process[f"{loss} compact"] for process in seen[engine]]
        assert max(first["compaction"]) < 0.5 and not first["notes"]
        assert seen[engine][0][f"{loss} whole"]["parts"] == [[[8, 8]]] * 4
        # Each process makes as many passes of as many rows, whatever it has to learn from.
        rows = [[[part[0] for part in step] for step in process["parts"]] for process in (first, second)]
        assert rows[0] == rows[1]
        # Micro-batches 2 and 4 end an optimizer step; both come in parts, of which only one may synchronise.
        assert [len(step) > 1 for step in rows[0]][1::2] == [True, True]
        kept = [[sum(part[1] for part in step) for step in process["parts"]] for process in (first, second)]
        assert kept[0] != kept[1]
        assert sum(kept[1][2:]) == 0 < sum(kept[0][2:]), "in the second step only one process has rows to learn from"


@pytest.mark.parametrize("engine", [engine for engine in USABLE if engine != "ddp"])
def test_deepspeed_steps_once_per_optimizer_step(engine: str, seen: dict[str, Any]) -> None:
    for process in seen[engine]:
        for run in process.values():
            if "refused" in run:
                continue
            assert run["engine_steps"] == run["steps"] == 2


def global_completions(processes: list[dict[str, Any]], run: str) -> list[list[list[int]]]:
    """All completions of each generation batch, in the order of processes."""
    batches = zip(*(process[run]["completions"] for process in processes), strict=True)
    return [[row for rows in batch for row in rows] for batch in batches]


SAMPLED = {"ddp": ["sampled"], "fsdp2": ["sampled"], "zero3": ["sampled", "sampled in parts"]}


@pytest.mark.parametrize(
    ("engine", "run"),
    [(engine, run) for engine, runs in SAMPLED.items() if engine in (*USABLE, "fsdp2") for run in runs],
)
def test_two_processes_sample_what_one_samples(engine: str, run: str, seen: dict[str, Any]) -> None:
    """Also where each process holds a part of the weights, and has to call the model as often as the other."""
    (alone,) = seen["alone"]
    for process in seen[engine]:
        assert_engine(engine, process[run])
    expected, found = global_completions([alone], "sampled"), global_completions(seen[engine], run)
    assert found == expected
    assert [len(batch) for batch in found] == [32, 32]
    assert len({len(row) for batch in found for row in batch}) > 10
    longest = [[max(map(len, batch)) for batch in process[run]["completions"]] for process in seen[engine]]
    assert longest[0] != longest[1] and max(map(max, longest)) < 40, "the processes should end at different steps"
    assert max(map(abs, alone["sampled"]["moved"])) > 1e-3, "the second batch is from a policy that has moved"


@pytest.mark.parametrize("run", ["knapsack", "knapsack lora"])
@pytest.mark.parametrize("engine", USABLE)
def test_unequal_groups_on_every_engine(engine: str, run: str, seen: dict[str, Any]) -> None:
    """All processes hold the same ledger, and the groups of the second batch lie on both."""
    first, second = (process[run] for process in seen[engine])
    assert_engine(engine, first)
    assert first["ledger"] == second["ledger"] and first["prompts"] == second["prompts"]
    prompts = first["prompts"]
    counts = {prompt: prompts.count(prompt) for prompt in prompts}
    assert len(prompts) == 32 and len(counts) == 8 and len(set(counts.values())) > 1
    assert set(prompts[:16]) & set(prompts[16:])
    assert first["moved"] == second["moved"] and max(map(abs, first["moved"])) > 1e-4


LEARNING = [(engine, method) for engine in USABLE for method in ("gradient", "hypervolume", "lora")]


@pytest.mark.parametrize(("engine", "method"), [*LEARNING, ("ddp", "wide")])
def test_weights_learn_the_same_on_every_engine(engine: str, method: str, seen: dict[str, Any]) -> None:
    """The rewards' gradients are summed over processes, and the factor reaches the engine's optimizer."""
    (alone,), both = seen["alone"], seen[engine]
    expected = alone[method]
    for process in both:
        assert_engine(engine, process[method])
        assert process[method]["learned"] == both[0][method]["learned"]
        assert len(process[method]["learned"]) == len(expected["learned"]) == 2
        for mine, theirs in zip(process[method]["learned"], expected["learned"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        way = max(map(abs, expected["moved"]))
        apart = max(abs(a - b) for a, b in zip(process[method]["moved"], expected["moved"], strict=True))
        assert way > 1e-3 and apart < 1e-4 * way
    first, second = (step["weight/even"] for step in expected["learned"])
    if method != "hypervolume":
        assert first != second
        gram, same = (torch.tensor(one["tables"]["gradient/gram"]) for one in (both[0][method], expected))
        torch.testing.assert_close(gram, same, rtol=1e-4, atol=1e-4 * same.abs().max().item())
    else:
        assert [step["hypervolume/factor"] == 1.0 for step in expected["learned"]] == [True, False]


@pytest.mark.parametrize("engine", [engine for engine in USABLE if engine != "ddp"])
def test_wide_probes_are_refused_under_deepspeed(engine: str, seen: dict[str, Any]) -> None:
    """It would take their backward passes for training's."""
    for process in seen[engine]:
        assert "`weighting.probe: trainable` needs backward passes of its own" in process["wide"]["refused"]
