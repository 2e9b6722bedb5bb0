"""`rlbal recipes`: what ships, one recipe resolved, and the schema that editors check recipes with."""

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from rlbal.recipe import Recipe, read_recipe
from rlbal.shipped import shipped_dir


def header(path: Path) -> str:
    """The first comment line of a recipe that is meant for people, or an empty string."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").strip()
        if text and not text.startswith("yaml-language-server:"):
            return text
    return ""


def list_recipes() -> None:
    """Print shipped recipes by the names that every command takes, with what each is for; reads no more than that."""
    folder = shipped_dir("recipes")
    table = Table("recipe", "what for", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for path in sorted(folder.glob("**/*.yaml")):
        table.add_row(path.relative_to(folder.parent).as_posix(), header(path))
    Console(highlight=False).print(table)


def show_recipe(name: str, overrides: list[str]) -> None:
    """Print a recipe as it will be used: checked, defaults filled in, and bound to TRL's configuration.

    Raises:
        RecipeError: it does not hold together.
    """
    recipe = read_recipe(name, overrides)
    from rlbal.trainer_args import bind_trainer

    _, plan = bind_trainer(recipe)
    print(f"# {plan.explain()}")
    print(recipe.dump(), end="")


def schema_json() -> str:
    """JSON schema of a recipe, with TRL's fields under `trainer`."""
    from rlbal.trainer_section import trainer_model

    schema = Recipe.model_json_schema()
    trainer = trainer_model().model_json_schema()
    schema["$defs"] |= trainer.pop("$defs", {})
    schema["properties"]["trainer"] |= trainer
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
