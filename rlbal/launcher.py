"""`accelerate launch`, ending with a line about the process that failed first instead of the launcher's own traceback.

python -m rlbal.launcher --config_file CONFIG [accelerate's options] -m rlbal.train RECIPE
"""

import signal
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run accelerate's launcher; its exit status, or 1 after a process failed."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        print(ending(rank, failure.pid, failure.exitcode), file=sys.stderr)
        return 1
    return 0


def ending(rank: int, pid: int, exit_code: int) -> str:
    """How a process ended; a negative exit code is a signal's number."""
    if exit_code >= 0:
        how = f"with exit status {exit_code}"
    else:
        how = f"by signal {-exit_code} ({signal.strsignal(-exit_code)})"
        if -exit_code == signal.SIGKILL:
            how += ", as from `kill -9` or from a machine that is out of memory"
    return f"process {rank} (pid {pid}) ended first, {how}"


if __name__ == "__main__":
    sys.exit(main())
