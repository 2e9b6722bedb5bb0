"""What a process sends to the others, and on whose behalf: every collective operation that Python starts is noted.

Not seen: what C++ starts by itself, which is the reduction of gradients under DDP (the parameters' bytes, once a step).
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.distributed import ProcessGroup

# Methods of a process group, below torch.distributed's functions; in each, what is sent is found in this argument.
SENT = {
    "allreduce": 0,
    "allreduce_coalesced": 0,
    "reduce": 0,
    "broadcast": 0,
    "send": 0,
    "allgather": 1,
    "_allgather_base": 1,
    "allgather_coalesced": 1,
    "allgather_into_tensor_coalesced": 1,
    "gather": 1,
    "scatter": 1,
    "reduce_scatter": 1,
    "_reduce_scatter_base": 1,
    "alltoall": 1,
    "alltoall_base": 1,
}
WANTING = ("rlbal", "trl", "transformers")  # the others are ways of sending, or engines
OWNERS = (*WANTING, "deepspeed", "accelerate", "torch")
AS_OBJECT = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list")


@dataclass(frozen=True)
class Exchange:
    """One collective operation: `sent` bytes from this process, asked for in `function` of the library `owner`."""

    owner: str
    function: str
    operation: str
    sent: int
    pickled: bool  # Python objects, such as text, rather than a tensor of numbers


@contextmanager
def noting(exchanges: list[Exchange]) -> Iterator[None]:
    """Add every exchange inside the block to `exchanges`."""
    before = {name: getattr(ProcessGroup, name) for name in SENT if hasattr(ProcessGroup, name)}
    for name, method in before.items():
        setattr(ProcessGroup, name, _noted(name, method, exchanges))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(ProcessGroup, name, method)


def _noted(name: str, method: Callable[..., Any], exchanges: list[Exchange]) -> Callable[..., Any]:
    def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        sent = bytes_in(args[SENT[name]]) if len(args) > SENT[name] else 0
        exchanges.append(Exchange(*asked_by(sys._getframe(1)), name, sent, _pickled(sys._getframe(1))))
        return method(group, *args, **kwargs)

    return call


def bytes_in(value: Any) -> int:
    """Bytes of a tensor, or of lists of them."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_in, value)) if isinstance(value, list | tuple) else 0


def asked_by(frame: FrameType | None) -> tuple[str, str]:
    """The library and function that wanted an exchange: the innermost one of `WANTING`, else of any."""
    stack: list[tuple[str, str]] = []
    while frame is not None:
        stack.append((library(frame.f_code.co_filename), frame.f_code.co_name))
        frame = frame.f_back
    wanting = [one for one in stack if one[0] in WANTING] or [one for one in stack if one[0]] or [("", "")]
    return wanting[0]


def library(file: str) -> str:
    """The library a source file belongs to, as far as it is among `OWNERS`."""
    parts = file.split("/")
    return next((part for part in reversed(parts[:-1]) if part in OWNERS), "")


def _pickled(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in AS_OBJECT:
            return True
        frame = frame.f_back
    return False


def by_function(exchanges: list[Exchange]) -> dict[str, dict[str, int]]:
    """Calls and bytes of each owner and function."""
    calls, sent = Counter[str](), Counter[str]()
    for one in exchanges:
        key = f"{one.owner}.{one.function}"
        calls[key] += 1
        sent[key] += one.sent
    return {key: {"calls": calls[key], "bytes": sent[key]} for key in sorted(sent)}
