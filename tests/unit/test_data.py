"""load_data: identities, the split, renames and prompt lengths, on small files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlbal.errors import DataError
from rlbal.prompts.data import PromptData, load_data
from rlbal.prompts.lengths import limit_prompt_tokens, prompt_token_lengths
from rlbal.recipe import FileData, FolderData, HubData


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {n}+1?", "answer": str(n + 1), "level": n % 3} for n in range(start, start + count)]


def load(path: str, seed: int = 0, **keys: Any) -> PromptData:
    return load_data(FileData(source="file", path=path, **{"eval_size": 0, **keys}), seed)


def test_ids_are_prompt_answer_and_repeat_and_stay_when_other_rows_move(tmp_path: Path) -> None:
    row, other = {"question": "What is 1+1?", "answer": "2"}, {"question": "What is 1+1?", "answer": "two"}
    ids = load(write(tmp_path / "a.jsonl", [row, other, row])).train["prompt_id"][:]
    # printf '0 ["What is 1+1?", "2"]' | sha256sum | cut -c1-16, and the same with 1 for the first repeat
    assert (ids[0], ids[2]) == ("f5b0b884763b39eb", "0bf707ba7ed7aa6e")
    assert len(set(ids)) == 3
    moved = load(write(tmp_path / "b.jsonl", [*sums(3, start=7), other, row, row])).train["prompt_id"][:]
    assert moved[3:] == [ids[1], ids[0], ids[2]]


def test_without_an_answer_column_the_prompt_alone_identifies(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", [{"question": "a"}, {"question": "b"}]))
    assert len(set(data.train["prompt_id"])) == 2


def test_own_prompt_ids_are_used_and_repeats_refused(tmp_path: Path) -> None:
    rows = [{"question": q, "prompt_id": i} for q, i in (("a", 10), ("b", 11), ("c", 12))]
    assert load(write(tmp_path / "a.jsonl", rows)).train["prompt_id"][:] == ["10", "11", "12"]
    rows[2]["prompt_id"] = 10
    with pytest.raises(DataError, match=r"`prompt_id` 10 appears twice: .*a.jsonl, line 1 and .*a.jsonl, line 3"):
        load(write(tmp_path / "a.jsonl", rows))
    rows[2]["prompt_id"] = None  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"line 3: column `prompt_id` is empty"):
        load(write(tmp_path / "a.jsonl", rows))


def test_own_prompt_ids_may_not_be_shared_with_held_out_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", [{"question": "a", "prompt_id": "1"}, {"question": "b", "prompt_id": "2"}])
    held = write(tmp_path / "e.jsonl", [{"question": "c", "prompt_id": "2"}])
    with pytest.raises(
        DataError, match=r"`prompt_id` 2 stands for two prompts: .*t.jsonl, line 2 and .*e.jsonl, line 1"
    ):
        load(train, eval_path=held)


def test_split_by_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(40))
    first, again, other = (load(path, seed, eval_size=10) for seed in (1, 1, 2))
    assert first.eval is not None and again.eval is not None and other.eval is not None
    assert first.eval["prompt"][:] == again.eval["prompt"][:] and first.train["prompt"][:] == again.train["prompt"][:]
    assert set(first.eval["prompt"]) != set(other.eval["prompt"])
    assert len(first.eval) == 10 and len(first.train) == 30
    assert set(first.eval["prompt"]) | set(first.train["prompt"]) == {row["question"] for row in sums(40)}
    numbers = [int(answer) for answer in first.train["answer"]]
    assert numbers == sorted(numbers)  # training rows keep the file's order
    assert first.train["prompt_index"][:] == list(range(30)) and first.eval["prompt_index"][:] == list(range(10))
    assert len(set(first.train["prompt_id"]) | set(first.eval["prompt_id"])) == 40
    assert first.train.column_names == ["question", "answer", "level", "prompt", "prompt_id", "prompt_index"]
    assert first.notes == []


def test_held_out_prompts_are_distinct_and_never_trained_on(tmp_path: Path) -> None:
    # Each of five prompts stands in four rows: two held out take 2 rows for evaluation and drop 2 * 3 others.
    rows = [{"question": f"q{n}", "answer": str(copy)} for copy in range(4) for n in range(5)]
    data = load(write(tmp_path / "a.jsonl", rows), eval_size=2)
    assert data.eval is not None and len(set(data.eval["prompt"])) == 2
    assert not set(data.eval["prompt"]) & set(data.train["prompt"])
    assert len(data.train) == 20 - 2 - 6
    assert data.notes == ["6 training rows dropped: same prompt as a held-out row"]
    with pytest.raises(DataError, match=r"eval_size: 5.* 20 rows with 5 distinct prompts\nFix: .* at most 4"):
        load(write(tmp_path / "a.jsonl", rows), eval_size=5)


def test_eval_size_must_leave_rows_and_zero_holds_out_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(4))
    assert load(path).eval is None
    with pytest.raises(DataError, match=r"`data.eval_size: 128` leaves nothing to train on"):
        load(path, eval_size=128)


def test_held_out_file(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", [{"question": row["question"], "answer": row["answer"]} for row in sums(6)])
    held = write(tmp_path / "e.jsonl", [*sums(2), *sums(2), *sums(1, start=50)])
    data = load(train, eval_path=held, difficulty="level", eval_size=128)
    assert data.eval is not None
    assert data.eval["answer"][:] == ["1", "2", "51"] and data.eval["prompt_index"][:] == [0, 1, 2]
    assert data.train["answer"][:] == ["3", "4", "5", "6"]
    assert data.notes == [
        "2 held-out rows dropped: they repeat the prompt of another held-out row",
        "2 training rows dropped: same prompt as a held-out row",
    ]
    with pytest.raises(DataError, match=r"no training row is left"):
        load(held, eval_path=held)


def test_max_rows_counts_training_rows_after_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(40))
    everything, some = load(path, eval_size=10), load(path, eval_size=10, max_rows=5)
    assert everything.eval is not None and some.eval is not None
    assert some.train["prompt"][:] == everything.train["prompt"][:5]
    assert some.eval["prompt"][:] == everything.eval["prompt"][:]


def test_renamed_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"problem": "p", "solution": "long", "answer": "short"}])
    train = load(path, columns={"question": "problem", "answer": "solution", "final": "answer"}).train
    assert train[0]["prompt"] == "p" and train[0]["answer"] == "long" and train[0]["final"] == "short"
    with pytest.raises(DataError, match=r"`data.columns.answer: solution`.*already has a column `answer`"):
        load(path, columns={"question": "problem", "answer": "solution"})
    with pytest.raises(DataError, match=r"no column `problm`, which `data.columns.question` names\nFix: .*`problem`"):
        load(path, columns={"question": "problm"})
    with pytest.raises(DataError, match=r"gives the column `problem` two new names"):
        load(path, columns={"question": "problem", "text": "problem"})


def test_missing_difficulty_and_reserved_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(4))
    with pytest.raises(DataError, match=r"no column `levle`, which `data.difficulty` names\nFix: Did you mean `level`"):
        load(path, difficulty="levle")
    path = write(tmp_path / "b.jsonl", [{"question": "q", "completions": "x"}])
    with pytest.raises(DataError, match=r"`completions` is reserved"):
        load(path)


def test_nothing_is_written_beside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list(sums(20)).save_to_disk("saved")
    before = sorted(tmp_path.rglob("*"))
    section = FolderData(source="folder", path="saved", eval_size=5, max_prompt_tokens=12, overlong="drop")
    data = load_data(section, 0)
    short, _ = limit_prompt_tokens(data.train, letters(), section, 8)  # "What is 9+1?" has 12 characters
    assert set(short["answer"]) <= {str(n + 1) for n in range(10)} and len(short) < 15
    assert len(data.train) == 15 and sorted(tmp_path.rglob("*")) == before


def test_processes_with_different_hash_seeds_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(30) + sums(10))
    code = (
        "import sys; from rlbal.prompts.data import load_data; from rlbal.recipe import FileData;"
        "d = load_data(FileData(source='file', path=sys.argv[1], eval_size=8), 3);"
        "print(d.train['prompt_id'][:], d.eval['prompt_id'][:])"
    )
    root = str(Path(__file__).parents[2])
    results = [
        subprocess.run(
            [sys.executable, "-c", code, path],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert results[0] == results[1] and len(results[0]) > 100


def test_saved_folder_and_its_splits(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list(sums(6)), datasets.Dataset.from_list(sums(2, start=90))
    train.with_format("numpy").save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))

    def folder(name: str, **keys: Any) -> PromptData:
        return load_data(FolderData(source="folder", path=str(tmp_path / name), **{"eval_size": 2, **keys}), 0)

    one, both = folder("one"), folder("both", split="train", eval_split="test")
    assert len(one.train) == 4 and isinstance(one.train[0]["prompt"], str)
    assert both.eval is not None and both.eval["answer"][:] == ["91", "92"] and len(both.train) == 6
    with pytest.raises(DataError, match=r"holds several splits\nFix: set `data.split` to one of train, test"):
        folder("both")
    with pytest.raises(DataError, match=r"`data.eval_split: tset` is not a split .*\nFix: .*Did you mean `test`"):
        folder("both", split="train", eval_split="tset")
    with pytest.raises(DataError, match=r"holds one dataset without splits"):
        folder("one", split="train")
    with pytest.raises(DataError, match=r"no folder .*ones\nFix: Did you mean `one`"):
        folder("ones")
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match=r"is not a dataset saved with `datasets`"):
        folder("plain")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read the dataset in .*one"):
        folder("one")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repo").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "repo" / "train.jsonl", sums(5))
    write(tmp_path / "repo" / "test.jsonl", sums(2, start=70))
    data = load_data(HubData(source="hub", path=str(tmp_path / "repo"), eval_split="test"), 0)
    assert data.eval is not None and len(data.train) == 5 and data.eval["answer"][:] == ["71", "72"]
    with pytest.raises(DataError, match=r"\(`data.split: validation`\) from the hub\nWhy: .*validation"):
        load_data(HubData(source="hub", path=str(tmp_path / "repo"), split="validation"), 0)

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'some/set' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"cannot load `some/set`.*\nWhy: Couldn't reach.*\nFix: .*`data.source: folder`"
    ):
        load_data(HubData(source="hub", path="some/set"), 0)


def letters(chat_template: str | None = None) -> Any:
    """A tokenizer with one token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", chat_template=chat_template)


