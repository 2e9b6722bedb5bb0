"""Recipes and accelerate configurations are found from a clone and from an installed wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rlbal.shipped import shipped_dir

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["recipes", "accelerate_configs"]


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_clone_it_is_the_folder_beside_the_package(kind):
    assert shipped_dir(kind) == ROOT / kind
    assert list(shipped_dir(kind).glob("**/*.yaml"))


def test_a_wheel_carries_every_file(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=300)
    (wheel,) = tmp_path.glob("rlbal-*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    for kind in KINDS:
        program = f"from rlbal.shipped import shipped_dir; print(shipped_dir({kind!r}))"
        # From the extracted folder, `-c` imports the extracted package and not the clone's.
        found = subprocess.run(
            [sys.executable, "-c", program], cwd=installed, check=True, timeout=300, capture_output=True, text=True
        ).stdout.strip()
        assert Path(found) == installed / "rlbal" / "_shipped" / kind
        for source in (ROOT / kind).glob("**/*.yaml"):
            assert (Path(found) / source.relative_to(ROOT / kind)).read_bytes() == source.read_bytes()
    assert (installed / "reward_fns" / "__init__.py").is_file()
