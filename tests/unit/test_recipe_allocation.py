"""What the `allocation` section may say, and the message for what it may not."""

import pytest
from datasets import Dataset

from rlbal.allocation_checks import check_strata, strata_of
from rlbal.allocation_sections import KnapsackAllocation
from rlbal.errors import DataError, RecipeError
from rlbal.recipe import parse_recipe, parse_yaml
from rlbal.trainer_args import bind_trainer
from tests.small_recipe import small

GOOD = [
    "allocation={}",
    "allocation.method=uniform",
    "allocation={retire_at: 0.9, review_fraction: 0.1, strata: level, forgetting: 0}",
    "allocation.method=knapsack",
    "allocation={method: knapsack, belief: mean, value: nonzero, low: 1, high: 16}",
    "allocation={method: knapsack, strata: level, forgetting: 0.05, value: variance}",
]


@pytest.mark.parametrize("override", GOOD)
def test_a_resolved_recipe_reads_back_equal(override: str) -> None:
    recipe = small(override)
    assert parse_recipe(parse_yaml(recipe.dump())) == recipe


def test_defaults_are_the_design_s() -> None:
    section = small("allocation.method=knapsack").allocation
    assert isinstance(section, KnapsackAllocation)
    assert (section.belief, section.value, section.low, section.high) == ("posterior", "knapsack", 2, 128)
    assert section.resolved_forgetting == 0.01 and section.retire_at is None
    assert small().allocation.method == "uniform"
    assert small("allocation={method: knapsack, belief: mean}").allocation.resolved_forgetting == 1.0


BAD = [
    (
        "allocation.method=knapsak",
        "`allocation.method`: 'knapsak' is no method of allocation. Did you mean `knapsack`?",
    ),
    (
        "allocation={method: knapsack, low: 9, high: 8}",
        "`allocation.low` (9) is above `allocation.high` (8); swap them",
    ),
    ("allocation={method: knapsack, low: 0}", "`allocation.low`"),
    ("allocation={method: knapsack, belief: mean, strata: level}", "`allocation.strata` is for `belief: posterior`"),
    ("allocation={method: knapsack, belief: mean, forgetting: 0.5}", "`allocation.forgetting` is for"),
    ("allocation={low: 2}", "`allocation.low` is for `allocation.method: knapsack`"),
    ("allocation={retire_at: 1.5}", "`allocation.retire_at`"),
    ("allocation={review_fraction: 0.1}", "set `allocation.retire_at`, e.g. 0.9"),
    ("allocation={forgetting: 2}", "`allocation.forgetting`"),
    ("data.streaming=true", "datasets are read whole"),
]


@pytest.mark.parametrize(("override", "message"), BAD)
def test_refused_when_read(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        small(override)
    assert message in str(caught.value)


NOTHING_LEFT = "leave nothing to allocate"
BATCH = ["trainer.per_device_train_batch_size=32"]  # 4 prompts x 8 rollouts
BOUND = [
    (["allocation={method: knapsack, low: 9}"], "lower `allocation.low`, best below 8"),
    (["allocation={method: knapsack, high: 7}"], "raise `allocation.high`, best above 8"),
    (
        ["allocation.method=knapsack", "algorithm={name: reinforce, rollouts_per_prompt: 1}"],
        "raise `algorithm.rollouts_per_prompt`",
    ),
    (["trainer.generation_kwargs={max_tokens: 9}"], "`trainer.generation_kwargs.max_tokens` is decided elsewhere"),
    (["trainer.generation_kwargs={n: 2}"], "`trainer.generation_kwargs.n` is decided elsewhere"),
    (["allocation={method: knapsack, low: 8}"], NOTHING_LEFT),
    (["allocation={method: knapsack, high: 8}"], NOTHING_LEFT),
    (["allocation={method: knapsack, low: 1}", "algorithm={name: reinforce, rollouts_per_prompt: 1}"], NOTHING_LEFT),
    (["allocation.method=knapsack", "trainer.per_device_train_batch_size=8"], NOTHING_LEFT),
    (
        ["allocation.method=knapsack", "trainer.use_vllm=true", "trainer.vllm_mode=server"],
        "use `trainer.vllm_mode: colocate`, or `allocation.method: uniform`",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BOUND)
def test_refused_when_bound(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        bind_trainer(small(*BATCH, *overrides))
    assert message in str(caught.value)


def test_bounds_that_just_allow_the_batch() -> None:
    _, plan = bind_trainer(small(*BATCH, "allocation={method: knapsack, low: 7, high: 9}"))
    assert (plan.prompts, plan.rollouts) == (4, 32)


ROWS = Dataset.from_dict({"prompt": ["a", "b", "c"], "level": [3, None, 3]})


def test_strata_are_the_values_of_a_column() -> None:
    assert strata_of(small("allocation.strata=level"), ROWS) == ["3", "None", "3"]
    assert strata_of(small(), ROWS) is None


def test_a_missing_strata_column_is_named_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"column `levl`.*(?s:.)*`level`"):
        check_strata(small("allocation.strata=levl"), ROWS)


def test_too_many_strata_are_refused() -> None:
    rows = Dataset.from_dict({"prompt": ["x"] * 1001, "number": list(range(1001))})
    with pytest.raises(DataError, match="1001 kinds"):
        check_strata(small("allocation.strata=number"), rows)
