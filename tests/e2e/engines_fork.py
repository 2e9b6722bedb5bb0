"""Processes of an engine, forked from a program that has imported everything: a second each instead of ten.

They are told what `accelerate launch` would tell them for a file of accelerate_configs/.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import launch_command, launch_command_parser

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
# Engine -> its file. `alone` is one process without accelerate.
FILES = {"ddp": "cpu_2proc", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def what_would_start(words: list[str]) -> tuple[Any, dict[str, str]]:
    """What `accelerate launch` hands to torch's launcher: its arguments, and the environment of the processes."""
    arguments: list[Any] = []
    environment: dict[str, str] = {}

    def run(args: Any) -> None:
        arguments.append(args)
        environment.update(os.environ)

    with patch("torch.distributed.run.run", run):
        launch_command(launch_command_parser().parse_args(words))
    return arguments[0], environment


def _let_fsdp_run_on_cpus() -> None:
    """Without this, accelerate takes DDP for it, and says nothing: it knows FSDP on GPUs only."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def _process(rank: int, work: Callable[[int], None], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if environment:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    try:
        if environment.get("ACCELERATE_USE_FSDP") == "true":
            _let_fsdp_run_on_cpus()
        if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
            import deepspeed

            # Compiling it takes a minute, and results are the same without.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        work(rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # nothing is left to be said to the other process


def fork(engine: str, work: Callable[[int], None]) -> None:
    """Call `work(rank)` in the processes of an engine and wait for them: one for `alone`, else two.

    Raises:
        ProcessExitedException: one of them failed; the other is ended.
    """
    world, environment = 1, dict[str, str]()
    if engine != "alone":
        words = ["--config_file", str(CONFIGS / f"{FILES[engine]}.yaml"), "--num_processes", "2"]
        words += ["--mixed_precision", "no", "--main_process_port", "0", "script.py"]
        world, (_, environment) = 2, what_would_start(words)
        environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    torch.multiprocessing.start_processes(_process, args=(work, environment), nprocs=world, start_method="fork")
