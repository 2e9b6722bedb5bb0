"""Where the files beside the code are: in a clone next to the package, in an installed package inside it."""

from pathlib import Path
from typing import Literal


def shipped_dir(kind: Literal["recipes", "accelerate_configs"]) -> Path:
    """Return the folder of shipped recipes or accelerate configurations.

    A wheel carries both inside the package (`force-include` in pyproject.toml); a clone, and an editable install of
    one, has them beside it.
    """
    package = Path(__file__).resolve().parent
    packed = package / "_shipped" / kind
    return packed if packed.is_dir() else package.parent / kind
