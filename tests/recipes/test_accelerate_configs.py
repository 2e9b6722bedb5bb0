"""The shipped accelerate configurations: each is one that accelerate reads, and starts what its name says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))}


def load(name):
    return load_config_from_file(str(CONFIGS[name]))


def test_the_promised_configurations_are_there():
    zero = {"zero1", "zero2", "zero3", "zero3_offload", "zero3_multinode"}
    assert set(CONFIGS) == {"cpu", "cpu_2proc", "multi_gpu", "fsdp2"} | zero


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it_and_its_header_launches_it(name):
    config = load(name)
    assert config.use_cpu == name.startswith("cpu")
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")
    comments = [line for line in CONFIGS[name].read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"--config_file accelerate_configs/{name}.yaml" in line for line in comments)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("zero")])
def test_deepspeed_takes_the_trainers_accumulation_and_clipping(name):
    """Any fixed value would contradict, or silently replace, what the recipe says."""
    config = load(name)
    deepspeed = config.deepspeed_config
    assert config.distributed_type == "DEEPSPEED"
    assert deepspeed["zero_stage"] == int(name[len("zero")])
    assert deepspeed["gradient_accumulation_steps"] == "auto"
    assert deepspeed["gradient_clipping"] == "auto"
    offload = "cpu" if name.endswith("offload") else "none"
    assert deepspeed["offload_optimizer_device"] == deepspeed["offload_param_device"] == offload


def test_process_and_machine_counts():
    counts = {name: (load(name).num_machines, load(name).num_processes) for name in CONFIGS}
    assert counts["cpu"] == (1, 1)
    assert counts["cpu_2proc"] == (1, 2)
    assert counts["zero3_multinode"] == (2, 16)


REPORT = """
import sys, torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
total = accelerator.reduce(torch.tensor(accelerator.process_index + 1))
open(f"{sys.argv[1]}/{accelerator.process_index}", "w").write(f"{accelerator.num_processes} {int(total)}")
accelerator.end_training()  # a process that exits with a live gloo group may abort
"""


# 1 + 2 = 3: the two processes exchanged numbers, so they are one group and not two runs of one process each.
@pytest.mark.distributed
@pytest.mark.parametrize(("name", "expected"), [("cpu", {"0": "1 1"}), ("cpu_2proc", {"0": "2 3", "1": "2 3"})])
def test_cpu_configurations_start_their_processes_in_one_group(name, expected, tmp_path):
    script, results = tmp_path / "report.py", tmp_path / "results"
    script.write_text(REPORT)
    results.mkdir()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[name])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(script), str(results)], check=True, timeout=300, env=environment)
    assert {path.name: path.read_text() for path in results.iterdir()} == expected
