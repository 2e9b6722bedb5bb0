"""From the recipe's `data:` section to training and held-out prompts.

Every process of a run calls `load_data` itself and gets the same rows: only recipe and seed decide. Nothing is written.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from rlbal.errors import DataError
from rlbal.prompts.generate import generate_problems
from rlbal.prompts.sources import Source, column_array, read_files, read_folder, read_hub, table_source
from rlbal.prompts.templates import render_prompts, require_column
from rlbal.recipe import AnyData, DataSection, FileData, FolderData, ReasoningGymData

# Names that the trainer passes to reward functions itself; a column of that name would be lost or clash.
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "token_budget")

ADDED = ("prompt", "prompt_id", "prompt_index")

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@dataclass(frozen=True)
class PromptData:
    """The prompts of a run.

    Both datasets hold the source's columns and `prompt` (str, or a list of role/content messages), `prompt_id` (str,
    unique over both) and `prompt_index` (int64, the row's position in its dataset).

    Attributes:
        train: training rows in the source's order.
        eval: held-out rows with distinct prompts, none of which is in `train`; None if nothing is held out. In random
            order when split off by seed, so that the first n are a fair sample.
        notes: what was left out and why, for people.
    """

    train: datasets.Dataset
    eval: datasets.Dataset | None
    notes: list[str]


@dataclass(frozen=True)
class _Rendered:
    """A source with its `prompt` and `prompt_id` columns; `keys[i]` is equal for rows of equal prompt."""

    source: Source
    keys: list[str]
    ids: list[str]


def load_data(data: AnyData, seed: int) -> PromptData:
    """Read, render, identify and split the data of a recipe.

    With `eval_path` or `eval_split` every distinct prompt there is held out; otherwise `eval_size` distinct prompts
    are drawn by seed. Training rows that repeat a held-out prompt are dropped. `max_rows` then keeps the first ones.

    Args:
        data: the recipe's `data:` section.
        seed: the recipe's seed; also that of generated problems.

    Raises:
        DataError: names file, row and column of what is wrong.
    """
    source, held_out = _read(data, seed)
    rendered = _render(source, data)
    notes: list[str] = []
    if held_out is not None:
        evaluation = _render(held_out, data)
        eval_rows = _distinct(evaluation.keys)
        if repeats := len(evaluation.keys) - len(eval_rows):
            notes.append(f"{repeats} held-out rows dropped: they repeat the prompt of another held-out row")
    else:
        evaluation = rendered
        eval_rows = _draw(rendered.keys, data.eval_size, seed, source.name)
    held_keys = {evaluation.keys[row] for row in eval_rows}
    train_rows = [row for row, key in enumerate(rendered.keys) if key not in held_keys]
    if overlap := len(rendered.keys) - len(train_rows) - (len(eval_rows) if held_out is None else 0):
        notes.append(f"{overlap} training rows dropped: same prompt as a held-out row")
    if not train_rows:
        raise DataError(
            f"no training row is left: every prompt of {source.name} is also held out in {evaluation.source.name}",
            fix="name different rows for evaluation",
        )
    if data.difficulty is not None:
        require_column(evaluation.source, data.difficulty, "`data.difficulty`")
    if held_out is not None:
        _refuse_shared_ids(rendered, train_rows, evaluation, eval_rows)
    train = _select(rendered, train_rows[: data.max_rows])
    return PromptData(train, _select(evaluation, eval_rows) if eval_rows else None, notes)


def _read(data: AnyData, seed: int) -> tuple[Source, Source | None]:
    """The source of a recipe and, if the recipe names one, the source of its held-out rows."""
    if isinstance(data, ReasoningGymData):
        problems = generate_problems(data.task, data.config, data.size, seed)
        return table_source(_problem_table(problems), f"reasoning-gym task `{data.task}`"), None
    if isinstance(data, FileData):
        held_out = read_files(data.eval_path, "data.eval_path") if data.eval_path else None
        return read_files(data.path, "data.path"), held_out
    if isinstance(data, FolderData):
        held_out = read_folder(data.path, data.eval_split, "data.eval_split") if data.eval_split else None
        return read_folder(data.path, data.split, "data.split"), held_out
    source = read_hub(data.path, data.config, data.split, data.revision, "data.split")
    if not data.eval_split:
        return source, None
    return source, read_hub(data.path, data.config, data.eval_split, data.revision, "data.eval_split")


def _problem_table(problems: list[dict[str, Any]]) -> pa.Table:
    """Columns `question`, `answer`, `metadata` (JSON text), and one per plain value that all metadata have."""
    columns: dict[str, Any] = {
        "question": [problem["question"] for problem in problems],
        "answer": pa.array([problem["answer"] for problem in problems], pa.string()),
        "metadata": [json.dumps(problem["metadata"]) for problem in problems],
    }
    for name in problems[0]["metadata"]:
        values = [problem["metadata"].get(name) for problem in problems]
        plain = all(isinstance(value, str | bool | int | float) for value in values)
        if plain and name not in columns and name not in (*RESERVED, *ADDED):
            try:
                columns[name] = column_array(values, name, str)
            except DataError:  # mixed types, or integers beyond 64 bits: still in `metadata`
                continue
    return pa.table(columns)


def _render(source: Source, data: DataSection) -> _Rendered:
    source = _rename(source, data.columns)
    for name in RESERVED:
        if name in source.dataset.column_names:
            raise DataError(
                f"{source.name}: the column name `{name}` is reserved for the trainer",
                fix=f"rename it, e.g. `data.columns: {{my_{name}: {name}}}`",
            )
    prompts = render_prompts(source, data)
    keys = [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in prompts]
    names = source.dataset.column_names
    ids = _own_ids(source) if "prompt_id" in names else _make_ids(source.dataset, prompts)
    kept = source.dataset.remove_columns([name for name in ADDED if name in names])
    kind = pa.string() if isinstance(prompts[0], str) else MESSAGES
    added = {"prompt": pa.array(prompts, kind), "prompt_id": pa.array(ids, pa.string())}
    return _Rendered(replace(source, dataset=with_columns(kept, added)), keys, ids)


def _rename(source: Source, columns: dict[str, str]) -> Source:
    """Apply `data.columns` (new name -> old name)."""
    names, taken = source.dataset.column_names, Counter(columns.values())
    for new, old in columns.items():
        require_column(source, old, f"`data.columns.{new}`")
        if taken[old] > 1:
            raise DataError(f"`data.columns` gives the column `{old}` two new names", fix="keep one of them")
        if new in names and new not in taken:
            raise DataError(
                f"`data.columns.{new}: {old}`: {source.name} already has a column `{new}`",
                fix=f"give that one another name too, e.g. `old_{new}: {new}`",
            )
    dataset = source.dataset.rename_columns({old: new for new, old in columns.items()})
    return replace(source, dataset=dataset)


def _make_ids(dataset: datasets.Dataset, prompts: list[Any]) -> list[str]:
    """16 hex characters from prompt, gold answer and, for exact repeats, which repeat it is."""
    answers = dataset["answer"][:] if "answer" in dataset.column_names else [None] * len(prompts)
    seen: Counter[str] = Counter()
    ids = []
    for prompt, answer in zip(prompts, answers, strict=True):
        content = json.dumps([prompt, answer], default=str)
        ids.append(hashlib.sha256(f"{seen[content]} {content}".encode()).hexdigest()[:16])
        seen[content] += 1
    return ids


def _own_ids(source: Source) -> list[str]:
    """The dataset's own `prompt_id` column as text, unique."""
    first: dict[str, int] = {}
    for row, value in enumerate(source.dataset["prompt_id"][:]):
        if value is None or not str(value).strip():
            raise DataError(f"{source.row_name(row)}: column `prompt_id` is empty", fix="fill it or remove the column")
        if str(value) in first:
            where = f"{source.row_name(first[str(value)])} and {source.row_name(row)}"
            raise DataError(f"`prompt_id` {value} appears twice: {where}", fix="make them unique or remove the column")
        first[str(value)] = row
    return list(first)


def _refuse_shared_ids(train: _Rendered, train_rows: list[int], held_out: _Rendered, eval_rows: list[int]) -> None:
    held_ids = {held_out.ids[row]: row for row in eval_rows}
    for row in train_rows:
        if train.ids[row] in held_ids:
            where = f"{train.source.row_name(row)} and {held_out.source.row_name(held_ids[train.ids[row]])}"
            raise DataError(
                f"`prompt_id` {train.ids[row]} stands for two prompts: {where}",
                fix="make them unique over training and held-out rows, or remove the column",
            )


def _distinct(keys: list[str]) -> list[int]:
    """The first row of every distinct prompt, in order."""
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return list(first.values())


def _draw(keys: list[str], size: int, seed: int, name: str) -> list[int]:
    """Draw rows of distinct prompts to hold out, leaving at least one prompt to train on."""
    candidates = _distinct(keys)
    if size >= len(candidates):
        raise DataError(
            f"`data.eval_size: {size}` leaves nothing to train on: {name} has {len(keys)} rows with "
            f"{len(candidates)} distinct prompts",
            fix=f"set `data.eval_size` to at most {len(candidates) - 1}, or use more data",
        )
    return random.Random(seed).sample(candidates, size)


def _select(rendered: _Rendered, rows: list[int]) -> datasets.Dataset:
    """The given rows, with `prompt_index` counting them."""
    # The column comes first: after a selection, `datasets` would write all rows to a cache file to add one.
    positions = np.full(len(rendered.keys), -1)
    positions[rows] = np.arange(len(rows))
    dataset = with_columns(rendered.source.dataset, {"prompt_index": pa.array(positions)})
    return dataset.select(np.array(rows))


def with_columns(dataset: datasets.Dataset, columns: dict[str, pa.Array]) -> datasets.Dataset:
    """Add columns in memory. (`Dataset.add_column` pickles every value for its fingerprint: slow for messages.)"""
    return datasets.concatenate_datasets([dataset, datasets.Dataset(pa.table(columns))], axis=1)
