"""`rlbal recipes`: what ships, one recipe resolved, and the schema that editors check recipes with."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlbal.recipe import Recipe, read_recipe
from rlbal.shipped import shipped_dir


def header(path: Path) -> str:
    """The first comment line of a recipe."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def list_recipes() -> None:
    """Print shipped recipes with their first comment line; reads no more than that."""
    folder = shipped_dir("recipes")
    table = Table("recipe", "what for", title="Recipes")
    for path in sorted(folder.glob("**/*.yaml")):
        table.add_row(str(path.relative_to(folder.parent)), header(path))
    Console().print(table)


def show_recipe(name: str, overrides: list[str]) -> None:
    """Print a recipe as it will be used: checked, defaults filled in, and bound to TRL's configuration.

    Raises:
        RecipeError: it does not hold together.
    """
    shipped = shipped_dir("recipes") / name
    path = Path(name) if Path(name).is_file() or not shipped.is_file() else shipped
    recipe = read_recipe(path, overrides)
    from rlbal.trainer_args import bind_trainer

    _, plan = bind_trainer(recipe)
    print(f"# {plan.explain()}")
    print(recipe.dump(), end="")


def schema_json() -> str:
    """JSON schema of a recipe, with TRL's fields under `trainer` and peft's under `lora`."""
    from rlbal.trainer_args import trainer_model

    schema = Recipe.model_json_schema()
    trainer = trainer_model().model_json_schema()
    schema.setdefault("$defs", {}).update(trainer.pop("$defs", {}))
    schema["properties"]["trainer"] = trainer
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