def test_prompt_tokens_plain(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "abc" * n} for n in (1, 5, 2, 4)])
    train, plain = load(path).train, FileData(source="file", path=path)
    assert prompt_token_lengths(train, letters(), plain, 8) == [3, 15, 6, 12]
    keys: dict[str, Any] = {"source": "file", "path": path, "max_prompt_tokens": 6}
    with pytest.raises(DataError, match=r"2 of 4 prompts have more than 6 tokens; the longest is row 2 .* with 15"):
        limit_prompt_tokens(train, letters(), FileData(**keys), 8)
    kept, note = limit_prompt_tokens(train, letters(), FileData(**keys, overlong="drop"), 8)
    assert kept["prompt"][:] == ["abc", "abcabc"] and kept["prompt_index"][:] == [0, 1]
    assert kept["prompt_id"][:] == [train["prompt_id"][0], train["prompt_id"][2]]
    assert note is not None and note.startswith("dropped: 2 of 4 prompts")
    assert limit_prompt_tokens(train, letters(), plain, 8) == (train, None)
    with pytest.raises(DataError, match=r"4 of 4 prompts have more than 2"):
        limit_prompt_tokens(train, letters(), FileData(**{**keys, "max_prompt_tokens": 2}, overlong="drop"), 8)


def test_prompt_tokens_through_the_chat_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<{{ name }}>{% endif %}"
    )
    path = write(tmp_path / "a.jsonl", [{"question": "abc"}])
    section = FileData(source="file", path=path, system="be", eval_size=0)
    train = load_data(section, 0).train
    # <system>be<user>abc<bot>: 8 + 2 + 6 + 3 + 5 characters
    assert prompt_token_lengths(train, letters(template), section, 8, {"name": "bot"}) == [24]
    with pytest.raises(DataError, match=r"cannot render the chat prompts"):
        prompt_token_lengths(train, letters(), section, 8)


