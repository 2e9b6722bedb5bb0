"""Taking rights away from a worker process before it meets a completion. Linux only; no part imports anything heavy.

Four independent means, each used where the kernel has it:

- resource limits: memory, processor time, written files, open files, core dumps;
- a network namespace of its own, with no interface in it;
- Landlock: no file created, changed or removed, and no look into other processes (their environment holds secrets);
- seccomp: no new process, program or socket, no signal to anyone.

What stays possible: reading files that the user may read, and using the processor until the time limit.
"""

import ctypes
import math
import os
import platform
import resource
import struct
import time
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
MEBIBYTE = 1024 * 1024
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CLONE_NEWUSER, CLONE_NEWNET, CLONE_THREAD = 0x10000000, 0x40000000, 0x10000


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that started this process ends, and leave at once if that has happened already."""
    _LIBC.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def leave_network() -> bool:
    """Move this (single-threaded) process into an empty network namespace, if the kernel allows it."""
    if _LIBC.unshare(CLONE_NEWNET) == 0:
        return True
    # As root a user namespace would take away the right to read other users' files, such as a mounted home.
    return os.geteuid() != 0 and _LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0


def lock_down(memory_mb: int, network_left: bool) -> list[str]:
    """Take away every right that scoring does not need, for good.

    Args:
        memory_mb: address space, in MiB, beyond what the process holds now.
        network_left: what `leave_network` said.

    Returns:
        What this kernel could not take away: any of `network`, `processes`, `files`.
    """
    limit_memory(memory_mb)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, 64)
    _LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _drop_capabilities()
    files = _landlock()
    processes = _seccomp()
    if not processes:
        _limit(resource.RLIMIT_NPROC, 0)  # counts the user's processes; the kernel never applies it to root
        processes = os.geteuid() != 0
    network = network_left or processes
    return [what for what, done in (("network", network), ("processes", processes), ("files", files)) if not done]


def limit_memory(memory_mb: int) -> None:
    """Allow this process `memory_mb` MiB of address space more than it holds now; a second call can only lower that."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, held + memory_mb * MEBIBYTE)


def limit_processor_time(seconds: float) -> None:
    """Allow this process `seconds` more of processor time, should the parent not be there to stop it by the clock."""
    used = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds) + 1, resource.RLIM_INFINITY))


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _drop_capabilities() -> None:
    """Root without capabilities is an ordinary user who owns root's files."""
    _LIBC.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 0, 0, 0, 0, 0, 0))


def _landlock() -> bool:
    """Forbid every change to the file system, `/dev/null` excepted (man 7 landlock)."""
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    write_file = 1 << 1
    version = _LIBC.syscall(create_ruleset, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = write_file | sum(1 << bit for bit in range(4, 13))  # remove and make, of every kind
    rights |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)  # move between folders, truncate
    ruleset = _LIBC.syscall(create_ruleset, struct.pack("Q", rights), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    null = os.open(os.devnull, os.O_PATH)
    _LIBC.syscall(add_rule, ruleset, 1, struct.pack("=Qi", write_file, null), 0)
    done = _LIBC.syscall(restrict_self, ruleset, 0) == 0
    os.close(null)
    os.close(ruleset)
    return done


# Audit number of the machine, numbers of `seccomp`, `clone` and `prlimit64`, then all that is refused outright:
# socket, fork, vfork, execve, execveat, kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, ptrace,
# process_vm_readv and process_vm_writev.
_MACHINES = {
    "x86_64": (0xC000003E, 317, 56, 302, (41, 57, 58, 59, 322, 62, 200, 234, 129, 297, 101, 310, 311)),
    "aarch64": (0xC00000B7, 277, 220, 261, (198, 221, 281, 129, 130, 131, 138, 240, 117, 270, 271)),
}
_REFUSED_EVERYWHERE = (424, 425, 434, 438)  # pidfd_send_signal, io_uring_setup, pidfd_open, pidfd_getfd
_CLONE3 = 435


def _seccomp() -> bool:
    """Install a filter that refuses new processes, programs, sockets and signals (man 2 seccomp)."""
    if platform.machine() not in _MACHINES:
        return False
    audit, seccomp, clone, prlimit, refused = _MACHINES[platform.machine()]
    allow, refuse, missing = 0x7FFF0000, 0x00050001, 0x00050026  # errno EPERM; ENOSYS, so that libc falls back to clone
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    number, machine, first_argument = 0, 4, 16

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    program = [step(load, machine), step(equal, audit, 1, 0), step(give, refuse), step(load, number)]
    program += [step(at_least, 0x40000000, 0, 1), step(give, refuse)]  # the x32 numbers of x86_64
    for call in (*refused, *_REFUSED_EVERYWHERE):
        program += [step(equal, call, 0, 1), step(give, refuse)]
    program += [step(equal, _CLONE3, 0, 1), step(give, missing)]
    # Threads are fine; so are one's own limits, but not another process's.
    program += [step(equal, clone, 0, 4), step(load, first_argument), step(any_bit, CLONE_THREAD, 0, 1)]
    program += [step(give, allow), step(give, refuse)]
    program += [step(equal, prlimit, 0, 4), step(load, first_argument), step(equal, 0, 0, 1)]
    program += [step(give, allow), step(give, refuse)]
    program += [step(give, allow)]
    code = ctypes.create_string_buffer(b"".join(program))
    set_filter, all_threads = 1, 1
    header = struct.pack("HP", len(program), ctypes.addressof(code))
    return _LIBC.syscall(seccomp, set_filter, all_threads, header) == 0
