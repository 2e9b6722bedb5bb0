"""The cache with room to grow holds what transformers' own holds."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicLayer

from rlbal.growing_cache import GrowingLayer


def updates(dice: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """A prefill, then tokens, selections and repetitions in any order."""
    rows, length = 3, 7
    yield "update", (rows, length)
    for _ in range(60):
        if dice.random() < 0.15:
            index = torch.from_numpy(dice.integers(0, rows, size=dice.integers(1, 6)))
            rows = len(index)
            yield "select", index
        else:
            yield "update", (rows, int(dice.choice([1, 1, 1, 40])))


@pytest.mark.parametrize("seed", range(4))
def test_the_growing_cache_holds_what_the_dynamic_one_holds(seed: int) -> None:
    dice, theirs, ours = np.random.default_rng(seed), DynamicLayer(), GrowingLayer()
    for action, what in updates(dice):
        if action == "select":
            for layer in (theirs, ours):
                layer.batch_select_indices(what)
        else:
            rows, length = what
            states = [torch.from_numpy(dice.normal(size=(rows, 2, length, 4))).float() for _ in range(2)]
            for mine, other in zip(ours.update(*states), theirs.update(*states), strict=True):
                assert torch.equal(mine, other)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)  # type: ignore[arg-type]
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_the_growing_cache_does_not_copy_for_every_token() -> None:
    layer, copies, place = GrowingLayer(), 0, 0
    for _ in range(200):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        assert layer.keys is not None
        copies, place = copies + (layer.keys.data_ptr() != place), layer.keys.data_ptr()
    assert copies <= 8


def test_selecting_from_an_empty_cache_does_nothing() -> None:
    layer = GrowingLayer()
    layer.batch_select_indices(torch.tensor([0, 0]))
    assert layer.get_seq_length() == 0
