"""Signs of life that the processes of one job leave for each other.

A collective operation that fails only says that some other process is gone or late. So every process writes down once
a second, in the store through which the job came together, where its main thread is; and, if it ends with an error,
its last words. Whoever is left can then name the process that brought the job down, and what it was doing.
"""

import hashlib
import json
import os
import socket
import sys
import sysconfig
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

INTERVAL = 1.0  # seconds between two signs
PATIENCE = 5.0  # seconds without a new sign after which a process is called silent
NAMED = 3  # processes that a message names one by one

# Files in which a process waits for the others; backward is among them, since gradients are reduced from inside it.
WAITING_IN = ("torch/distributed/", "deepspeed/comm/", "torch/autograd/graph.py")
LIBRARIES = (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, "<frozen")


@dataclass(frozen=True)
class Sign:
    """What a process says of itself: `beat` counts its signs, `seconds` is how long it has been at `place`.

    `machine` is the same for processes that see each other's `pid`. `words` are the error that ended it; they stay
    empty if it only saw another one fail, which `victim` tells.
    """

    rank: int
    host: str
    machine: str
    pid: int
    beat: int = 0
    place: str = "at its start"
    waiting: bool = False
    seconds: float = 0.0
    words: str = ""
    victim: bool = False


class Peers:
    """This process among those of its job.

    Args:
        store: a `torch.distributed.Store` that all of them reach.
        rank, world: this process's number, and how many there are.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self._lock = threading.Lock()
        self._sign = Sign(rank, socket.gethostname(), machine(), os.getpid())
        self._arrived = time.monotonic()  # at its present place
        self.leave()

    def leave(self, **changes: Any) -> Sign:
        """Leave a sign, with some of its fields changed.

        Raises:
            RuntimeError: the store does not answer.
        """
        with self._lock:
            self._sign = replace(self._sign, beat=self._sign.beat + 1, **changes)
            self.store.set(self._key(self.rank), json.dumps(asdict(self._sign)))
            return self._sign

    def look_around(self, thread: int) -> Sign:
        """Leave a sign of where a thread of this process is."""
        frame = sys._current_frames().get(thread)
        place, waiting = ("at its end", False) if frame is None else whereabouts(frame)
        now = time.monotonic()
        if place != self._sign.place:
            self._arrived = now
        return self.leave(place=place, waiting=waiting, seconds=now - self._arrived)

    def others(self) -> dict[int, Sign | None]:
        """The latest sign of every other process; None from one that never came."""
        ranks = [rank for rank in range(self.world) if rank != self.rank]
        keys = [self._key(rank) for rank in ranks]
        if self.store.check(keys):
            found: list[bytes | None] = self.store.multi_get(keys)
        else:
            found = [self.store.get(key) if self.store.check([key]) else None for key in keys]
        return {rank: Sign(**json.loads(said)) if said else None for rank, said in zip(ranks, found, strict=True)}

    def first_to_say(self, text: str) -> bool:
        """Whether no other process of the job has asked this of the same text before."""
        digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
        return bool(self.store.add(f"rlbal/said/{digest}", 1) == 1)

    def find_cause(self, patience: float = PATIENCE, ends_only: bool = False) -> str:
        """Which other process brought the job down, and how; empty if that does not show.

        Last words, death and a stop show at once; silence, or being elsewhere, only after `patience` seconds.
        `ends_only` leaves out the latter, for a process that has not waited for the others.
        """
        first, deadline = self.others(), time.monotonic() + patience
        while True:
            now = self.others()
            said = [f"process {sign.rank} ended with an error:\n{sign.words}" for sign in signs(now) if sign.words]
            ended = said or [text for sign in signs(now) if (text := self._local_end(sign))]
            if ended:
                return several(ended)
            if time.monotonic() > deadline:
                break
            time.sleep(min(INTERVAL, patience) / 2)
        if ends_only:
            return ""
        absent = [f"process {rank} never joined the others" for rank, sign in now.items() if sign is None]
        silent = [silence(sign) for sign in signs(now) if not sign.victim and sign == first[sign.rank]]
        return several(absent + silent) or elsewhere([sign for sign in signs(now) if not sign.victim])

    def _local_end(self, sign: Sign) -> str:
        """What the operating system says of a process of this machine that is no longer running."""
        if sign.machine != self._sign.machine or sign.victim:
            return ""
        import psutil  # type: ignore[import-untyped]  # accelerate brings it

        try:
            state = psutil.Process(sign.pid).status()
        except psutil.NoSuchProcess:
            state = psutil.STATUS_DEAD
        name, seen = f"process {sign.rank} (pid {sign.pid} on {sign.host})", f"last seen {sign.place}"
        if state in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE):
            return f"{name} died without a word: killed, out of memory, or crashed; {seen}"
        if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return f"{name} is stopped (SIGSTOP, Ctrl-Z or a debugger); {seen}"
        return ""

    @staticmethod
    def _key(rank: int) -> str:
        return f"rlbal/sign/{rank}"


def machine() -> str:
    """What only processes with the same process numbers have in common; host names may repeat."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return socket.gethostname()


def signs(found: dict[int, Sign | None]) -> list[Sign]:
    """Those that there are."""
    return [sign for sign in found.values() if sign is not None]


def silence(sign: Sign) -> str:
    """Of a process that leaves no signs any more; why cannot be seen from here."""
    return (
        f"process {sign.rank} (pid {sign.pid} on {sign.host}) gives no sign of life: killed, stopped, cut off, or kept "
        f"in a call that holds the Python interpreter; last seen {sign.place}"
    )


def elsewhere(others: list[Sign]) -> str:
    """Of living processes that are not where the others wait for them; the rarest place first, as the likeliest."""
    busy = [sign for sign in others if not sign.waiting]
    crowd = Counter(sign.place for sign in busy)
    busy.sort(key=lambda sign: (crowd[sign.place], sign.rank))
    return several(
        [f"process {sign.rank} did not come: for {sign.seconds:.0f} s it has been {sign.place}" for sign in busy]
    )


def several(texts: list[str]) -> str:
    """The first few, and how many more."""
    more = [f"and {len(texts) - NAMED} more processes"] if len(texts) > NAMED else []
    return "\n".join([*texts[:NAMED], *more])


def whereabouts(frame: FrameType) -> tuple[str, bool]:
    """The innermost call outside libraries, in words, and whether it waits for other processes."""
    frames: list[FrameType] = []
    inner: FrameType | None = frame
    while inner is not None:
        frames.append(inner)
        inner = inner.f_back
    files = [one.f_code.co_filename for one in frames]
    own = next((one for one, file in zip(frames, files, strict=True) if not file.startswith(LIBRARIES)), frame)
    file = own.f_code.co_filename
    here = os.getcwd() + os.sep
    place = f"in `{own.f_code.co_qualname}` ({file.removeprefix(here)}, line {own.f_lineno})"
    return place, any(part in file for file in files for part in WAITING_IN)
