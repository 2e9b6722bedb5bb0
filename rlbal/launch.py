"""`rlbal train --accelerate X --num-processes N`: the same recipe under `accelerate launch`."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from rlbal.errors import RecipeError, nearest
from rlbal.recipe import read_recipe
from rlbal.shipped import shipped_dir


def accelerate_config(name: str) -> Path:
    """A path as it is, or a name among the shipped configurations.

    Raises:
        RecipeError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    folder = shipped_dir("accelerate_configs")
    found = folder / f"{name}.yaml"
    if not found.is_file():
        known = [path.stem for path in folder.glob("*.yaml")]
        raise RecipeError(f"no accelerate configuration `{name}`. {nearest(name, known)}")
    return found


def read_accelerate_config(path: Path) -> dict[str, Any]:
    """What an accelerate configuration says.

    Raises:
        RecipeError: the file is not a YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path} is not YAML", why=str(error)) from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not an accelerate configuration", why="it holds no keys such as `num_processes`")
    return values


def launch_command(
    recipe: Path, overrides: list[str], options: list[str], accelerate: str | None, num_processes: int | None
) -> list[str]:
    """The `accelerate launch` command line; what is not given comes from the recipe's `launch:` section.

    Raises:
        RecipeError: the recipe is bad, no configuration is named anywhere, or it is for several machines or for
            DeepSpeed, which is not installed.
    """
    launch = read_recipe(recipe, overrides).launch
    name = accelerate or launch.accelerate
    if name is None:
        raise RecipeError(
            "--num-processes needs an accelerate configuration",
            fix="give --accelerate X (a file of accelerate_configs/), or set `launch.accelerate`",
        )
    config = accelerate_config(name)
    values = read_accelerate_config(config)
    if values.get("distributed_type") == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise RecipeError(
            f"`{name}` needs DeepSpeed, which is not installed",
            fix="install the extra `deepspeed`, as in `pip install -e .[deepspeed]`",
        )
    if values.get("num_machines", 1) != 1:
        raise RecipeError(
            f"`{name}` is for several machines, and this one would wait for the others",
            fix=f"run `accelerate launch` on each machine, as {config} and the recipe's first lines show",
        )
    processes = num_processes or launch.num_processes
    return [
        *[sys.executable, "-m", "rlbal.launcher", "--config_file", str(config)],
        *["--num_processes", str(processes), "-m", "rlbal.train", str(recipe)],
        *[*overrides, f"launch.num_processes={processes}", *options],
    ]


def launch(
    recipe: Path, overrides: list[str], options: list[str], accelerate: str | None, num_processes: int | None
) -> int:
    """Run `launch_command` and return its exit status."""
    return subprocess.run(launch_command(recipe, overrides, options, accelerate, num_processes), check=False).returncode
