"""Templates over rows: plain fields only, text put in literally, messages checked."""

from typing import Any

import datasets
import pytest

from rlbal.errors import DataError
from rlbal.prompts.sources import Source
from rlbal.prompts.templates import render_prompts
from rlbal.recipe import FileData


def render(rows: list[dict[str, Any]], **keys: Any) -> list[Any]:
    source = Source(datasets.Dataset.from_list(rows), "rows", lambda index: f"rows, line {index + 1}")
    return render_prompts(source, FileData(source="file", path="rows", **keys))


def test_fields_literal_braces_and_numbers() -> None:
    rows = [{"question": "1+1", "level": 3, "hard": True, "share": 0.5}]
    template = "{question} ({level}, {hard}, {share}) in \\boxed{{}} {question}"
    assert render(rows, prompt=template) == ["1+1 (3, True, 0.5) in \\boxed{} 1+1"]


def test_text_of_rows_is_never_a_template() -> None:
    hostile = "{answer} {question.__class__} {{x}} {token_budget} %s"
    assert render([{"question": hostile, "answer": "42"}], prompt="Q: {question}") == ["Q: " + hostile]


def test_token_budget_stays_for_a_later_stage() -> None:
    assert render([{"question": "q"}], prompt="{question} in {token_budget}") == ["q in {token_budget}"]


@pytest.mark.parametrize("field", ["{q.__class__}", "{q[0]}", "{q!r}", "{q:>9}", "{}", "{ }", "{q:{q}}", "{0.x}"])
def test_fields_that_are_more_than_a_column(field: str) -> None:
    with pytest.raises(DataError, match=r"`data.prompt`: the field .* is not a plain column name"):
        render([{"q": "x"}], prompt=field)
    with pytest.raises(DataError, match=r"`data.system`: the field .* is not a plain column name"):
        render([{"q": "x"}], prompt="{q}", system=field)


@pytest.mark.parametrize("template", ["{q", "q}", "{{q}", "{q}}"])
def test_unbalanced_braces(template: str) -> None:
    with pytest.raises(DataError, match=r"`data.prompt`"):
        render([{"q": "x"}], prompt=template)


def test_unknown_column() -> None:
    message = (
        "rows has no column `quesion`, which the field `{quesion}` of `data.prompt` names\n"
        "Fix: Did you mean `question`\\? Columns: `question`, `answer`\\."
    )
    with pytest.raises(DataError, match=message):
        render([{"question": "x", "answer": "y"}], prompt="{quesion}")


def test_values_that_are_no_text() -> None:
    with pytest.raises(DataError, match=r"rows, line 2: column `q` holds no value, but `data.prompt` needs text"):
        render([{"q": "x"}, {"q": None}], prompt="{q}")
    with pytest.raises(DataError, match=r"rows, line 1: column `q` holds a list"):
        render([{"q": ["x"]}], prompt="{q}")


def test_empty_prompts() -> None:
    with pytest.raises(DataError, match=r"rows, line 2: the prompt is empty \(`data.prompt` '{q}'\)"):
        render([{"q": "x"}, {"q": " \n"}], prompt="{q}")
    with pytest.raises(DataError, match=r"rows, line 1: the prompt is empty"):
        render([{"q": "x"}], prompt="")
    with pytest.raises(DataError, match=r"rows, line 2: the prompt is empty \(column `prompt`\)"):
        render([{"prompt": "x"}, {"prompt": ""}])
    with pytest.raises(DataError, match=r"rows, line 1: the system prompt is empty"):
        render([{"question": "x"}], system=" ")


def test_chat_messages() -> None:
    rows = [{"question": "1+1", "subject": "sums"}]
    user = {"role": "user", "content": "1+1"}
    assert render(rows, conversational=True) == [[user]]
    system = {"role": "system", "content": "You do sums."}
    assert render(rows, system="You do {subject}.") == [[system, user]]


def test_a_prompt_column_is_used_as_it_is() -> None:
    messages = [{"role": "user", "content": "hi"}]
    system = {"role": "system", "content": "be brief"}
    assert render([{"prompt": "plain {x}"}]) == ["plain {x}"]
    assert render([{"prompt": "plain"}], conversational=True) == [[{"role": "user", "content": "plain"}]]
    assert render([{"prompt": messages}]) == [messages]
    assert render([{"prompt": messages, "question": "q"}], prompt="{prompt}") == [messages]
    assert render([{"prompt": messages}], system="be brief") == [[system, *messages]]
    # A column `question` or another template takes precedence.
    assert render([{"prompt": "p", "question": "q"}]) == ["q"]
    assert render([{"prompt": "p"}], prompt="Say {prompt}") == ["Say p"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "column `prompt` is empty"),
        ([{"role": "user", "content": " "}], "`content` of message 1 of column `prompt` is empty"),
        ([{"role": None, "content": "x"}], "`role` of message 1 of column `prompt` is empty"),
        ([{"role": "user", "content": ["x"]}], "`content` of message 1 of column `prompt` is not text"),
        ([{"role": "user", "content": "x", "name": "n"}], "has `name`; only `role` and `content`"),
        (["x"], "message 1 of column `prompt` is not an object"),
        (7, "is neither text nor a list of messages"),
    ],
)
def test_messages_that_are_not_role_and_text(prompt: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"rows, line 1: .*" + message):
        render([{"prompt": prompt}])


def test_two_system_messages() -> None:
    with pytest.raises(DataError, match=r"line 1: the prompt already starts with a system message"):
        render([{"prompt": [{"role": "system", "content": "a"}]}], system="b")
