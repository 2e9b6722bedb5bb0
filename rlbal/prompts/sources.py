"""Reading datasets as they are: local files, saved folders and the hub, with errors that name file and row."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from rlbal.errors import DataError, nearest

# What pyarrow raises for values that fit no column: wrong types, integers beyond 64 bits, lone surrogates.
ARROW_ERRORS = (pa.ArrowException, OverflowError, UnicodeError)

JSON_KINDS = {str: "text", bool: "true/false", int: "numbers", float: "numbers", list: "lists", dict: "objects"}


@dataclass(frozen=True)
class Source:
    """A dataset and how its rows are called in errors.

    Attributes:
        dataset: the rows, none of the columns touched.
        name: the file, folder, hub id or task.
        row_name: from a row's position (0-based) to a name such as `train.jsonl, line 7`.
    """

    dataset: datasets.Dataset
    name: str
    row_name: Callable[[int], str]


@dataclass(frozen=True)
class _File:
    """One file as a table; `numbers[i]` is the 1-based line (or row, in Parquet) of table row i."""

    path: Path
    table: pa.Table
    unit: str
    numbers: Sequence[int]

    def row_name(self, index: int) -> str:
        return f"{self.path}, {self.unit} {self.numbers[index]}"


def read_files(paths: str | list[str], key: str) -> Source:
    """Read JSONL, Parquet or CSV files, one after the other. CSV cells stay text, exactly as written.

    Args:
        paths: one path or several.
        key: the recipe key that names them.

    Raises:
        DataError: a file is missing, of unknown type, empty or damaged (with its line), or the columns mix types.
    """
    paths = [paths] if isinstance(paths, str) else paths
    if not paths:
        raise DataError(f"`{key}` is an empty list", fix="name at least one file")
    files = [_read_file(Path(path), key) for path in paths]

    def row_name(index: int) -> str:
        for file in files:
            if index < len(file.numbers):
                return file.row_name(index)
            index -= len(file.numbers)
        raise IndexError(index)

    name = ", ".join(str(path) for path in paths)
    return Source(_dataset(_concatenate(files), name), name, row_name)


def read_folder(path: str, split: str | None, key: str) -> Source:
    """Read a dataset saved with `save_to_disk`; `split` chooses one of a DatasetDict. `key` is the split's recipe key.

    Raises:
        DataError: no such folder, not a saved dataset, or a split is missing, unknown or not to be had.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"`data.path`: no folder {folder}", fix=_nearest_neighbour(folder))
    index = folder / "dataset_dict.json"
    try:
        splits = json.loads(index.read_text(encoding="utf-8"))["splits"] if index.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{index} is damaged", fix="save the dataset again with `DatasetDict.save_to_disk`") from None
    if splits is None:
        if not (folder / "state.json").is_file():
            raise DataError(
                f"`data.path`: {folder} is not a dataset saved with `datasets`",
                why="it holds neither `state.json` nor `dataset_dict.json`",
                fix="save it with `Dataset.save_to_disk`, or name its files with `data.source: file`",
            )
        if split is not None:
            raise DataError(f"`{key}: {split}`: {folder} holds one dataset without splits", fix=f"leave out `{key}`")
    elif split not in splits:
        what = f"`{key}: {split}` is not a split of {folder}" if split else f"{folder} holds several splits"
        hint = nearest(split, splits) if split else ""
        raise DataError(what, fix=f"set `{key}` to one of {', '.join(splits)}. {hint}".strip())
    name = str(folder / split) if split else str(folder)
    try:
        dataset = datasets.load_from_disk(name)
    except Exception as error:  # anything a damaged folder may cause
        raise DataError(f"cannot read the dataset in {name}", why=_first_line(error)) from None
    return _rows_of(dataset, name)


def read_hub(path: str, config: str | None, split: str, revision: str | None, key: str) -> Source:
    """Read one split of a dataset on the hub (or of a local folder with data files, as `load_dataset` takes it).

    Raises:
        DataError: unknown id, configuration or split, or no network.
    """
    try:
        dataset = datasets.load_dataset(path, config, split=split, revision=revision)
    except Exception as error:  # network, hub, configuration and parsing errors of many classes
        raise DataError(
            f"cannot load `{path}` (`{key}: {split}`) from the hub",
            why=_first_line(error),
            fix="check `data.path`, `data.config` and the split; without a network, save the dataset where there is "
            "one and use `data.source: folder` or `file`",
        ) from None
    return _rows_of(dataset, path)


def table_source(table: pa.Table, name: str) -> Source:
    """A source of generated rows."""
    return _rows_of(_dataset(table, name), name)


