"""The `speed:` section: what it refuses, and where compaction would change the gradient."""

import pytest

from rlbal.errors import RecipeError
from rlbal.speed import inexact
from rlbal.trainer_args import bind_trainer
from tests.small_recipe import small


@pytest.mark.parametrize("loss", ["dapo", "cispo", "vespo"])
def test_kl_is_exact_where_the_loss_counts_the_tokens_of_the_whole_batch(loss: str) -> None:
    args, _ = bind_trainer(small("trainer.beta=0.1", f"trainer.loss_type={loss}"))
    assert inexact(args) is None


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["trainer.beta=0.1", "trainer.loss_type=grpo"], "trainer.beta"),
        (["trainer.entropy_coef=0.01"], "trainer.entropy_coef"),
        (["trainer.use_adaptive_entropy=true"], "trainer.entropy_coef"),
        (["trainer.top_entropy_quantile=0.2"], "trainer.top_entropy_quantile"),
    ],
)
def test_where_it_is_not_exact_the_reason_names_the_key(overrides: list[str], key: str) -> None:
    args, _ = bind_trainer(small(*overrides))
    assert key in (inexact(args) or "")
    with pytest.raises(RecipeError, match="max_tokens_per_micro_batch") as refused:
        bind_trainer(small(*overrides, "speed.max_tokens_per_micro_batch=4096"))
    assert key in str(refused.value)


def test_a_mixture_of_experts_is_known_only_with_the_model() -> None:
    args, _ = bind_trainer(small())
    assert inexact(args) is None
    assert "mixture of experts" in (inexact(args, aux_loss=True) or "")


def test_a_token_budget_needs_compaction() -> None:
    with pytest.raises(RecipeError, match="compact_micro_batches"):
        bind_trainer(small("speed.max_tokens_per_micro_batch=4096", "speed.compact_micro_batches=false"))
    bind_trainer(small("speed.max_tokens_per_micro_batch=4096"))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.use_vllm=true", "trainer.use_vllm"),
        ("trainer.use_transformers_continuous_batching=true", "trainer.use_transformers_continuous_batching"),
        ("speed.generation=transformers", "speed.generation"),
    ],
)
def test_rows_at_once_is_for_rlbals_own_generation(override: str, key: str) -> None:
    with pytest.raises(RecipeError, match="rows_at_once") as refused:
        bind_trainer(small("speed.rows_at_once=64", override))
    assert key in str(refused.value)
    bind_trainer(small("speed.rows_at_once=64"))
