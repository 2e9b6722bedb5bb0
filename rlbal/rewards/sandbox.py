"""A worker process that scores rows and can be killed at any moment.

A worker is a new Python started by exec, never a fork of the trainer (which holds CUDA and process groups). It gets a
scrubbed environment and an empty working directory, and gives up most rights before the first completion
(`rlbal.rewards.isolation`); a sealed one even before it imports the reward. The parent keeps the time, kills a worker
that exceeds it and starts another when the next job comes. Answers are bounded lines of JSON and are checked as hostile
input.
"""

import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, StringConstraints, ValidationError

from rlbal.errors import RewardError
from rlbal.rewards.loading import Signature
from rlbal.rewards.outcomes import Fault, Outcome, outcomes
from rlbal.rewards.worker import LARGEST_ANSWER, MESSAGE_LENGTH

STARTUP_SECONDS = 120.0
FAULTS_OF_WORKERS = ("raised", "died", "nan", "infinite", "wrong_count", "not_a_number")
# Nothing else of the trainer's environment reaches a worker: it holds tokens.
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "TZ")


@dataclass(frozen=True)
class Job:
    """Some rows for one reward.

    Attributes:
        request: JSON: the reward's name, its arguments as lists, their length, the time limit.
        rows: how many.
        timeout: seconds for all of them.
        bounds: lowest and highest score.
        rowwise: one row whose score depends on the request alone.
    """

    request: str
    rows: int
    timeout: float
    bounds: tuple[float, float] | None
    rowwise: bool

    @cached_property
    def key(self) -> bytes:
        """16 bytes that stand for the request, and so for the reward with every argument."""
        return hashlib.blake2b(self.request.encode(), digest_size=16).digest()


class Ready(BaseModel):
    """What a worker says once it has imported its rewards: protections that are missing, and signatures."""

    ready: list[Literal["network", "processes", "files"]]
    signatures: dict[str, tuple[dict[Annotated[str, StringConstraints(pattern=r"^\w{1,200}$")], bool], bool, bool]]


class WorkerLost(Exception):
    """The worker is gone or can no longer be trusted; the reason is a `Fault` reason."""

    def __init__(self, reason: Literal["timeout", "died"], message: str) -> None:
        self.reason: Literal["timeout", "died"] = reason
        super().__init__(message)


class Worker:
    """One worker process, started when first needed and again after each loss, or `once` for each job.

    It belongs to one thread; `close` alone may be called from another.
    """

    def __init__(self, setup: bytes, folder: str, once: bool) -> None:
        self._setup, self._folder, self._once = setup, folder, once
        self._life = threading.RLock()  # guards starting, ending and closing
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self.missing: list[str] = []
        self.signatures: dict[str, Signature] = {}

    def start(self) -> None:
        """Start the process, unless it is running, and wait until it has imported the rewards.

        Raises:
            RewardError: an import failed, or was not done in `STARTUP_SECONDS`; or the worker was closed.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        self._launch()
        try:
            answer = self._exchange(self._setup, STARTUP_SECONDS)
        except WorkerLost as lost:
            self.kill()
            why = f"its imports took over {STARTUP_SECONDS:g} s" if lost.reason == "timeout" else f"it {lost}"
            raise RewardError("a reward worker did not start", why, "try the import in a shell") from None
        try:
            said = Ready.model_validate(answer)
        except ValidationError:
            self.kill()
            why = shown(str(answer.get("error", "it sent something else")))
            raise RewardError("a reward worker did not start", why) from None
        self.missing = list(said.ready)
        self.signatures = {name: Signature(*one) for name, one in said.signatures.items()}

    def _launch(self) -> None:
        with self._life:
            if self._closed:
                raise RewardError("a reward worker did not start", "the rewards are closed")
            self._channel, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "rlbal.rewards.worker", str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    cwd=self._folder,
                    env=worker_environment(self._folder),
                    start_new_session=True,
                )

    def score(self, job: Job) -> list[Outcome]:
        """Score the rows of a job; whatever that does to the worker costs these rows alone.

        Raises:
            RewardError: the worker cannot be started.
        """
        self.start()
        token = secrets.token_hex(8)
        try:
            answer = self._exchange(f"{token} {job.request}\n".encode(), job.timeout, job.rows)
            return _read_answer(answer, token, job)
        except WorkerLost as lost:
            self.kill()
            return [Fault(lost.reason, str(lost))] * job.rows
        finally:
            if self._once:
                self.kill()

    def _exchange(self, line: bytes, seconds: float, rows: int = 1) -> dict[str, Any]:
        """Send a line and read one back within the time limit.

        Raises:
            WorkerLost: no answer in time, no worker any more, or no JSON object.
        """
        assert self._channel is not None
        deadline = time.monotonic() + seconds
        answer = bytearray()
        try:
            self._channel.settimeout(seconds)
            self._channel.sendall(line)
            while not answer.endswith(b"\n"):
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError
                self._channel.settimeout(left)
                if not (piece := self._channel.recv(LARGEST_ANSWER)):
                    raise WorkerLost("died", "ended its worker process")
                answer += piece
                if len(answer) > LARGEST_ANSWER * rows:
                    raise WorkerLost("died", "made its worker send too long an answer")
        except TimeoutError:
            raise WorkerLost("timeout", f"was not done after {seconds:g} s") from None
        except OSError:
            raise WorkerLost("died", "ended its worker process") from None
        try:
            message = json.loads(answer)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise WorkerLost("died", "made its worker send an unreadable answer")
        return message

    def kill(self) -> None:
        """End the process with everything it started."""
        with self._life:
            self._end_process()
            self._process = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def close(self) -> None:
        """End the process for good. The channel stays open: the worker's thread may be reading from it."""
        with self._life:
            self._closed = True
            self._end_process()

    def _end_process(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _read_answer(answer: dict[str, Any], token: str, job: Job) -> list[Outcome]:
    """What a worker said about the rows of a job.

    Raises:
        WorkerLost: it is not an answer to this question; whoever sent it is not to be asked again.
    """
    match answer:
        case {"token": str(said), "outcomes": list(each)} if said == token and len(each) == job.rows:
            return [_read_outcome(one, job.bounds) for one in each]
    raise WorkerLost("died", "made its worker send an unreadable answer")


def _read_outcome(said: Any, bounds: tuple[float, float] | None) -> Outcome:
    match said:
        case [reason, str(message)] if reason in FAULTS_OF_WORKERS:
            return Fault(reason, shown(message[:MESSAGE_LENGTH]))
        case list():
            raise WorkerLost("died", "made its worker send an unreadable answer")
    return outcomes([said], 1, bounds)[0]


def shown(text: str) -> str:
    """Text of a worker made fit for terminals: a completion may have written it."""
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in text)


def worker_environment(folder: str) -> dict[str, str]:
    """The environment of a worker: enough to import the same modules, and no secrets."""
    passed = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**passed, **threads, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HOME": folder, "TMPDIR": folder}
