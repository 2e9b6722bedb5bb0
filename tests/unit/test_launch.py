"""`rlbal train --accelerate X`: the `accelerate launch` line that it stands for."""

import sys
from pathlib import Path

import pytest

from rlbal.errors import RecipeError
from rlbal.launch import accelerate_config, launch, launch_command, read_accelerate_config
from rlbal.shipped import shipped_dir
from tests.small_recipe import SMALL

CONFIGS = shipped_dir("accelerate_configs")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL + "launch:\n  num_processes: 8\n  accelerate: zero3\n")
    return path


def test_the_command_line(recipe):
    assert launch_command(recipe, ["seed=3"], ["--overwrite"], "cpu_2proc", 2) == [
        *[sys.executable, "-m", "rlbal.launcher"],
        *["--config_file", str(CONFIGS / "cpu_2proc.yaml"), "--num_processes", "2"],
        *["-m", "rlbal.train", str(recipe), "seed=3", "launch.num_processes=2", "--overwrite"],
    ]


def test_what_is_not_given_comes_from_the_recipe_with_its_overrides(recipe):
    command = launch_command(recipe, ["launch.accelerate=zero2"], [], None, 4)
    assert command[command.index("--config_file") + 1] == str(CONFIGS / "zero2.yaml")
    assert command[command.index("--num_processes") + 1] == "4"
    command = launch_command(recipe, [], [], "fsdp2", None)
    assert command[command.index("--num_processes") + 1] == "8" and "launch.num_processes=8" in command


def test_a_configuration_is_a_name_or_a_path(tmp_path):
    assert accelerate_config("zero1") == CONFIGS / "zero1.yaml"
    own = tmp_path / "own.yaml"
    own.touch()
    assert accelerate_config(str(own)) == own


def test_an_unknown_configuration_names_the_nearest():
    with pytest.raises(RecipeError) as caught:
        accelerate_config("zero33")
    assert str(caught.value) == "no accelerate configuration `zero33`. Did you mean `zero3`?"


def test_a_number_of_processes_alone_is_not_enough(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL)
    with pytest.raises(RecipeError) as caught:
        launch_command(path, [], [], None, 2)
    assert str(caught.value) == (
        "--num-processes needs an accelerate configuration\n"
        "Fix: give --accelerate X (a file of accelerate_configs/), or set `launch.accelerate`"
    )


def test_several_machines_are_not_launched_from_one(recipe):
    with pytest.raises(RecipeError) as caught:
        launch_command(recipe, [], [], "zero3_multinode", 16)
    assert str(caught.value).startswith(
        "`zero3_multinode` is for several machines, and this one would wait for the others\nFix: "
    )


def test_deepspeed_has_to_be_installed(recipe, monkeypatch):
    monkeypatch.setattr("rlbal.launch.find_spec", lambda name: None)
    with pytest.raises(RecipeError) as caught:
        launch_command(recipe, [], [], "zero2", 2)
    assert str(caught.value) == (
        "`zero2` needs DeepSpeed, which is not installed\n"
        "Fix: install the extra `deepspeed`, as in `pip install -e .[deepspeed]`"
    )
    launch_command(recipe, [], [], "multi_gpu", 2)


@pytest.mark.parametrize(
    ("text", "what"), [("a: [", "is not YAML"), ("", "is not an accelerate"), ("- a", "is not an")]
)
def test_a_file_that_is_no_configuration(text, what, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=what):
        read_accelerate_config(path)


def test_a_bad_recipe_is_refused_before_anything_is_launched():
    with pytest.raises(RecipeError, match=r"no recipe at nowhere\.yaml"):
        launch(Path("nowhere.yaml"), [], [], "cpu", 1)


def test_the_exit_status_is_the_launched_programs(recipe, monkeypatch):
    monkeypatch.setattr("rlbal.launch.launch_command", lambda *args: [sys.executable, "-c", "raise SystemExit(7)"])
    assert launch(recipe, [], [], None, None) == 7
