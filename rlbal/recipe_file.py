"""Reading and writing the YAML of recipes: safely, and so that what is written reads back equal.

A recipe may hold plain data only. Tags that build Python objects are refused, and so are aliases (`*name`), which can
blow a small file up to any size. Dates stay text. `1e-5` is the number that people mean by it.
"""

import re
from typing import Any

import yaml

from rlbal.errors import RecipeError

# The tags of plain data; the others make dates, sets, bytes, merged mappings.
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
# YAML 1.1 wants a dot and a signed exponent in a float; people write 1e-5.
_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789"))


class _Loader(yaml.SafeLoader):
    """Safe YAML of plain data, without duplicate keys and aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise RecipeError(
                f"line {event.start_mark.line + 1}: a recipe may not refer back with `*{event.anchor}`",
                fix="write the value out",
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(
                    f"line {line}: a key is itself a list or a mapping",
                    fix="put quotes around text that holds { or [, such as a prompt template",
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise RecipeError(f"line {line}: the key `{key}` appears twice", fix="keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


_Loader.yaml_constructors = {
    tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _PLAIN
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


def parse_yaml(text: str) -> Any:
    """Parse YAML text safely.

    Raises:
        RecipeError: the text is not YAML, holds a tag or an alias, or repeats a key.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise RecipeError("this YAML is nested too deeply") from None
    # PyYAML's own constructors let plain exceptions through, on `!!bool 7`, `!!int x` or `0x_`.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise RecipeError("this is not YAML that a recipe may hold", why=str(error)) from None


def dump_yaml(values: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in a raw recipe in place; the value is read as YAML.

    Raises:
        RecipeError: no `=`, a value that is not YAML or ends in a comment, or a path through something that is not a
            section.
    """
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"override `{override}` is not `key.sub=value`")
    *parents, last = path.strip().split(".")
    target = values
    for depth, key in enumerate(parents):
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise RecipeError(f"override `{override}`: `{'.'.join(parents[: depth + 1])}` is a value, not a section")
    try:
        target[last] = parse_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"override `{override}`: {error.what}", error.why, error.fix) from None
    node = yaml.compose(text, _Loader)
    if lost := text[node.end_mark.index if node else 0 :].strip():
        raise RecipeError(
            f"override `{override}`: `{lost}` would be lost",
            why="YAML takes what follows ` #` for a comment",
            fix=f"put quotes inside the shell's: '{path.strip()}=\"...\"'",
        )
