"""The gradients that the probes find are those of full backward passes through TRL's loss, one for each reward."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rlbal.balance.gradients import gram_matrix
from rlbal.errors import RecipeError
from rlbal.recipe import Recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.trainers.grpo import BalancedGRPOTrainer
from rlbal.trainers.influence import NEXT_TO_NOTHING, last_projection, teach_all, token_weights
from tests.contract.test_grpo_equals_trl import LOSSES
from tests.support import REWARDS_FILE, make_model, make_recipe, make_trainer, make_uneven_rows

FUNCTIONS = {
    "even": {"function": f"{REWARDS_FILE}:even_share", "weight": 1.0, "range": [0, 1]},
    "short": {"function": f"{REWARDS_FILE}:short", "weight": 0.5, "range": [0, 1]},
    "concise": {"function": "reward_fns.length:conciseness", "weight": 0.3, "range": [0, 1]},
}


class Probed(BalancedGRPOTrainer):
    """Keeps the gradients of the first optimizer step, and where `only` says so trains on one reward alone."""

    only: int | None = None
    steps_before = 0
    found: torch.Tensor | None = None
    whole: dict[str, torch.Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.only is not None and self.state.global_step == self.steps_before:
            own_NK = self.balance.reward_advantages(self.batch)
            output["advantages"] = own_NK[:, self.only] if self.only >= 0 else torch.zeros(len(own_NK))
            output.pop("reward_advantages", None)
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.state.global_step == self.steps_before:
            self.found = getattr(self.balance.weighting, "gram_KK", None)
            self.whole = {
                name: parameter.grad.clone()
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            }
        return loss


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    """Four micro-batches in two optimizer steps, or what `changes` say."""
    settings = {
        "rewards__functions": FUNCTIONS,
        "weighting": {"method": "gradient", "gradient_scale": "none", "step_size": 0.01},
        "trainer__per_device_train_batch_size": 8,
        "trainer__gradient_accumulation_steps": 2,
        "trainer__gradient_checkpointing": False,
        "trainer__learning_rate": 0.02,
        "trainer__max_steps": 1,
    }
    return make_recipe(folder, **{**settings, **changes})


def train(
    recipe: Recipe, only: int | None = None, steps_before: int = 0, lora: bool | str = False, model: Any = None
) -> Any:
    policy: Any = model() if model else make_model(recipe)[0]
    if recipe.trainer.get("beta"):  # TRL loads the reference from where the policy comes from
        folder = Path(recipe.output_dir) / "policy"
        policy.save_pretrained(folder)
        policy = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
    torch.manual_seed(7)  # LoRA's matrices
    trainer = make_trainer(
        recipe, RewardSuite(recipe.rewards), rows=make_uneven_rows(), model=policy, peft_config=config
    )
    if lora == "beside":
        trainer.model.get_submodule("base_model.model.model.layers.1.mlp.down_proj.base_layer").requires_grad_(True)
    trainer.__class__, trainer.only, trainer.steps_before = Probed, only, steps_before
    torch.manual_seed(0)  # TRL shuffles the rows of a generation batch
    trainer.train()
    return trainer


def gram_of_full_passes(recipe: Recipe, wanted: Any, **kwargs: Any) -> torch.Tensor:
    """Gram matrix of the gradients that TRL's own loss has when it trains on each reward alone, without compaction.

    The pull of the KL term, which is there without any reward too, is taken off.
    """
    plain = recipe.model_copy(update={"speed": recipe.speed.model_copy(update={"compact_micro_batches": False})})
    nothing = train(plain, only=-1, **kwargs).whole
    rows = []
    for k in range(len(FUNCTIONS)):
        whole = train(plain, only=k, **kwargs).whole
        difference = [whole[name] - nothing.get(name, 0.0) for name in sorted(whole) if wanted(name)]
        rows.append(torch.cat([one.flatten().double() for one in difference]))
    stacked = torch.stack(rows)
    return stacked @ stacked.T


def assert_same(found: torch.Tensor | None, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert found is not None and found.shape == expected.shape
    assert expected.diagonal().min() > 0
    lengths = expected.diagonal().sqrt()
    error = ((found - expected) / lengths[:, None] / lengths[None, :]).abs().max().item()
    assert error < tolerance, f"{error:.1e}"


def last_down_projection(name: str) -> bool:
    return name.endswith("layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass_equals_a_pass_per_reward_for_every_loss(loss: str, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, trainer__loss_type=loss)
    assert_same(train(recipe).found, gram_of_full_passes(recipe, last_down_projection))


VARIANTS = {
    "scale none": {"advantage__scale": "none"},
    "batch std": {"advantage__scale": "batch_std"},
    "each reward by itself": {"advantage__order": "normalize_then_sum"},
    "gdpo": {"advantage__order": "normalize_then_sum", "advantage__whiten": True},
    "beta": {"advantage__scale": "beta", "advantage__order": "normalize_then_sum"},
    "rloo": {"algorithm__name": "rloo"},
    "reinforce": {"algorithm__name": "reinforce"},
    "checkpointing": {"trainer__gradient_checkpointing": True},
    "sequence ratios": {"trainer__importance_sampling_level": "sequence"},
    "steps before the end of a generation batch": {"trainer__steps_per_generation": 4},
    "no compaction": {"speed__compact_micro_batches": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_pass_equals_a_pass_per_reward(name: str, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, trainer__loss_type="dapo", **VARIANTS[name])
    assert_same(train(recipe).found, gram_of_full_passes(recipe, last_down_projection))


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_the_pull_of_the_reference_is_no_rewards_gradient(loss: str, tmp_path: Path) -> None:
    """In the second step, where the policy has left the reference."""
    recipe = recipe_for(tmp_path, trainer__loss_type=loss, trainer__beta=0.5, trainer__max_steps=2)
    expected = gram_of_full_passes(recipe, last_down_projection, steps_before=1)
    assert_same(train(recipe, steps_before=1).found, expected, 1e-5)  # differences of larger gradients


def test_reentrant_checkpointing(tmp_path: Path) -> None:
    kwargs = {"use_reentrant": True}
    changes = {"trainer__gradient_checkpointing": True, "trainer__gradient_checkpointing_kwargs": kwargs}
    found = train(recipe_for(tmp_path, **changes)).found
    assert_same(found, gram_of_full_passes(recipe_for(tmp_path), last_down_projection))


@pytest.mark.parametrize(
    ("probe", "wanted"), [("last_blocks", ".layers.1."), ("trainable", "")], ids=["last block", "everything"]
)
def test_wide_probes(probe: str, wanted: str, tmp_path: Path) -> None:
    weighting = {"method": "gradient", "gradient_scale": "none", "probe": probe}
    recipe = recipe_for(tmp_path, trainer__loss_type="dapo", weighting=weighting)
    assert_same(train(recipe).found, gram_of_full_passes(recipe, lambda name: wanted in name))


def test_wide_probes_through_checkpoints(tmp_path: Path) -> None:
    weighting = {"method": "gradient", "gradient_scale": "none", "probe": "trainable"}
    recipe = recipe_for(tmp_path, trainer__loss_type="dapo", weighting=weighting, trainer__gradient_checkpointing=True)
    assert_same(train(recipe).found, gram_of_full_passes(recipe, lambda name: True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__top_entropy_quantile": 0.5}, "`trainer.top_entropy_quantile` trains on some"),
        (
            {
                "trainer__gradient_checkpointing": True,
                "trainer__gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            "cannot go back through reentrant checkpoints",
        ),
    ],
)
def test_what_wide_probes_refuse(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    weighting = {"method": "gradient", "probe": "trainable"}
    with pytest.raises(RecipeError, match=message):
        train(recipe_for(tmp_path, weighting=weighting, **changes))


def test_tokens_that_training_leaves_out_count_for_nobody(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, trainer__loss_type="dapo", trainer__top_entropy_quantile=0.5)
    assert_same(train(recipe).found, gram_of_full_passes(recipe, last_down_projection))


def test_lora_matrices_are_what_can_be_trained(tmp_path: Path) -> None:
    weighting = {"method": "gradient", "gradient_scale": "none", "probe": "trainable"}
    recipe = recipe_for(tmp_path, trainer__loss_type="dapo", weighting=weighting)
    found = train(recipe, lora=True).found
    assert_same(found, gram_of_full_passes(recipe, lambda name: "lora_" in name, lora=True))


def test_last_projection_under_lora(tmp_path: Path) -> None:
    """Its weight is frozen; what the probe finds is the gradient that it has where it may learn beside LoRA."""
    recipe = recipe_for(tmp_path, trainer__loss_type="dapo")
    trainer = train(recipe, lora=True)
    assert trainer._probe.name == "mlp.down_proj"
    assert all("lora_" in name for name in trainer.whole)
    expected = gram_of_full_passes(recipe, lambda name: "layers.1.mlp.down_proj.base_layer" in name, lora="beside")
    assert_same(trainer.found, expected)


def test_a_row_whose_rewards_cancel_still_counts(tmp_path: Path) -> None:
    functions = {
        "even": FUNCTIONS["even"],
        "odd": {"function": f"{REWARDS_FILE}:odd_share", "weight": 1.0, "range": [0, 1]},
        "short": FUNCTIONS["short"] | {"weight": 1e-6},
    }
    weighting = {"method": "gradient", "gradient_scale": "none", "floor": 0.0}
    changes = {"advantage__scale": "none", "rewards__functions": functions, "weighting": weighting}
    recipe = recipe_for(tmp_path, trainer__loss_type="dapo", **changes)
    trainer = train(recipe)
    assert trainer.found is not None
    even, odd = trainer.found[0, 0].item(), trainer.found[0, 1].item()
    assert odd == pytest.approx(-even, rel=1e-5)
    expected = gram_of_full_passes(recipe, last_down_projection)
    assert_same(trainer.found, expected)


def test_teach_all_touches_only_rows_that_cancel() -> None:
    advantages = torch.tensor([0.0, 0.0, 0.5])
    own = torch.tensor([[1.0, -1.0], [0.0, 0.0], [1.0, 0.0]])
    assert teach_all(advantages, own).tolist() == pytest.approx([NEXT_TO_NOTHING, 0.0, 0.5], abs=0, rel=1e-6)


def test_only_rollouts_of_this_very_policy_are_compared(tmp_path: Path) -> None:
    """Two optimizer steps and two iterations on one generation batch: the weights move after the first step only."""
    recipe = recipe_for(tmp_path, trainer__steps_per_generation=4, trainer__num_iterations=2, trainer__max_steps=8)
    trainer = train(recipe)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    influence = [entry["influence/even"] for entry in logs]
    assert len(set(influence[:4])) == 1 and len(set(influence[4:])) == 1 and influence[0] != influence[4]


def test_interval(tmp_path: Path) -> None:
    weighting = {"method": "gradient", "interval": 2}
    trainer = train(recipe_for(tmp_path, weighting=weighting, trainer__max_steps=5))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    influence = [entry["influence/even"] for entry in logs]
    assert influence[0] == influence[1] != influence[2] == influence[3] != influence[4]
    weights = [entry["weight/even"] for entry in logs]  # used in a step: found in the steps before it
    assert weights[0] != weights[1] == weights[2] != weights[3] == weights[4]


NARROW = {"method": "gradient", "gradient_scale": "none"}


@pytest.mark.parametrize(
    "changes",
    [{"trainer__entropy_coef": 0.01}, {"trainer__use_adaptive_entropy": True, "trainer__entropy_target": 0.2}],
)
def test_an_entropy_bonus_is_no_rewards_gradient(changes: dict[str, Any], tmp_path: Path) -> None:
    """It reaches the projection without passing through log π, so only the wide probe can tell."""
    with pytest.raises(RecipeError, match="entropy bonus"):
        train(recipe_for(tmp_path, weighting=NARROW, **changes))
    wide = {**NARROW, "probe": "last_blocks"}
    recipe = recipe_for(tmp_path, trainer__loss_type="dapo", weighting=wide, trainer__entropy_coef=0.01)
    assert_same(train(recipe).found, gram_of_full_passes(recipe, lambda name: ".layers.1." in name), 1e-5)


def mixture(shared: bool, auxiliary: float) -> Any:
    """A small mixture of experts; with a shared expert, whose layers see all tokens in one row."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    sizes |= {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 8, "vocab_size": 320}
    sizes |= {"router_aux_loss_coef": auxiliary, "num_experts_per_tok": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    if shared:
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=16))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=16))


