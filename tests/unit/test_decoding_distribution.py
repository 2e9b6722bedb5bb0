"""Sampling by uniform numbers is distributed as transformers' sampling, with each of its options."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlbal.decoding import decode, draw
from tests.decoders import SAMPLING, by_transformers, qwen, settings, uniforms

FEATURES: dict[str, Callable[[list[int]], int]] = {
    "first token": lambda row: row[0],
    "second token": lambda row: row[1] if len(row) > 1 else -1,
    "last token": lambda row: row[-1],
    "length": len,
    "repetitions": lambda row: len(row) - len(set(row)),
}
# Seeds are fixed, so nothing here fails by chance. With other random numbers (another version of torch), one of the 30
# comparisons would fall below the first number once in 300 times; what is different falls far below the second.
ALIKE, DIFFERENT = 1e-4, 1e-8


def samples(model: Any, prompts: list[list[int]], rows: int, seed: int, ours: bool, **options: Any) -> list[list[int]]:
    """`rows` completions of each prompt, by us or by transformers."""
    config = settings(**{**SAMPLING, **options})
    repeated = [prompt for prompt in prompts for _ in range(rows)]
    if ours:
        return decode(model, repeated, config, uniforms(len(repeated), seed))
    torch.manual_seed(seed)
    return by_transformers(model, repeated, config)


def chi_square(first: list[int], second: list[int]) -> float:
    """p-value of the two-sample chi-square test on categories, those that are rare put together."""
    values, counts = np.unique([*first, *second], return_counts=True)
    common = {value: i for i, value in enumerate(values[counts >= 20])}
    table = np.zeros((2, len(common) + 1))
    for row, sample in enumerate((first, second)):
        for value in sample:
            table[row, common.get(value, len(common))] += 1
    table = table[:, table.sum(axis=0) > 0]
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    statistic, degrees = float(((table - expected) ** 2 / expected).sum()), table.shape[1] - 1
    return float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(statistic / 2).double()))


def p_values(first: list[list[int]], second: list[list[int]]) -> dict[str, float]:
    """For each feature of a completion, how likely such a difference is where there is none."""
    return {
        name: chi_square([feature(row) for row in first], [feature(row) for row in second])
        for name, feature in FEATURES.items()
    }


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_sampling_is_distributed_as_transformers(penalty: float) -> None:
    # These two end tokens are likely ones, so that lengths depend on the temperature.
    options = {"repetition_penalty": penalty, "eos_token_id": [8, 31]}
    model, prompts = qwen(11), [[20, 30, 40, 50], [60, 61]]
    ours, theirs = (samples(model, prompts, 2500, 1, own, **options) for own in (True, False))
    found = p_values(ours, theirs)
    assert min(found.values()) > ALIKE, found
    # As many samples tell a temperature of 1.3 from one of 0.9, by tokens and by lengths.
    hotter = p_values(theirs, samples(model, prompts, 2500, 2, True, **options, temperature=1.3))
    assert max(hotter[name] for name in ("first token", "second token", "length")) < DIFFERENT, hotter


@pytest.mark.parametrize("option", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"repetition_penalty": 3.0}], ids=str)
def test_every_option_of_sampling_shows(option: dict[str, Any]) -> None:
    """With one option alone, samples are as transformers'; without it, they visibly are not."""
    plain = {"top_k": 0, "top_p": 1.0, "min_p": None, "temperature": 1.0, "eos_token_id": [1, 2, 3]}
    model, prompts = qwen(11), [[20, 30, 40, 50]]
    ours, theirs = (samples(model, prompts, 2500, 3, own, **{**plain, **option}) for own in (True, False))
    found = p_values(ours, theirs)
    assert min(found.values()) > ALIKE, found
    assert min(p_values(theirs, samples(model, prompts, 2500, 4, True, **plain)).values()) < DIFFERENT


def test_draw_takes_the_token_at_the_number() -> None:
    # Probabilities 0, 0.5, 0, 0.5: the cumulative distribution is 0, 0.5, 0.5, 1.
    scores = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    numbers = [0.0, 0.49, 0.5, 0.51, 1 - 2**-53]
    tokens, finite = draw(scores.expand(5, -1), torch.tensor(numbers, dtype=torch.float64))
    assert tokens.tolist() == [1, 1, 3, 3, 3], "a token of probability 0 is never drawn"
    assert finite
    assert not draw(torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5], dtype=torch.float64))[1]
