"""Training on compacted micro-batches goes where plain TRL goes, for every loss, though it computes much less."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

from rlbal.recipe import Recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.trainer_args import training_args
from rlbal.trainers.grpo import BalancedGRPOTrainer
from tests.contract.test_grpo_equals_trl import LOSSES
from tests.support import (
    REWARDS_FILE,
    make_model,
    make_recipe,
    make_trainer,
    make_uneven_rows,
    parameters,
    scripted_rollouts,
)

# Both sides sum the same float32 products of the same tokens, in another order, and advantages are computed by two
# programs; the steps that follow carry the rounding on. Measured: up to 9e-6 of the longest way that a parameter goes,
# and 3e-6 with compaction off. A wrong normaliser is worth more than 1 (`test_the_comparison_notices_a_wrong_weight`).
TOLERANCE = 5e-5
GLOBAL = ("dapo", "cispo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")

# Shapes of the training loop: (rows per micro-batch, accumulation, micro-batches per generation, iterations, steps).
SHAPES = {
    "one micro-batch": (16, 1, 1, 1, 3),
    "accumulation": (4, 4, 4, 1, 3),
    "two iterations, two steps each": (4, 2, 4, 2, 6),
    # An epoch has 24 micro-batches: steps of 10, 10 and 4. (In a second one, the order of prompts is not TRL's.)
    "steps that straddle generations": (4, 10, 4, 1, 3),
    "generations that straddle steps": (4, 2, 6, 1, 6),
}


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection() -> Iterator[None]:
    """Every training run collects garbage three times; what the imports left needs no look."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def parts_of_tiny_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to the usual cost of a part, the rows of these tests are so small that they would share one part."""
    monkeypatch.setattr("rlbal.trainers.microbatch.PART_TOKENS", 4)


class Watched:
    """Keeps what a run computes."""

    tokens: int
    passes: int
    rows_off_policy: float

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.passes += 1
        self.tokens += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        return super()._compute_loss(model, inputs)  # type: ignore[misc]

    def get_off_policy_mask(self, **kwargs: Any) -> torch.Tensor:
        mask: torch.Tensor = GRPOTrainer.get_off_policy_mask(**kwargs)
        self.rows_off_policy += (mask == 0).sum().item()
        return mask


class PerToken(Watched):
    """Advantages of shape (B, T) that differ from token to token in size and sign, and are 0 for some."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        output["advantages"] = output["advantages"][:, None] * (output["completion_ids"] % 5 - 1)
        return output


def rewards(dead: list[int]) -> dict[str, Any]:
    """One reward that varies, but not for some prompts."""
    return {"even": {"function": f"{REWARDS_FILE}:even_share_but", "args": {"dead": dead}, "range": [0, 1]}}


def recipe_for(folder: Path, shape: str = "accumulation", dead: list[int] | None = None, **changes: Any) -> Recipe:
    """A recipe of one of the shapes, with about half of the groups dead."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
    settings = {f"trainer__{name}": value for name, value in zip((*names, "max_steps"), SHAPES[shape], strict=True)}
    settings["rewards__functions"] = rewards(list(range(0, 24, 2)) if dead is None else dead)
    settings |= {"model__tiny__layers": 1, "trainer__gradient_checkpointing": False}  # only to be quick
    if changes.get("trainer__loss_type") == "luspo":
        settings["trainer__learning_rate"] = 0.05  # it adds up the tokens that other losses average
    return make_recipe(folder, **(settings | changes))


