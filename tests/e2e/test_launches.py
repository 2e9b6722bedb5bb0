"""The quickstart as a user launches it on two processes of a machine without accelerator, by the shipped ZeRO files.

What engines compute is tested in `test_engines.py`; here it is that such a command starts them.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlbal.run import RunDirectory, read_jsonl

ROOT = Path(__file__).parents[2]
ROWS, STEPS = 8, 3  # per process
# Less of everything, the random model that the warm start would begin with, and a reward that it gets now and then.
SHORT = [
    f"trainer.max_steps={STEPS}",
    f"trainer.per_device_train_batch_size={ROWS}",
    "trainer.max_completion_length=16",
    "trainer.save_steps=2",
    "model.tiny.warm_start=",
    "data.size=64",
    "data.eval_size=8",
    "evaluation.at_start=false",
    "rewards.functions.even={function: tests/scripted_rewards.py:even_share, range: [0, 1]}",
]
PPO = ["algorithm={name: ppo, rollouts_per_prompt: 2}", "advantage="]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed"),
    pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without accelerator"),
]


def launch(command: list[str], folder: Path) -> RunDirectory:
    """Run a command that trains; where to."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "compiled")}
    command = [sys.executable, "-m", *command, *SHORT, f"output_dir={folder / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert f"2 processes x {ROWS} rows per device" in done.stderr
    assert "Warning" not in done.stderr
    assert not (folder / "compiled").exists(), "nobody should wait for a compiler"
    return RunDirectory(folder / "run")


def assert_ran(run: RunDirectory, stage: int) -> None:
    """Two processes of this ZeRO stage trained the model in float32."""
    steps = list(read_jsonl(run.metrics_path))
    assert [step["rollouts"] for step in steps] == [2 * ROWS * step for step in range(1, STEPS + 1)]
    for number in (2, STEPS):
        shards = run.path / f"checkpoint-{number}/global_step{number}"
        names = {path.name for path in shards.iterdir()}
        assert {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)} <= names
        assert ("zero_pp_rank_1_mp_rank_00_model_states.pt" in names) == (stage == 3)
        saved = torch.load(shards / "zero_pp_rank_1_mp_rank_00_optim_states.pt", weights_only=False)
        assert saved["optimizer_state_dict"]["zero_stage"] == stage
    model, report = AutoModelForCausalLM.from_pretrained(run.model_path, output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.float32
    before = load_file(run.path / "warm_start/model.safetensors")
    moved = [(tensor - before[name]).abs().max() for name, tensor in model.state_dict().items() if name in before]
    assert len(moved) == len(before) and max(moved) > 1e-4


def test_rlbal_train_with_zero2(tmp_path: Path) -> None:
    command = ["rlbal.cli", "train", "recipes/quickstart.yaml", "--accelerate", "zero2", "--num-processes", "2"]
    run = launch(command, tmp_path)
    assert_ran(run, stage=2)
    assert run.recipe().launch.num_processes == 2


def test_accelerate_launch_with_zero3_and_a_critic(tmp_path: Path) -> None:
    command = ["accelerate.commands.launch", "--config_file", "accelerate_configs/zero3.yaml", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0"]
    run = launch([*command, "-m", "rlbal.train", "recipes/quickstart.yaml", *PPO], tmp_path)
    assert_ran(run, stage=3)
    critic = load_file(run.model_path / "critic/model.safetensors")
    assert critic["head.0.weight"].shape == (96, 96) and critic["head.2.weight"].abs().max() > 1e-5
