"""Several processes as one job: it ends within `trainer.ddp_timeout`, with a message that says which one ended it.

`join` comes before accelerate sets up its process group. On CPUs it makes the group itself, because the Trainer passes
`ddp_timeout` on for GPUs only; on both it makes the same time hold for the groups that DeepSpeed adds.
`explain` turns the error of a failed collective operation into one about the process that caused it.
"""

import atexit
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from rlbal.errors import RlbalError, RunError
from rlbal.peers import INTERVAL, PATIENCE, Peers

# gloo's and NCCL's words, and those of the store, when other processes are the trouble.
COLLECTIVE = re.compile(r"gloo|nccl|closed by peer|connection reset|broken pipe|timed out|timeout", re.IGNORECASE)
STORE_SECONDS = 10.0
CANNOT_GO_ON = "training cannot go on"
NOTICE_AT = 0.9  # of the timeout


class Terminated(BaseException):
    """SIGTERM: what a launcher sends to the others when one process has ended."""


class _Job:
    """What `join` has set up in this process: nothing, with a single one."""

    peers: Peers | None = None
    timeout: float = 0.0
    ending: bool = False


def join(trainer: dict[str, Any]) -> None:
    """Join the other processes of the job, if there are any.

    Args:
        trainer: the recipe's `trainer:` section with defaults; `ddp_timeout` (seconds), `ddp_backend` and `use_cpu`
            count here.

    Raises:
        RunError: they did not come together in time.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "MASTER_ADDR" not in os.environ:
        return
    import torch
    from torch import distributed

    on_cpu = trainer["use_cpu"] or not torch.accelerator.is_available()
    _Job.timeout = float(trainer["ddp_timeout"])
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    _limit_new_groups(_Job.timeout)
    if on_cpu:
        _without_shared_memory()
    try:
        _Job.peers = Peers(_store(rank, world), rank, world)
        if on_cpu and trainer["ddp_backend"] in (None, "gloo") and not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=timedelta(seconds=_Job.timeout))
    except RuntimeError as error:
        cause = _look(_Job.peers) if _Job.peers is not None else ""
        raise RunError(f"the {world} processes did not come together", cause or first_line(error)) from None
    _watch(_Job.peers, native=not on_cpu)


def _terminate(number: int, frame: FrameType | None) -> None:
    if not _Job.ending:
        raise Terminated


def _limit_new_groups(seconds: float) -> None:
    """Make `seconds` torch's default: DeepSpeed copies the group of all processes without its timeout."""
    from torch.distributed import distributed_c10d

    limit = timedelta(seconds=seconds)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit


def _without_shared_memory() -> None:
    """Keep DeepSpeed from its shared-memory collectives: they wait without limit, and take a minute to compile."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _store(rank: int, world: int) -> Any:
    """A connection of its own to the store of the job; torch's waits under a lock while the group is made."""
    from torch.distributed import TCPStore

    launcher_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not launcher_has_it,
        timeout=timedelta(seconds=max(_Job.timeout, STORE_SECONDS)),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _watch(peers: Peers, native: bool) -> Callable[[], None]:
    """Leave signs from a thread, until the process ends or what is returned is called.

    With `native`, collectives are not gloo's, and it is not Python that finds out that one takes too long: torch ends
    the process. So shortly before that, the thread says where the processes are.
    """
    main = threading.main_thread().ident
    assert main is not None

    ended = threading.Event()

    def leave_signs() -> None:
        noticed = False
        while not ended.wait(INTERVAL):
            try:
                sign = peers.look_around(main)
                noticed = noticed and sign.seconds > INTERVAL  # at another place, it may be noticed again
                if native and not noticed and sign.seconds > NOTICE_AT * _Job.timeout:
                    noticed = True
                    if (cause := peers.find_cause()) and peers.first_to_say(cause):
                        where = f"process {peers.rank} has been {sign.place} for {sign.seconds:.0f} s"
                        print(f"note: {where}; `trainer.ddp_timeout` is {_Job.timeout:g}\n{cause}", file=sys.stderr)
            except RuntimeError:
                return  # the store is gone, and with it whoever would read

    def end() -> None:
        ended.set()
        thread.join(STORE_SECONDS)

    thread = threading.Thread(target=leave_signs, name="rlbal-signs", daemon=True)
    thread.start()
    atexit.register(end)  # a thread that is inside the store when the interpreter goes away aborts the process
    return end


def explain(error: BaseException) -> BaseException:
    """What really happened, if `error` is only what this process saw of another one's end; else `error` itself.

    An error of its own is left for the others to find.
    """
    peers, _Job.ending = _Job.peers, True
    terminated = isinstance(error, Terminated)
    if peers is None:
        return RunError("terminated") if terminated else error
    # A timeout of a request or a connection of this process's own is an OSError or the like.
    noticed = isinstance(error, RuntimeError) and COLLECTIVE.search(f"{type(error).__name__} {error}") is not None
    own = not noticed and not terminated
    words = str(error) if isinstance(error, RlbalError) else f"{type(error).__name__}: {error}"
    try:
        peers.leave(words=words) if own else peers.leave(victim=True)
    except RuntimeError:
        own = True  # the store is gone: there is nothing to be found
    if own:
        _tell_launcher(words)
        return error
    found = _explanation(error, peers)
    _tell_launcher(str(found))
    return found


def _explanation(error: BaseException, peers: Peers) -> RunError:
    """What the other processes have to do with `error`."""
    terminated = isinstance(error, Terminated)
    cause = _look(peers, ends_only=terminated)
    if terminated and not cause:
        return RunError("terminated (SIGTERM)", fix="continue from the newest checkpoint with --resume")
    cause = cause or "every process waits for another one: a connection broke, or they call different operations"
    saw = "the launcher's SIGTERM" if terminated else first_line(error)
    return RunError(
        f"{CANNOT_GO_ON}: {cause}",
        f"the {peers.world} processes work in step, and wait for each other for at most `trainer.ddp_timeout` "
        f"({_Job.timeout:g} s). Process {peers.rank} saw: {saw}",
        "see to that process, then continue from the newest checkpoint with --resume",
    )


def _look(peers: Peers, ends_only: bool = False) -> str:
    """`Peers.find_cause`, also where the process that keeps the store is the one that is stopped."""
    found: list[str] = []

    def look() -> None:
        try:
            found.append(peers.find_cause(ends_only=ends_only))
        except RuntimeError as error:
            found.append(f"the process that brought the others together is gone ({first_line(error)})")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(PATIENCE + STORE_SECONDS)
    return found[0] if found else "the process that brought the others together does not answer"


def _tell_launcher(text: str) -> None:
    """Write down what the launcher's summary is to say of this process, where it reads that."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")


def is_mine_to_say(error: RlbalError) -> bool:
    """Whether this process prints `error`: the first of the job to have it does, and of what others did the first to
    find out, since every process words that differently."""
    first = os.environ.get("RANK", "0") == "0"
    if _Job.peers is None:
        return first
    try:
        return _Job.peers.first_to_say(CANNOT_GO_ON if error.what.startswith(CANNOT_GO_ON) else str(error))
    except RuntimeError:
        return first


def first_line(error: BaseException) -> str:
    """The start of an error of torch's, without the place in its source, its advice and its stack."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).strip()).partition("\n")[0].partition(". ")[0][:300]