def train(kind: type, recipe: Recipe, mixin: type, model: Any | None = None, **kwargs: Any) -> Any:
    """A trained BalancedGRPOTrainer or GRPOTrainer on scripted rollouts of prompts of many lengths."""
    suite, watched = RewardSuite(recipe.rewards), type("Trainer", (mixin, kind), {})
    policy, tokenizer = make_model(recipe)
    policy, rows = model or policy, make_uneven_rows()
    if kind is BalancedGRPOTrainer:
        trainer: Any = make_trainer(recipe, suite, rows=rows, model=policy, **kwargs)
        trainer.__class__ = watched
    else:
        trainer = watched(
            model=policy,
            args=training_args(recipe, 1)[0],
            train_dataset=rows,
            reward_funcs=list(suite.functions),
            processing_class=tokenizer,
            rollout_func=scripted_rollouts,
            **kwargs,
        )
    trainer.tokens = trainer.passes = trainer.rows_off_policy = 0
    trainer.start = parameters(trainer.model)
    torch.manual_seed(0)  # TRL shuffles the rows of a generation batch
    trainer.train()
    return trainer


def train_both(
    recipe: Recipe, mixin: type = Watched, make: Callable[[], Any] = lambda: None, **kwargs: Any
) -> tuple[Any, Any]:
    """(rlbal's, TRL's) trainer after the same run."""
    ours, trl = (train(kind, recipe, mixin, make(), **kwargs) for kind in (BalancedGRPOTrainer, GRPOTrainer))
    return ours, trl


def steps_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def distance(ours: Any, trl: Any) -> float:
    """How far apart the runs ended, as a share of the longest way that a parameter went."""
    torch.testing.assert_close(ours.start, trl.start, rtol=0, atol=0)
    way = (parameters(trl.model) - trl.start).abs().max().item()
    assert way > 1e-4, "nothing was trained"
    return (parameters(ours.model) - parameters(trl.model)).abs().max().item() / way


def assert_equal(ours: Any, trl: Any) -> None:
    """Same parameters after the run, and the same loss and length of the gradient at every step."""
    assert distance(ours, trl) < TOLERANCE
    assert len(steps_of(ours)) == len(steps_of(trl)) == ours.args.max_steps
    for mine, theirs in zip(steps_of(ours), steps_of(trl), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE, abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=TOLERANCE, abs=1e-6)
    assert max(step["grad_norm"] for step in steps_of(trl)) > 1e-3


def assert_compacted(ours: Any, trl: Any) -> None:
    """The equality is not that of doing the same: fewer tokens went through the model, in other micro-batches."""
    assert ours.tokens < 0.9 * trl.tokens
    assert ours.passes != trl.passes
    assert max(step["compaction/tokens"] for step in steps_of(ours)) < 0.9
    assert not ours.notes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_half_of_the_groups_dead(loss: str, shape: str, tmp_path: Path) -> None:
    ours, trl = train_both(recipe_for(tmp_path, shape, trainer__loss_type=loss))
    assert_equal(ours, trl)
    assert_compacted(ours, trl)
    assert max(step["compaction/rows"] for step in steps_of(ours)) < 0.9


@pytest.mark.parametrize("loss", LOSSES)
def test_no_group_dead(loss: str, tmp_path: Path) -> None:
    ours, trl = train_both(recipe_for(tmp_path, dead=[], trainer__loss_type=loss))
    assert_equal(ours, trl)
    assert_compacted(ours, trl)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_with_dead_groups_alone(loss: str, tmp_path: Path) -> None:
    """The optimizer steps all the same: weight decay and momentum go on, and the gradient is 0 rather than missing."""
    # The order of the prompts is `torch.randperm` with the recipe's seed; a batch takes the next four.
    seed = recipe_for(tmp_path).seed
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist()
    changes = {
        "trainer__loss_type": loss,
        "trainer__optim": "adamw_torch",
        "trainer__weight_decay": 0.1,
        "trainer__learning_rate": 1e-2,
        # Adam divides by the gradient's size. Where that is rounding alone, this keeps it from becoming a step.
        "trainer__adam_epsilon": 1e-2,
    }
    ours, trl = train_both(recipe_for(tmp_path, dead=order[4:8], **changes))
    assert_equal(ours, trl)
    assert [step["grad_norm"] > 0 for step in steps_of(trl)] == [True, False, True]
    assert [step["grad_norm"] > 0 for step in steps_of(ours)] == [True, False, True]
    assert steps_of(ours)[1]["entropy"] > 1.0, "TRL's entropy of a batch with dead groups alone is that of its tokens"
    # 16 rows are left out, and one stands in for them.
    assert steps_of(ours)[1]["compaction/rows"] == pytest.approx(1 / 16)
    assert steps_of(ours)[0]["compaction/rows"] == 1.0


