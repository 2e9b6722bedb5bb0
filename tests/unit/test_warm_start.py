import json
import math
import statistics

import pytest
import torch
from datasets import Dataset

from rlbal.errors import DataError, TrainingStopped
from rlbal.recipe import TinySection, WarmStartSection
from rlbal.tiny import build_model, build_tokenizer
from rlbal.warm_start import IGNORED, Dice, _batches, forgetful_sum, warm_start, worked_trace

FLAWLESS = {"carry_error": 0, "random_error": 0, "repeat_step": 0, "drop_tag": 0}


def trace(expression: str, dice: Dice | None = None, **flaws: float) -> str:
    return worked_trace(expression, WarmStartSection(**(FLAWLESS | flaws)), dice or Dice(0))


class ScriptedDice(Dice):
    """Flips come out as scripted (after those with a certain outcome); a choice takes the scripted position."""

    def __init__(self, flips: list[bool], position: int = 0) -> None:
        super().__init__(0)
        self.flips, self.position = flips, position

    def flip(self, probability: float) -> bool:
        return bool(probability) if probability in (0, 1) else self.flips.pop(0)

    def choose(self, options):
        return options[self.position]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("4 - 1 - 3 - 7", "<think>4;-1=3;-3=0;-7=-7</think><answer>-7</answer>"),
        ("8 + 5", "<think>8;+5=13</think><answer>13</answer>"),
        ("7", "<think>7</think><answer>7</answer>"),
        ("-3 + -4 - -12", "<think>-3;-4=-7;+12=5</think><answer>5</answer>"),
    ],
)
def test_trace_without_flaws(expression, expected):
    assert trace(expression) == expected


@pytest.mark.parametrize(
    ("total", "change", "expected"),
    [
        (4, 5, 9),  # nothing to forget
        (8, 5, 3),  # 13 without its carry
        (13, -5, 18),  # the ten is not borrowed from
        (10, -1, 19),
        (3, -7, 4),  # the sign is forgotten
        (0, -7, 7),
        (-3, 5, -2),
        (-7, -8, -5),  # -15 without its carry
        (-12, 4, -18),  # -8, but the ten is not borrowed from
        (-3, 3, 0),  # zero has no sign to forget
        (28, 45, 63),  # 8 + 5 = 3, 2 + 4 = 6
        (95, 8, 93),
        (103, -8, 105),  # 3 - 8 = 5, nothing borrowed
    ],
)
def test_forgetful_sum(total, change, expected):
    assert forgetful_sum(total, change) == expected


def test_the_planted_flaw_carries_into_the_following_steps_and_the_answer():
    # 8 + 5 forgets its carry: 3; 3 - 7 forgets its sign: 4; 4 + 1 has nothing to forget: 5.
    assert trace("8 + 5 - 7 + 1", carry_error=1) == "<think>8;+5=3;-7=4;+1=5</think><answer>5</answer>"


def test_each_crossing_is_forgotten_by_its_own_flip():
    dice = ScriptedDice([False, True])  # 8 + 5 = 13 is right, 13 - 5 = 18 is not, 18 + 1 = 19 needs no carry
    assert trace("8 + 5 - 5 + 1", dice, carry_error=0.5) == "<think>8;+5=13;-5=18;+1=19</think><answer>19</answer>"


def test_random_error_moves_the_result_by_a_drawn_offset():
    dice = ScriptedDice([False, True], position=0)  # the first offset is -3: 3 - 1 = 2 becomes -1
    assert trace("2 + 1 - 1", dice, random_error=0.5) == "<think>2;+1=3;-1=-1</think><answer>-1</answer>"


def test_a_step_is_written_twice_where_the_flip_says_so():
    dice = ScriptedDice([False, True])
    assert trace("4 - 1 - 3", dice, repeat_step=0.5) == "<think>4;-1=3;-3=0,-3=0</think><answer>0</answer>"


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0, "4;-1=3</think><answer>3</answer>"),
        (1, "<think>4;-1=3<answer>3</answer>"),
        (2, "<think>4;-1=3</think>3</answer>"),
        (3, "<think>4;-1=3</think><answer>3"),
    ],
)
def test_one_tag_is_dropped(position, expected):
    assert trace("4 - 1", ScriptedDice([], position), drop_tag=1) == expected