def test_a_missing_chat_template_shows_without_a_limit_too(tmp_path: Path) -> None:
    section = FileData(source="file", path=write(tmp_path / "a.jsonl", sums(3)), eval_size=0, conversational=True)
    train = load_data(section, 0).train
    with pytest.raises(DataError, match="the tokenizer cannot render the chat prompts"):
        limit_prompt_tokens(train, letters(), section, 8)


def test_prompt_tokens_count_the_largest_budget_in_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "abc"}, {"question": "abcd"}])
    keys: dict[str, Any] = {"source": "file", "path": path, "eval_size": 0, "prompt": "{question} <{token_budget}>"}
    train = load_data(FileData(**keys), 0).train
    assert train["prompt"][:] == ["abc <{token_budget}>", "abcd <{token_budget}>"]
    # "abc <64>" has 8 characters, "abcd <128>" 10.
    assert prompt_token_lengths(train, letters(), FileData(**keys), 64) == [8, 9]
    assert prompt_token_lengths(train, letters(), FileData(**keys), 128) == [9, 10]
    limited = FileData(**keys, max_prompt_tokens=8, overlong="drop")
    kept, _ = limit_prompt_tokens(train, letters(), limited, 64)
    assert kept["prompt"][:] == ["abc <{token_budget}>"]  # still to be rendered


def test_the_characters_of_the_field_in_a_row_are_text_where_no_template_has_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "{token_budget}"}])
    section = FileData(source="file", path=path, eval_size=0)
    assert prompt_token_lengths(load_data(section, 0).train, letters(), section, 64) == [14]
