"""The rollouts of a generation cycle, kept in checkpoints: several optimizer steps train on them.

TRL drops them on resume and generates anew, so that a resumed run is another one. Each process keeps its own.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlbal.trainers.microbatch import MicroBatch

Parts = list[list[MicroBatch]]  # for each micro-batch of a generation batch, what is trained on in its place


def cycle_file(folder: Path, process_index: int) -> Path:
    """Where a process keeps its rollouts."""
    return folder / f"rollouts_{process_index}.safetensors"


def save_cycle(parts: Parts, path: Path) -> None:
    """Write buffered micro-batches as `<micro-batch>.<part>.<key>`."""
    tensors = {
        f"{index}.{number}.{key}": tensor.detach().cpu().clone().contiguous()  # parts may share memory
        for index, some in enumerate(parts)
        for number, part in enumerate(some)
        for key, tensor in part.items()
        if tensor is not None
    }
    save_file(tensors, path)


def load_cycle(path: Path, micro_batches: int, device: torch.device) -> Parts:
    """Read what `save_cycle` wrote for so many micro-batches."""
    parts: list[dict[int, dict[str, Any]]] = [{} for _ in range(micro_batches)]
    for name, tensor in load_file(path).items():
        index, number, key = name.split(".", maxsplit=2)
        parts[int(index)].setdefault(int(number), {})[key] = tensor.to(device)
    return [[some[number] for number in sorted(some)] for some in parts]