def test_dice_add_up_their_surprise():
    dice = Dice(0)
    outcome = dice.flip(0.2)
    assert dice.nats == pytest.approx(-math.log(0.2 if outcome else 0.8))
    before = dice.nats
    assert dice.choose((1, 2, 3)) in (1, 2, 3)
    assert dice.nats - before == pytest.approx(math.log(3))
    before = dice.nats
    assert (dice.flip(0), dice.flip(1)) == (False, True)
    assert dice.nats == before


def test_flaws_come_as_often_as_asked():
    dice, settings = Dice(3), WarmStartSection(**(FLAWLESS | {"carry_error": 0.55}))
    forgotten = sum("=3<" in worked_trace("8 + 5", settings, dice) for _ in range(4000))
    assert forgotten / 4000 == pytest.approx(0.55, abs=4 * math.sqrt(0.55 * 0.45 / 4000))  # four standard errors


def problems(*expressions: str) -> Dataset:
    return Dataset.from_list([{"prompt": f"{e} =", "metadata": json.dumps({"expression": e})} for e in expressions])


EASY = problems("1 + 1", "2 + 3", "4 - 1", "5 - 2", "7 + 2", "9 - 4")
TINY = TinySection(hidden_size=32, heads=2, layers=1)


def start(steps: int, train: Dataset = EASY, seed: int = 0, **settings):
    tokenizer = build_tokenizer(["<think>", "</think>", "<answer>", "</answer>"])
    model = build_model(TINY, tokenizer, seed=0)
    section = WarmStartSection(**(FLAWLESS | {"steps": steps, "batch_size": 8, "learning_rate": 1e-2} | settings))
    return model, tokenizer, warm_start(model, tokenizer, train, section, seed)


def test_only_completions_are_learnt():
    tokenizer = build_tokenizer(["<think>", "</think>", "<answer>", "</answer>"])
    section = WarmStartSection(**(FLAWLESS | {"batch_size": 2}))
    (ids, labels), *others = _batches(problems("4 - 1", "4 - 1 - 3 - 7"), tokenizer, section, Dice(0), 3)
    assert len(others) == 2
    for row_ids, row_labels in zip(ids, labels, strict=True):
        learnt = tokenizer.decode(row_ids[row_labels != IGNORED])
        prompt = tokenizer.decode(row_ids[row_labels == IGNORED], skip_special_tokens=True)
        assert (prompt, learnt) in [
            ("4 - 1 =", "<think>4;-1=3</think><answer>3</answer><|end|>"),
            ("4 - 1 - 3 - 7 =", "<think>4;-1=3;-3=0;-7=-7</think><answer>-7</answer><|end|>"),
        ]
        assert torch.equal(row_labels[row_labels != IGNORED], row_ids[row_labels != IGNORED])


TOLD = Dataset.from_list([{**row, "prompt": "{token_budget}: " + row["prompt"]} for row in EASY])


def batches(train: Dataset, largest_budget: int | None, count: int = 40) -> tuple[list[str], list[str], float]:
    """The prompts and traces of some batches, with the dice's surprise."""
    tokenizer, dice = build_tokenizer([]), Dice(0)
    section = WarmStartSection(**(FLAWLESS | {"batch_size": 8, "repeat_step": 0.5}))
    prompts, traces = [], []
    for ids, labels in _batches(train, tokenizer, section, dice, count, largest_budget):
        for row_ids, row_labels in zip(ids, labels, strict=True):
            completion = row_labels != IGNORED
            prompts.append(tokenizer.decode(row_ids[~completion], skip_special_tokens=True))
            traces.append(tokenizer.decode(row_ids[completion]))
    return prompts, traces, dice.nats


def test_prompts_tell_random_budgets_that_say_nothing_of_the_trace():
    prompts, traces, _ = batches(TOLD, largest_budget=12)
    pairs = [(prompt.split(": "), len(trace)) for prompt, trace in zip(prompts, traces, strict=True)]
    told = [int(number) for (number, _), _ in pairs]
    assert set(told) == set(range(1, 13))
    assert {question for (_, question), _ in pairs} == set(EASY["prompt"])
    lengths = [length for _, length in pairs]
    assert len(set(lengths)) > 1  # steps are repeated or not
    # 320 pairs: the correlation of independent draws has a standard error of 1/sqrt(320) = 0.056.
    assert abs(statistics.correlation(told, lengths)) < 4 * 0.056


