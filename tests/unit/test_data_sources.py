"""Reading files: what each format gives, and errors that name file, line and column."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from rlbal.errors import DataError
from rlbal.prompts.sources import read_files


def read(*paths: Path) -> Any:
    return read_files([str(path) for path in paths], "data.path").dataset


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_rows_may_lack_columns_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"q": "\xc3\xa9", "n": 1}\n\n{"q": "b", "x": [1]}\n{"q": "c", "n": 2.5}')
    assert read(path)[:] == {"q": ["é", "b", "c"], "n": [1.0, None, 2.5], "x": [None, [1], None]}
    assert read_files(str(path), "data.path").row_name(2).endswith("a.jsonl, line 4")


def test_csv_cells_stay_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"one,\ntwo",007\n\nthree,NA\nfour,\n', encoding="utf-8")
    source = read_files(str(path), "data.path")
    assert source.dataset[:] == {"question": ["one,\ntwo", "three", "four"], "answer": ["007", "NA", ""]}
    assert source.row_name(1).endswith("a.csv, line 5")


def test_several_files_of_several_formats(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"q": ["p1", "p2"], "level": [1.5, 2.5]}), tmp_path / "b.parquet")
    source = read_files([str(jsonl(tmp_path / "a.jsonl", {"q": "j", "level": 1})), str(tmp_path / "b.parquet")], "k")
    assert source.dataset[:] == {"q": ["j", "p1", "p2"], "level": [1.0, 1.5, 2.5]}
    assert source.row_name(0).endswith("a.jsonl, line 1") and source.row_name(2).endswith("b.parquet, row 2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": 1}\n{"q": 1', r"a\.jsonl, line 2: not valid JSON\nWhy: .* at character \d+"),
        ("a.jsonl", b'{"q": 1}\n\n[1, 2]\n', r"a\.jsonl, line 3: not an object but lists"),
        ("a.jsonl", b"null\n", r"a\.jsonl, line 1: not an object but null"),
        ("a.jsonl", b'{"q": "\xff"}\n', r"a\.jsonl, line 1: not valid JSON\nWhy: 'utf-8' codec"),
        ("a.jsonl", b'{"q": ' + b"[" * 100_000 + b"}\n", r"a\.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"q": ' + b"9" * 5_000 + b"}\n", r"a\.jsonl, line 1: not valid JSON\nWhy: .*digits"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b"\n \n", r"a\.jsonl is empty"),
        ("a.jsonl", b"{}\n", r"a\.jsonl is empty"),
        (
            "a.jsonl",
            b'{"q": 1}\n{"q": null}\n{"q": "x"}\n',
            r"column `q` mixes numbers \(.*line 1\) and text \(.*line 3",
        ),
        ("a.jsonl", b'{"q": 1}\n{"q": true}\n', r"column `q` mixes numbers \(.*line 1\) and true/false \(.*line 2"),
        ("a.jsonl", b'{"q": "a"}\n{"q": "\\ud800"}\n', r"a\.jsonl, line 2: column `q` holds a value"),
        ("a.jsonl", b'{"q": 1}\n{"q": 99999999999999999999}\n', r"a\.jsonl, line 2: column `q` holds a value"),
        ("a.jsonl", b'{"q": [1]}\n{"q": ["x"]}\n', r"column `q` mixes types inside its lists or objects"),
        ("a.csv", b"q,a\n1,2\n1,2,3\n", r"a\.csv, line 3: 3 cells, but the header has 2 columns"),
        ("a.csv", b'q,a\n1,"2\n', r"a\.csv, line \d: not valid CSV"),
        ("a.csv", b"q,a\n1,\xff\n", r"a\.csv, line 2: not valid CSV\nWhy: 'utf-8' codec"),
        ("a.csv", b'q,a\n"1\n2",3\n4,\xff\n', r"a\.csv, line 4: not valid CSV\nWhy: 'utf-8' codec"),
        ("a.csv", b"q,a\n", r"a\.csv is empty"),
        ("a.csv", b"q,q\n1,2\n", r"a\.csv: the column `q` appears twice"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not a readable Parquet file"),
        ("a.txt", b"x", r"`data\.path`: .*a\.txt has an unknown extension\nFix: use one of \.jsonl, \.parquet, \.csv"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_missing_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", {"q": "a"})
    with pytest.raises(DataError, match=r"`data.path`: no file .*trian.jsonl\nFix: Did you mean `train.jsonl`\?"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"no file .*\nFix: the folder .*nowhere does not exist"):
        read(tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(DataError, match=r"is a folder"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"`data.path` is an empty list"):
        read()


def test_files_that_disagree_on_a_column(tmp_path: Path) -> None:
    paths = jsonl(tmp_path / "a.jsonl", {"q": "a", "level": 1}), jsonl(tmp_path / "b.jsonl", {"q": "b", "level": "2"})
    with pytest.raises(DataError, match=r"column `level` is int64 in .*a\.jsonl, string in .*b\.jsonl"):
        read(*paths)


def test_empty_parquet(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"q": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is empty"):
        read(tmp_path / "a.parquet")