def column_array(values: list[Any], name: str, row_name: Callable[[int], str]) -> pa.Array:
    """Values of parsed JSON as one Arrow column.

    Raises:
        DataError: the values mix types, or one is beyond what a column can hold; names column and rows.
    """
    try:
        return pa.array(values)
    except ARROW_ERRORS as error:
        reason = _first_line(error)
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        if value is None:
            continue
        try:
            pa.array([value])
        except ARROW_ERRORS as error:
            what = f"{row_name(index)}: column `{name}` holds a value that no dataset column can hold"
            raise DataError(what, why=_first_line(error)) from None
        first.setdefault(JSON_KINDS[type(value)], index)
    if len(first) < 2:
        raise DataError(f"column `{name}` mixes types inside its lists or objects", why=reason)
    (kind_a, row_a), (kind_b, row_b) = list(first.items())[:2]
    raise DataError(
        f"column `{name}` mixes {kind_a} ({row_name(row_a)}) and {kind_b} ({row_name(row_b)})",
        fix="write the column with one type in every row",
    )


def _rows_of(dataset: datasets.Dataset, name: str) -> Source:
    if len(dataset) == 0:
        raise DataError(f"{name} has no rows")
    # A saved dataset may carry a format, such as torch tensors instead of Python values.
    return Source(dataset.with_format(None), name, lambda index: f"{name}, row {index + 1}")


def _dataset(table: pa.Table, name: str) -> datasets.Dataset:
    try:
        return datasets.Dataset(table)
    except Exception as error:  # Arrow types that `datasets` has no feature for
        raise DataError(f"{name}: a column has a type that datasets cannot hold", why=_first_line(error)) from None


def _read_file(path: Path, key: str) -> _File:
    if path.is_dir():
        raise DataError(f"`{key}`: {path} is a folder", fix="name its files, or use `data.source: folder`")
    if not path.is_file():
        raise DataError(f"`{key}`: no file {path}", fix=_nearest_neighbour(path))
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        raise DataError(f"`{key}`: {path} has an unknown extension", fix=f"use one of {known}")
    try:
        file = reader(path)
    except OSError as error:
        raise DataError(f"cannot read {path}", why=_first_line(error)) from None
    if file.table.num_rows == 0:
        raise DataError(f"{path} is empty: it has no rows")
    names = file.table.column_names
    if repeated := {column for column in names if names.count(column) > 1}:
        raise DataError(f"{path}: the column `{min(repeated)}` appears twice", fix="rename one of them")
    return file


def _read_jsonl(path: Path) -> _File:
    rows, lines = [], []
    with path.open("rb") as stream:
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                at = f" at character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                why = (error.msg if isinstance(error, json.JSONDecodeError) else _first_line(error)) + at
                raise DataError(f"{path}, line {line}: not valid JSON", why, "write one JSON object per line") from None
            if not isinstance(row, dict):
                kind = JSON_KINDS.get(type(row), "null")
                raise DataError(f"{path}, line {line}: not an object but {kind}", fix="write one JSON object per line")
            rows.append(row)
            lines.append(line)
    columns = {
        name: column_array([row.get(name) for row in rows], name, lambda index: f"{path}, line {lines[index]}")
        for name in dict.fromkeys(name for row in rows for name in row)
    }
    return _File(path, pa.table(columns), "line", lines)


def _read_parquet(path: Path) -> _File:
    try:
        table = pyarrow.parquet.read_table(path)
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file", why=_first_line(error)) from None
    return _File(path, table, "row", range(1, table.num_rows + 1))


def _read_csv(path: Path) -> _File:
    rows, lines = [], []
    with path.open("rb") as stream:
        # Decoded line by line, so that an error is in the line that the reader would count next.
        text = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(stream))
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            for row in reader:
                if row and len(row) != len(header):
                    what = f"{path}, line {reader.line_num}: {len(row)} cells, but the header has {len(header)} columns"
                    raise DataError(what, fix='put cells that hold commas or line breaks in "quotes"')
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num + 1}: not valid CSV", why=_first_line(error)) from None
    # Text as written: inferring types would turn an answer `007` into 7 and `NA` into nothing.
    columns = [pa.array(cells, pa.string()) for cells in zip(*rows, strict=True)]
    return _File(path, pa.Table.from_arrays(columns, header if rows else []), "line", lines)


READERS: dict[str, Callable[[Path], _File]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}


def _concatenate(files: list[_File]) -> pa.Table:
    try:
        return pa.concat_tables([file.table for file in files], promote_options="permissive")
    except pa.ArrowException as error:
        reason = _first_line(error)
    for file in files[1:]:
        for field in file.table.schema:
            types = {str(f.table.schema.field(field.name).type): f for f in files if field.name in f.table.column_names}
            if len(types) > 1:
                where = ", ".join(f"{kind} in {other.path}" for kind, other in types.items())
                raise DataError(f"column `{field.name}` is {where}", fix="write it with one type in every file")
    raise DataError("the files' columns do not fit together", why=reason)


def _nearest_neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        hint = f"the folder {path.parent} does not exist either"
    else:
        hint = nearest(path.name, [found.name for found in path.parent.iterdir() if not found.name.startswith(".")])
    # A recipe may be launched from anywhere; its paths are not relative to where it lies.
    return hint if path.is_absolute() else f"{hint} Paths start from the current folder, {Path.cwd()}.".strip()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