def test_budgets_are_drawn_beside_the_dice():
    _, _, nats = batches(TOLD, largest_budget=12, count=2)
    flips = 16  # one per trace, of one step each; flips with a certain outcome are no surprise
    assert nats == pytest.approx(flips * math.log(2))


def test_without_the_field_nothing_is_drawn_or_replaced():
    plain = Dataset.from_list([{**row, "prompt": "{token_budget}"} for row in EASY])
    prompts, traces, _ = batches(plain, largest_budget=None)
    assert set(prompts) == {"{token_budget}"}
    assert batches(EASY, largest_budget=None)[1] == traces
    assert batches(TOLD, largest_budget=12)[1] != traces


def test_a_model_that_was_told_budgets_converges_on_the_same_floor():
    tokenizer = build_tokenizer(["<think>", "</think>", "<answer>", "</answer>"])
    model = build_model(TINY, tokenizer, seed=0)
    section = WarmStartSection(**(FLAWLESS | {"steps": 300, "batch_size": 8, "learning_rate": 1e-2}))
    result = warm_start(model, tokenizer, TOLD, section, 0, largest_budget=12)
    assert 0 <= result.floor < 1e-9 and 0 < result.excess < 0.02


def test_a_converged_model_writes_the_traces():
    model, tokenizer, result = start(300)
    assert 0 <= result.floor < 1e-9  # without flaws nothing is left to the dice
    assert 0 < result.excess < 0.02
    prompt = tokenizer("7 + 2 =", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, 7:]
    assert tokenizer.decode(out) == "<think>7;+2=9</think><answer>9</answer><|end|>"


def test_the_floor_is_the_entropy_of_the_flaws():
    # One flip at one half: ln 2 nats for `<think>1;+1=2</think><answer>2</answer>` and its end, 11 tokens, or for 16
    # with `,+1=2`.
    _, _, result = start(200, problems("1 + 1"), repeat_step=0.5)
    assert math.log(2) / 16 < result.floor < math.log(2) / 11
    assert result.floor == pytest.approx(math.log(2) / 13.5, rel=0.1)
    assert abs(result.excess) < 0.01


def test_training_stops_where_the_warm_start_did_not_converge():
    with pytest.raises(TrainingStopped, match="did not converge in 5 steps") as stopped:
        start(5)
    assert "model.tiny.warm_start.steps" in stopped.value.fix
    with pytest.raises(TrainingStopped, match="did not converge"):
        start(30, learning_rate=1e6)  # diverged: the loss is huge or not a number


def test_the_seed_decides_everything(monkeypatch):
    monkeypatch.setattr("rlbal.warm_start.MAX_EXCESS", math.inf)  # a few steps will do here
    weights = [start(10, seed=seed)[0].lm_head.weight for seed in (4, 4, 5)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1 + 1 ="}], "no column `metadata`"),
        ([{"metadata": "{}"}], "no column `prompt`"),
        ([{"prompt": "a", "metadata": '{"expression": "1 + 1"}'}, {"prompt": "b", "metadata": "{}"}], "row 1: no"),
        ([{"prompt": "a", "metadata": "not json"}], "row 0: no `chain_sum` expression"),
        ([{"prompt": "a", "metadata": None}], "row 0: no `chain_sum` expression"),
        ([{"prompt": "a", "metadata": "[" * 100_000}], "row 0: no `chain_sum` expression"),
        ([{"prompt": "a", "metadata": json.dumps({"expression": "9" * 5000})}], "row 0: no `chain_sum` expression"),
        ([{"prompt": "a", "metadata": "[1]"}], "row 0: no `chain_sum` expression"),
        ([{"prompt": "a", "metadata": '{"expression": "2 * 3"}'}], "row 0: no `chain_sum` expression"),
        ([{"prompt": "a", "metadata": '{"expression": 3}'}], "row 0: no `chain_sum` expression"),
        ([{"prompt": [{"role": "user", "content": "a"}], "metadata": "{}"}], "plain text in column `prompt`"),
    ],
)
def test_other_data_is_refused(rows, message):
    with pytest.raises(DataError, match=message):
        start(1, Dataset.from_list(rows))


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        start(1, EASY.select([]))
