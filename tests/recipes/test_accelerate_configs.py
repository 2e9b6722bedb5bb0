"""The shipped accelerate configurations: each is one that accelerate reads, and starts what its name says."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.run import config_from_args

from tests.e2e.engines_fork import what_would_start

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


WORDS = ["--main_process_port", "0", "script.py"]
SEVERAL_PROCESSES = [name for name in CONFIGS if name != "cpu"]


@pytest.mark.parametrize("name", SEVERAL_PROCESSES)
def test_what_torch_is_told_to_start(name):
    arguments, _ = what_would_start(["--config_file", str(CONFIGS[name]), *WORDS])
    config, found = load(name), config_from_args(arguments)[0]
    assert found.min_nodes == found.max_nodes == config.num_machines
    assert found.nproc_per_node == config.num_processes // config.num_machines


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("zero")])
def test_what_arrives_in_deepspeed_s_configuration(name, monkeypatch):
    _, environment = what_would_start(["--config_file", str(CONFIGS[name]), *WORDS])
    for key in environment.keys() - os.environ.keys():
        monkeypatch.setenv(key, environment[key])
    config = DeepSpeedPlugin().deepspeed_config
    zero, stage = config["zero_optimization"], int(name[len("zero")])
    assert (zero["stage"], zero["stage3_gather_16bit_weights_on_model_save"]) == (stage, stage == 3)
    device = "cpu" if name.endswith("offload") else "none"
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == device
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"


def test_what_arrives_in_fsdp_s_configuration(monkeypatch):
    _, environment = what_would_start(["--config_file", str(CONFIGS["fsdp2"]), *WORDS])
    for key in environment.keys() - os.environ.keys():
        monkeypatch.setenv(key, environment[key])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("machines", [2, 3])
def test_the_slurm_script_starts_one_launcher_per_machine(machines, tmp_path):
    """Run by bash with stand-ins for Slurm; what it says to accelerate is read by accelerate."""
    for name, text in SLURM.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "accelerate_configs").symlink_to(ROOT / "accelerate_configs")
    environment = {"SLURM_NNODES": str(machines), "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "gpu[1-9]"}
    environment["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    command = ["bash", str(SCRIPT), "seed=3", "data.system=two words"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    for rank in range(machines):
        said = (tmp_path / f"said.{rank}").read_text().split("\0")[:-1]
        assert said[0] == "launch" and said[-2:] == ["seed=3", "data.system=two words"]
        arguments, environment = what_would_start(said[1:-2])
        found = config_from_args(arguments)[0]
        assert (found.min_nodes, found.max_nodes, found.nproc_per_node) == (machines, machines, 8)
        assert (found.rdzv_backend, found.rdzv_endpoint) == ("static", "gpu1:24567")
        assert found.rdzv_configs["rank"] == rank
        assert arguments.module and arguments.training_script == "rlbal.train"
        assert (ROOT / arguments.training_script_args[0]).is_file()
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"


SCRIPT = ROOT / "recipes/qwen2.5-7b/grpo_math_2nodes.sbatch"
SLURM = {
    ".venv/bin/activate": "",
    "bin/scontrol": "#!/bin/bash\n[ \"$*\" = 'show hostnames gpu[1-9]' ] && printf 'gpu1\\ngpu2\\n'\n",
    "bin/srun": '#!/bin/bash\nshift\nfor node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@"; done\n',
    "bin/accelerate": "#!/bin/bash\nprintf '%s\\0' \"$@\" > said.$SLURM_NODEID\n",
}

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