def test_training_moves_on_through_dead_batches(tmp_path: Path) -> None:
    """What the test above is about: with every group dead from the start, weight decay alone moves parameters."""
    changes = {"trainer__optim": "adamw_torch", "trainer__weight_decay": 0.5, "trainer__learning_rate": 1e-2}
    ours, trl = train_both(recipe_for(tmp_path, dead=list(range(24)), **changes))
    assert distance(ours, trl) < TOLERANCE
    assert ours.passes == 3 and trl.passes == 12
    # Three steps of weight decay: (1 − 0.01·0.5)³ = 0.985075.
    weight, before = parameters(ours.model), ours.start
    torch.testing.assert_close(weight[:1000], before[:1000] * 0.985075, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", ["one micro-batch", "two iterations, two steps each"])
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_by_tokens(loss: str, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a large machine: what a part costs apart from its tokens makes parts as large as they may be.
    monkeypatch.setattr("rlbal.trainers.microbatch.PART_TOKENS", 512)
    recipe = recipe_for(tmp_path, shape, trainer__loss_type=loss, speed__max_tokens_per_micro_batch=64)
    ours, trl = train_both(recipe)
    assert_equal(ours, trl)
    assert_compacted(ours, trl)


@pytest.mark.parametrize("shape", ["accumulation", "two iterations, two steps each"])
@pytest.mark.parametrize("loss", LOSSES)
def test_ratios_of_sequences(loss: str, shape: str, tmp_path: Path) -> None:
    changes = {"trainer__loss_type": loss, "trainer__importance_sampling_level": "sequence"}
    ours, trl = train_both(recipe_for(tmp_path, shape, **changes))
    assert_equal(ours, trl)
    assert_compacted(ours, trl)


@pytest.mark.parametrize("loss", LOSSES)
def test_truncated_completions_masked(loss: str, tmp_path: Path) -> None:
    ours, trl = train_both(recipe_for(tmp_path, trainer__loss_type=loss, trainer__mask_truncated_completions=True))
    assert_equal(ours, trl)
    assert_compacted(ours, trl)
    # A fifth of the scripted completions has no end token: their rows go too.
    plain = train(BalancedGRPOTrainer, recipe_for(tmp_path, trainer__loss_type=loss, trainer__max_steps=1), Watched)
    assert steps_of(ours)[0]["compaction/rows"] < steps_of(plain)[0]["compaction/rows"]


@pytest.mark.parametrize("loss", LOSSES)
def test_two_sided_clipping_and_off_policy_mask(loss: str, tmp_path: Path) -> None:
    changes = {
        "trainer__loss_type": loss,
        "trainer__off_policy_mask_threshold": 1e-3,
        "trainer__learning_rate": 0.2 if loss == "luspo" else 2.0,
        **({"trainer__delta": 1.3} if loss in CLIPPED else {}),
    }
    ours, trl = train_both(recipe_for(tmp_path, "two iterations, two steps each", **changes))
    assert_equal(ours, trl)
    assert_compacted(ours, trl)
    assert ours.rows_off_policy == trl.rows_off_policy > 0


@pytest.mark.parametrize("shape", ["accumulation", "two iterations, two steps each"])
@pytest.mark.parametrize("loss", LOSSES)
def test_advantages_per_token(loss: str, shape: str, tmp_path: Path) -> None:
    ours, trl = train_both(recipe_for(tmp_path, shape, trainer__loss_type=loss), PerToken)
    assert_equal(ours, trl)
    assert_compacted(ours, trl)


@pytest.mark.parametrize("loss", LOSSES)
def test_lora_and_padding_to_a_multiple(loss: str, tmp_path: Path) -> None:
    changes = {"trainer__loss_type": loss, "trainer__pad_to_multiple_of": 4, "trainer__learning_rate": 5.0}
    recipe = recipe_for(tmp_path, **changes)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ours, trl = (train_with_seed(kind, recipe, lora) for kind in (BalancedGRPOTrainer, GRPOTrainer))
    assert_equal(ours, trl)
    assert_compacted(ours, trl)


def train_with_seed(kind: type, recipe: Recipe, lora: LoraConfig) -> Any:
    torch.manual_seed(7)  # the adapter is drawn when the trainer is made
    return train(kind, recipe, Watched, peft_config=lora)


def saved_model(folder: Path) -> Callable[[], Any]:
    """A policy that TRL can load once more, as its reference."""
    make_model(make_recipe(folder))[0].save_pretrained(folder / "policy")
    return lambda: AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)


@pytest.mark.parametrize("shape", ["accumulation", "two iterations, two steps each"])
@pytest.mark.parametrize("loss", GLOBAL)
def test_kl_keeps_every_row_where_that_is_exact(loss: str, shape: str, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, shape, trainer__loss_type=loss, trainer__beta=0.5)
    ours, trl = train_both(recipe, make=saved_model(tmp_path))
    assert_equal(ours, trl)
    assert_compacted(ours, trl)
    assert all(step["compaction/rows"] == 1.0 for step in steps_of(ours))
    assert steps_of(ours)[-1]["kl"] > 1e-4


def mixture_of_experts() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        pad_token_id=256,
        eos_token_id=257,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config)