@pytest.mark.parametrize(("shared", "layer"), [(False, "self_attn.o_proj"), (True, "mlp.shared_expert.down_proj")])
def test_mixtures_of_experts(shared: bool, layer: str, tmp_path: Path) -> None:
    changes = {"trainer__loss_type": "dapo", "weighting": NARROW}
    recipe = recipe_for(tmp_path, **changes, trainer__router_aux_loss_coef=0.0)
    kwargs: Any = {"model": lambda: mixture(shared, 0.0)}
    trainer = train(recipe, **kwargs)
    assert trainer._probe.name == layer
    expected = gram_of_full_passes(recipe, lambda name: name.endswith(f"layers.1.{layer}.weight"), **kwargs)
    assert_same(trainer.found, expected)
    with pytest.raises(RecipeError, match="auxiliary loss"):
        train(recipe_for(tmp_path, **changes), model=lambda: mixture(shared, 0.01))


def test_blocks_without_lora_have_nothing_to_compare(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, weighting={**NARROW, "probe": "last_blocks"})
    config = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0])
    with pytest.raises(RecipeError, match="LoRA has no matrices there"):
        make_trainer(recipe, RewardSuite(recipe.rewards), peft_config=config)


def test_what_vllm_sampled_weighs_as_trl_says() -> None:
    args = SimpleNamespace(loss_type="grpo", steps_per_generation=1)
    mask = torch.tensor([[1, 1], [1, 0]])
    inputs = {"completion_mask": mask, "importance_sampling_ratio": torch.tensor([[0.5, 2.0], [4.0, 0.0]])}
    # grpo: 1 / rows / tokens of the row, times the ratio: 1/2/2 · 0.5 and · 2, and 1/2/1 · 4.
    assert token_weights(args, inputs, 8, 1, 1).tolist() == [[0.125, 0.5], [2.0, 0.0]]


def test_where_tokens_part_ways() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2))
    assert last_projection(gpt2)[0] == "mlp.c_proj"


def test_gram_matrix_by_hand() -> None:
    """Two gradients over parameters of 2 and 1 numbers: (1, 2 | 3) and (0, 1 | -1)."""
    gradients = [torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0], [-1.0]])]
    assert gram_matrix(gradients).tolist() == [[14.0, -1.0], [-1.0, 2.0]]
