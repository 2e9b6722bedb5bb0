"""`rlbal recipes`: the list, and the schema that editors check recipes with."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from rlbal.recipe_list import header, list_recipes, schema_json
from rlbal.shipped import shipped_dir
from tests.small_recipe import SMALL

RECIPES = sorted(shipped_dir("recipes").glob("**/*.yaml"))
SHIPPED_SCHEMA = shipped_dir("recipes") / "recipe.schema.json"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "# yaml-language-server: $schema=../recipe.schema.json\n#\n# GRPO on GSM8K.\n#\n# Source: x\n",
            "GRPO on GSM8K.",
        ),
        ("# First.\n# yaml-language-server: $schema=x\n", "First."),
        ("# yaml-language-server: $schema=x\nseed: 1\n# Later.\n", ""),
        ("seed: 1\n", ""),
        ("", ""),
    ],
)
def test_the_header_is_the_first_comment_for_people(text, expected, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert header(path) == expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_says_what_it_is_for(path):
    assert re.fullmatch(r"[A-Z].{20,}\.", header(path))


def test_the_list_keeps_names_whole_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    list_recipes()
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80
    names = [line.split()[0] for line in lines if line.split() and line.split()[0].startswith("recipes/")]
    assert names == [path.relative_to(shipped_dir("recipes").parent).as_posix() for path in RECIPES]


# The schema


def test_the_shipped_schema_is_up_to_date():
    assert SHIPPED_SCHEMA.read_text(encoding="utf-8") == schema_json(), "run `make schema`"


def test_the_schema_holds_nothing_of_this_machine():
    text = schema_json()
    for here in (Path.cwd(), Path.home(), shipped_dir("recipes").parent, Path(os.path.abspath(os.sep)) / "tmp"):
        assert f'"{here}' not in text and f"{here}/" not in text


def resolve(schema, root):
    return root["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def problems(value, schema, root, path=""):
    """What a JSON schema says against a value, for the keywords that the recipe's schema uses."""
    schema = resolve(schema, root)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            found = [problems(value, option, root, path) for option in schema[key]]
            return [] if [] in found else [one for option in found for one in option]
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return [f"{path}: {value!r} is not among the choices"]
    kind = schema.get("type")
    wrong_bool = isinstance(value, bool) and kind in ("integer", "number")
    if kind is not None and (wrong_bool or not isinstance(value, TYPES[kind])):
        return [f"{path}: {value!r} is no {kind}"]
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        found = [f"{path}: {key} is missing" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            if key in properties:
                found += problems(item, properties[key], root, f"{path}.{key}")
            elif others is False:
                found.append(f"{path}: {key} is unknown")
            elif isinstance(others, dict):
                found += problems(item, others, root, f"{path}.{key}")
        return found
    if isinstance(value, list):
        options = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        return [one for item, option in zip(value, options, strict=True) for one in problems(item, option, root, path)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        too_low = value < schema.get("minimum", value) or value <= schema.get("exclusiveMinimum", value - 1)
        if too_low or value > schema.get("maximum", value):
            return [f"{path}: {value!r} is out of bounds"]
    return []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_satisfy_the_schema_as_an_editor_reads_them(path):
    schema = json.loads(SHIPPED_SCHEMA.read_text(encoding="utf-8"))
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    # The YAML of editors reads 1e-6 as a number; PyYAML alone reads text.
    values["trainer"] = {
        key: float(value) if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?e-?\d+", value) else value
        for key, value in values["trainer"].items()
    }
    assert problems(values, schema, schema) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("seed:", "sed:", ": sed is unknown"),
        ("task: chain_sum", "task: 3", ".data.task: 3 is no string"),
        ("output_dir: runs/small", "seed: 1", ": output_dir is missing"),
        ("tiny: {}", "tiny: {layers: 0}", ".model.tiny.layers: 0 is out of bounds"),
        ("max_steps: 3", "max_step: 3", ".trainer: max_step is unknown"),
        ("max_steps: 3", "num_generations: 8", ".trainer: num_generations is unknown"),
        ("max_steps: 3", "loss_type: x", ".trainer.loss_type: 'x' is not among the choices"),
        ("max_steps: 3", "temperature: 0", ".trainer.temperature: 0 is out of bounds"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(old, new, problem):
    schema = json.loads(schema_json())
    text = SMALL + "seed: 1\ntrainer:\n  max_steps: 3\n"
    assert problems(yaml.safe_load(text), schema, schema) == []
    assert problem in problems(yaml.safe_load(text.replace(old, new)), schema, schema)