INEXACT: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"KL with {loss}": ({"trainer__beta": 0.5, "trainer__loss_type": loss}, "`trainer.beta` adds a KL term")
        for loss in LOSSES
        if loss not in GLOBAL
    },
    "entropy bonus": ({"trainer__entropy_coef": 0.1}, "the entropy bonus"),
    "adaptive entropy bonus": ({"trainer__use_adaptive_entropy": True}, "the entropy bonus"),
    "top entropy quantile": ({"trainer__top_entropy_quantile": 0.5}, "`trainer.top_entropy_quantile`"),
    "mixture of experts": ({}, "mixture of experts"),
}


@pytest.mark.parametrize("case", INEXACT)
def test_where_it_is_not_exact_it_is_off_and_says_so_once(case: str, tmp_path: Path) -> None:
    changes, reason = INEXACT[case]
    recipe = recipe_for(tmp_path, "two iterations, two steps each", **changes)
    ours, trl = train_both(recipe, make=mixture_of_experts if "experts" in case else saved_model(tmp_path))
    assert_equal(ours, trl)
    assert (ours.passes, ours.tokens) == (trl.passes, trl.tokens)
    assert "compaction/tokens" not in steps_of(ours)[-1]
    (note,) = ours.notes
    assert note.startswith("micro-batches are not compacted: ") and reason in note


def test_a_mixture_of_experts_without_auxiliary_loss_is_compacted(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "two iterations, two steps each", trainer__router_aux_loss_coef=0.0)
    ours, trl = train_both(recipe, make=mixture_of_experts)
    assert_equal(ours, trl)
    assert_compacted(ours, trl)


def test_switched_off(tmp_path: Path) -> None:
    ours, trl = train_both(recipe_for(tmp_path, speed__compact_micro_batches=False))
    assert_equal(ours, trl)
    assert (ours.passes, ours.tokens) == (trl.passes, trl.tokens)
    assert "compaction/tokens" not in steps_of(ours)[-1] and not ours.notes


@pytest.mark.parametrize("loss", ["grpo", "bnpo"])
def test_the_comparison_notices_a_wrong_weight(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the factor of old over new normaliser, the runs end far apart compared with the tolerance."""
    monkeypatch.setattr("rlbal.trainers.microbatch._normaliser", lambda one, loss: torch.ones(1))
    ours, trl = train_both(recipe_for(tmp_path, trainer__loss_type=loss))
    assert distance(ours, trl) > 1e-2
