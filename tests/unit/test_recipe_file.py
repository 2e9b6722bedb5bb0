"""Recipe files and overrides: read safely, found from anywhere, written so that they read back equal."""

import pytest

from rlbal.errors import RecipeError
from rlbal.recipe import apply_override, parse_yaml, read_recipe
from tests.small_recipe import SMALL, small


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# YAML


def test_a_number_like_1e_5_arrives_as_a_number_from_file_and_override(write):
    path = write(SMALL + "trainer:\n  learning_rate: 1e-5\n  beta: 2E3\n  epsilon: -.5e-1\n")
    assert read_recipe(path).trainer == {"learning_rate": 1e-5, "beta": 2000.0, "epsilon": -0.05}
    assert read_recipe(path, ["trainer.learning_rate=3e-6"]).trainer["learning_rate"] == 3e-6


def test_text_that_starts_like_a_number_stays_text():
    values = ["12e4567abc", "1e-5 apples", "1e", "2024-01-01", "<<", "="]
    assert parse_yaml("[" + ", ".join(values) + "]") == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "line 2: the key `seed` appears twice\nFix: keep one of them"),
        ("trainer: {a: 1, a: 2}", "line 1: the key `a` appears twice"),
        (
            "prompt: {{question}}",
            "line 1: a key is itself a list or a mapping\nFix: put quotes around text that holds {",
        ),
        ("a: &x [1]\nb: *x\n", "line 2: a recipe may not refer back with `*x`\nFix: write the value out"),
        ("a: [1", "this is not YAML that a recipe may hold\nWhy: "),
        ("a: !!int x", "this is not YAML that a recipe may hold\nWhy: invalid literal for int()"),
        ("a: 0x_", "this is not YAML that a recipe may hold\nWhy: invalid literal for int()"),
        ("a: !!bool 7", "this is not YAML that a recipe may hold\nWhy: "),
        ("a: !!map [1]", "this is not YAML that a recipe may hold\nWhy: "),
        ("[" * 5000, "this YAML is nested too deeply"),
    ],
)
def test_bad_yaml_says_where(text, message):
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/tuple", "!!binary", "!!set", "!own"]
)
def test_tags_that_build_objects_are_refused_and_build_nothing(tag, tmp_path, write):
    made = tmp_path / "made"
    path = write(f"{SMALL}lora: {tag} ['touch {made}']\n")
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}: this is not YAML that a recipe may hold")
    assert "could not determine a constructor for the tag" in str(caught.value)
    assert not made.exists()


# Overrides


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps", "override `trainer.max_steps` is not `key.sub=value`"),
        ("=3", "override `=3` is not `key.sub=value`"),
        ("output_dir.x=3", "override `output_dir.x=3`: `output_dir` is a value, not a section"),
        ("data.task.x.y=3", "override `data.task.x.y=3`: `data.task` is a value, not a section"),
        ("seed=[1", "override `seed=[1`: this is not YAML that a recipe may hold\nWhy: "),
    ],
)
def test_a_bad_override_is_named(override, message):
    with pytest.raises(RecipeError) as caught:
        small(override)
    assert str(caught.value).startswith(message)


def test_overrides_set_make_and_clear():
    values = {"trainer": None, "seed": 1}
    for override in ("trainer.max_steps=3", "a.b.c=[x, 1]", "seed=", "data.prompt=a=b"):
        apply_override(values, override)
    assert values == {
        "trainer": {"max_steps": 3},
        "a": {"b": {"c": ["x", 1]}},
        "seed": None,
        "data": {"prompt": "a=b"},
    }


# Files


def test_a_missing_file_names_the_nearest_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        read_recipe("recipes/qwen2.5-7b/grpo_mth.yaml")
    assert str(caught.value) == (
        "no recipe at recipes/qwen2.5-7b/grpo_mth.yaml\nFix: Did you mean `recipes/qwen2.5-7b/grpo_math.yaml`?"
    )


def test_a_shipped_recipe_is_found_from_any_folder_but_a_local_one_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "recipes/qwen2.5-7b/grpo_math.yaml"
    assert read_recipe(name).output_dir == "runs/qwen2.5-7b-grpo-math"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(SMALL)
    assert read_recipe(name) == small()


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text"])
def test_a_file_that_is_no_mapping(text, write):
    path = write(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, ["seed=1"])
    assert str(caught.value) == f"{path} is not a mapping of sections such as `model:` and `data:`"


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not a text file"):
        read_recipe(path)


def test_errors_name_the_file(write):
    path = write(SMALL + "sed: 1\n")
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert str(caught.value) == f"{path}:\n`sed` is not a key here. Did you mean `seed`?"


def test_the_resolved_dump_reads_back_equal(write):
    recipe = small(
        "trainer.learning_rate=1e-5",
        "trainer.adam_epsilon=1e-22",
        "rewards.functions.correct.range=[-1, 1]",
        "rewards.functions.correct.args={a: '1e-5', b: '2024-01-01', c: 'no', d: 'null', e: 'é: {x}', f: [1, null]}",
        "model.tiny.phrases=['1e5', '<think>', ' = ', '\"#']",
        "data.system='two\n\n  lines: {question}'",
        "lora.r=8",
    )
    path = write(recipe.dump())
    assert read_recipe(path) == recipe
    assert recipe.advantage.baseline == "group" and "baseline: group" in recipe.dump()


@pytest.mark.parametrize("override", ["data.prompt=Q # {question}", "data.system=# be brief", "seed=3 # the third"])
def test_an_override_loses_nothing_to_a_comment(override):
    with pytest.raises(RecipeError, match="would be lost\nWhy: YAML takes what follows ` #` for a comment\nFix: "):
        apply_override({}, override)


def test_a_quoted_override_keeps_its_hash():
    values = {}
    apply_override(values, 'data.prompt="Q # {question}"')
    apply_override(values, "data.system=No#1")
    assert values == {"data": {"prompt": "Q # {question}", "system": "No#1"}}
