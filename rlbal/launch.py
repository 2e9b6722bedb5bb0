"""`rlbal train --accelerate X --num-processes N`: the same recipe under `accelerate launch`."""

import subprocess
import sys
from pathlib import Path

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


def launch_command(
    recipe: Path, overrides: list[str], options: list[str], accelerate: str | None, num_processes: int | None
) -> list[str]:
    """The `accelerate launch` command line; what is not given comes from the recipe's `launch:` section.

    Raises:
        RecipeError: the recipe is bad, or no configuration is named anywhere.
    """
    launch = read_recipe(recipe, overrides).launch
    name = accelerate or launch.accelerate
    if name is None:
        raise RecipeError(
            "--num-processes needs an accelerate configuration",
            fix="give --accelerate X (a file of accelerate_configs/), or set `launch.accelerate`",
        )
    processes = num_processes or launch.num_processes
    return [
        *[sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config(name))],
        *["--num_processes", str(processes), "-m", "rlbal.train", str(recipe)],
        *[*overrides, f"launch.num_processes={processes}", *options],
    ]


def launch(
    recipe: Path, overrides: list[str], options: list[str], accelerate: str | None, num_processes: int | None
) -> int:
    """Run `launch_command` and return its exit status."""
    return subprocess.run(launch_command(recipe, overrides, options, accelerate, num_processes), check=False).returncode
