"""Folders that hold an adapter alone, and the model that it belongs to."""

import json
from pathlib import Path

from rlbal.errors import RlbalError

WARM_START = "warm_start"  # a run's folder with the tiny model as RL found it
CONFIG = "adapter_config.json"


def is_adapter(name_or_path: str | Path) -> bool:
    """Whether this is a folder that holds an adapter without its model."""
    folder = Path(name_or_path)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_base(folder: Path) -> str:
    """The folder or hub id of the model that an adapter belongs to.

    Raises:
        RlbalError: the adapter does not say, or the folder is gone.
    """
    config = folder / CONFIG
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise RlbalError(
            f"{config} does not say which model the adapter belongs to", fix="set its `base_model_name_or_path`"
        )
    beside = folder.parent / WARM_START
    if Path(base).name == WARM_START and beside.is_dir():
        return str(beside)  # also where the run has been moved or copied
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise RlbalError(
            f"the model below the adapter in {folder} is gone: {base}",
            fix=f"bring it back, or write where it is now into `base_model_name_or_path` in {config}",
        )
    return base
