"""From rows to prompts: templates over columns, plain text or chat messages.

A template is text with `{column}` fields and nothing else: no attributes, no indexing, no conversions, no format
specifications. `{{` and `}}` are literal braces. The text of a row is put in as it is and never read as a template.

`{token_budget}` is no column: it stays in the prompt as these very characters, and whoever renders a length budget
replaces it later (`rlbal.prompts.budget`). Where a template holds the field, no row's own text may hold the same
characters.
"""

from itertools import repeat
from string import Formatter
from typing import Any

from rlbal.budget_checks import has_budget_field
from rlbal.budget_sections import TOKEN_BUDGET
from rlbal.errors import DataError, nearest
from rlbal.prompts.budget import PLACEHOLDER
from rlbal.prompts.sources import Source
from rlbal.recipe import DataSection

Messages = list[dict[str, str]]
Pieces = list[tuple[str, str | None]]


def parse_template(template: str, key: str) -> Pieces:
    """Split a template into (literal text, field after it or None).

    Args:
        template: text with `{column}` fields.
        key: the recipe key it stands under.

    Raises:
        DataError: unbalanced braces, or a field that is more than a column's name.
    """
    pieces: Pieces = []
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"`{key}`: {error}", fix="write `{{` and `}}` for braces that are not fields") from None
    for literal, field, spec, conversion in parsed:
        if field is not None and (not field.strip() or spec or conversion or any(c in field for c in ".[]{}")):
            written = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise DataError(
                f"`{key}`: the field `{{{written}}}` is not a plain column name",
                why="templates take `{column}` only: no attributes, indices, conversions or format specifications",
                fix="rename the column with `data.columns`, or write `{{` and `}}` for literal braces",
            )
        pieces.append((literal, field))
    return pieces or [("", None)]


def render_template(template: str, key: str, source: Source) -> list[str]:
    """Render a template for every row of a source.

    Raises:
        DataError: a malformed template, an unknown column, or a row whose value is missing or no text.
    """
    columns: list[Any] = []
    for literal, field in parse_template(template, key):
        columns.append(repeat(literal, len(source.dataset)))
        if field == TOKEN_BUDGET:
            columns.append(repeat(PLACEHOLDER, len(source.dataset)))
        elif field is not None:
            require_column(source, field, f"the field `{{{field}}}` of `{key}`")
            columns.append(_texts(source, field, key))
    return ["".join(parts) for parts in zip(*columns, strict=True)]


def render_prompts(source: Source, data: DataSection) -> list[Any]:
    """The prompt of every row: all str, or all `Messages` where the recipe or the dataset says so.

    A column `prompt` (text or messages) is used as it is when `data.prompt` is left at its default and there is no
    column `question`, so that datasets made for TRL need no template.

    Raises:
        DataError: see `render_template`; an empty prompt; messages that are not role and text; a row that holds
            `{token_budget}` itself where a template does.
    """
    prompts = _render(source, data)
    if has_budget_field(data):
        _refuse_own_placeholders(prompts, source, data)
    return prompts


def _render(source: Source, data: DataSection) -> list[Any]:
    if _uses_prompt_column(source, data):
        made_by, raw = "column `prompt`", source.dataset["prompt"][:]
    else:
        made_by, raw = f"`data.prompt` {data.prompt!r}", render_template(data.prompt, "data.prompt", source)
    prompts = [_checked_prompt(prompt, index, source, made_by) for index, prompt in enumerate(raw)]
    if isinstance(prompts[0], str):
        if not data.conversational and data.system is None:
            return prompts
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    if data.system is None:
        return prompts
    for index, system in enumerate(render_template(data.system, "data.system", source)):
        if prompts[index][0]["role"] == "system":
            what = f"{source.row_name(index)}: the prompt already starts with a system message"
            raise DataError(what, fix="leave out `data.system`")
        if not system.strip():
            raise DataError(f"{source.row_name(index)}: the system prompt is empty", fix="fill or drop `data.system`")
        prompts[index] = [{"role": "system", "content": system}, *prompts[index]]
    return prompts


def _refuse_own_placeholders(prompts: list[Any], source: Source, data: DataSection) -> None:
    """Refuse rows in which more would be replaced by the budget than the templates' own fields."""
    templates = {"data.system": data.system or "", "data.prompt": data.prompt}
    fields = [field for key, template in templates.items() for _, field in parse_template(template, key)]
    for index, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        if text.count(PLACEHOLDER) > fields.count(TOKEN_BUDGET):
            raise DataError(
                f"{source.row_name(index)}: the prompt holds `{PLACEHOLDER}` more often than the templates do, and the "
                "budget would take its place there too",
                fix="change or remove the row's text, or the `{{token_budget}}` of a template",
            )


def require_column(source: Source, column: str, user: str) -> None:
    """Refuse a column that the source does not have; `user` says who asks for it.

    Raises:
        DataError: names the nearest column, and all there are.
    """
    names = source.dataset.column_names
    if column not in names:
        hint = nearest(column, names)
        known = "" if hint.startswith("Known") else f" Columns: {', '.join(f'`{name}`' for name in names)}."
        raise DataError(f"{source.name} has no column `{column}`, which {user} names", fix=f"{hint}{known}".strip())


def _uses_prompt_column(source: Source, data: DataSection) -> bool:
    names = source.dataset.column_names
    default = type(data).model_fields["prompt"].default
    return "prompt" in names and (data.prompt == "{prompt}" or (data.prompt == default and "question" not in names))


def _texts(source: Source, column: str, key: str) -> list[str]:
    texts = []
    for index, value in enumerate(source.dataset[column][:]):
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, bool | int | float):
            texts.append(str(value))
        else:
            kind = "no value" if value is None else f"a {type(value).__name__}"
            raise DataError(
                f"{source.row_name(index)}: column `{column}` holds {kind}, but `{key}` needs text or a number there",
                fix="fill or remove the row" if value is None else "name another column",
            )
    return texts


def _checked_prompt(prompt: Any, index: int, source: Source, made_by: str) -> Any:
    """A prompt that is text, or messages reduced to plain role and content."""
    row = source.row_name
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{row(index)}: the prompt is empty ({made_by})", fix="fill or remove the row")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        kind = "is neither text nor a list of messages" if prompt else "is empty"
        raise DataError(f"{row(index)}: {made_by} {kind}", fix="fill or remove the row")
    messages = []
    for number, message in enumerate(prompt, start=1):
        where = f"message {number} of {made_by}"
        if not isinstance(message, dict):
            raise DataError(f"{row(index)}: {where} is not an object with `role` and `content`")
        extra = [name for name, value in message.items() if name not in ("role", "content") and value is not None]
        if extra:
            raise DataError(f"{row(index)}: {where} has `{extra[0]}`; only `role` and `content` are supported")
        for name in ("role", "content"):
            value = message.get(name)
            if not isinstance(value, str) or not value.strip():
                kind = "is not text" if value and not isinstance(value, str) else "is empty"
                raise DataError(f"{row(index)}: `{name}` of {where} {kind}", fix="fill or remove the row")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages
