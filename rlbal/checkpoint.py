"""Folders that are there whole or not at all: written aside, sealed, brought to disk and then renamed.

The seal is a list of a folder's files with their sizes, written last. A folder that lacks it, or a file that does not
have its size, was cut off, by a crash or by a copy that ran out of space, and is never taken for a checkpoint.
"""

import json
import os
import shutil
from pathlib import Path

from rlbal.errors import RunError

SEAL = "sealed.json"


def seal(folder: Path) -> None:
    """Write down which files a folder has, and bring all of it to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / SEAL).write_text(json.dumps(sizes, indent=0), encoding="utf-8")
    bring_to_disk(folder)


def bring_to_disk(folder: Path) -> None:
    """Return only when a folder and what is in it would survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def is_sealed(folder: Path) -> bool:
    """Whether a folder has all that it had when it was sealed."""
    try:
        sizes = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def put_in_place(aside: Path, final: Path) -> None:
    """Give a finished folder its name; an older one of that name goes.

    Between the two renames there is neither, for an instant; the checkpoints before it are.
    """
    old = aside.with_name(aside.name + ".old")
    if final.exists():
        final.rename(old)
    aside.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_written(what: str, run: Path, error: Exception) -> RunError:
    """What to say when `what` could not be written to a run's folder."""
    steps = [path.name for path in run.glob("checkpoint-*") if is_sealed(path)]
    newest = max(steps, key=lambda name: int(name.split("-")[1]), default=None)
    try:
        free = f"{shutil.disk_usage(run).free / 2**20:,.0f} MiB are free"
    except OSError:
        free = "the disk does not answer"
    return RunError(
        f"{what} could not be written to {run}",
        why=f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}; {free} there",
        fix=(f"{newest} is whole and kept: " if newest else "")
        + "make room (`trainer.save_total_limit: N` keeps only the newest N checkpoints), "
        + ("then go on with --resume" if newest else "then start again"),
    )
