"""What `algorithm.name: ppo` and the `ppo` section may say, and the message for what they may not."""

import pytest

from rlbal.errors import RecipeError
from rlbal.recipe import parse_recipe, parse_yaml
from rlbal.trainer_args import bind_trainer
from tests.small_recipe import small

PPO = "algorithm={name: ppo, rollouts_per_prompt: 1}"
BATCH = "trainer.per_device_train_batch_size=8"

GOOD = [
    "ppo={}",
    "ppo={gamma: 0.99, lam: 1, whiten: false, kl_penalty: 0.05, truncation: bootstrap}",
    "ppo={critic: separate, critic_warmup_steps: 5, critic_learning_rate: 1e-5, value_coef: 1, value_clip: null}",
    "ppo={detach: true}",
    "allocation={method: knapsack, low: 1}",
    "advantage={}",
]


@pytest.mark.parametrize("override", GOOD)
def test_a_resolved_recipe_reads_back_equal(override: str) -> None:
    recipe = small(PPO, override)
    assert recipe.ppo is not None
    assert "advantage" not in parse_yaml(recipe.dump())
    assert parse_recipe(parse_yaml(recipe.dump())) == recipe


def test_defaults_are_the_design_s() -> None:
    section = small(PPO).ppo
    assert section is not None
    assert (section.critic, section.truncation, section.detach) == ("shared", "terminal", False)
    assert (section.gamma, section.lam, section.whiten, section.kl_penalty) == (1.0, 1.0, True, 0.0)
    assert small().ppo is None


def test_rewards_are_summed_without_baseline_or_scale() -> None:
    advantage = small(PPO).advantage
    assert (advantage.baseline, advantage.scale, advantage.aggregation) == ("none", "none", "loss")
    assert small(PPO, "allocation={method: knapsack, low: 1}").advantage.aggregation == "prompt"


def test_one_rollout_per_prompt_binds() -> None:
    args, plan = bind_trainer(small(PPO, BATCH))
    assert plan.rollouts_per_prompt == 1 and plan.prompts == 8
    assert args.loss_type == "dapo" and args.beta == 0.0


def test_the_penalty_asks_trl_for_a_reference_model() -> None:
    args, _ = bind_trainer(small(PPO, BATCH, "ppo.kl_penalty=0.05"))
    assert args.beta == 0.05


BOTH = "rewards.functions={a: {function: 'm:f', range: [0, 1]}, b: {function: 'm:g', range: [0, 1]}}"
HYPERVOLUME = "weighting={{method: hypervolume, objectives: {{a: max, b: max}}, apply: {}}}"
BAD = [
    (["ppo={}"], "`ppo` is for `algorithm.name: ppo`"),
    ([PPO, "ppo.gama=1"], "`gama` is not a key here. Did you mean `gamma`?"),
    ([PPO, "ppo.gamma=0"], "`ppo.gamma`"),
    ([PPO, "ppo.lam=1.5"], "`ppo.lam`"),
    ([PPO, "ppo.truncation=masked"], "`ppo.truncation`"),
    ([PPO, "ppo={critic: separate, detach: true}"], "`ppo.detach` is for `ppo.critic: shared`"),
    ([PPO, "advantage.baseline=group"], "`advantage.baseline` has no meaning with `algorithm.name: ppo`"),
    ([PPO, "advantage.whiten=true"], "see `ppo.lam` and `ppo.whiten`"),
    ([PPO, "advantage.aggregation=prompt"], "leave `advantage` out"),
    ([PPO, "ppo.critic=separate", "lora={r: 4}"], "use `ppo.critic: shared`"),
    ([PPO, BOTH, HYPERVOLUME.format("advantages")], "leave it at `learning_rate`"),
    ([PPO, BOTH, HYPERVOLUME.format("rewards")], "leave it at `learning_rate`"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD)
def test_refused_when_read(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        small(*overrides)
    assert message in str(caught.value)


BOUND = [
    ("trainer.mask_truncated_completions=true", "`ppo.truncation` says what being cut off means"),
    ("trainer.beta=0.04", "set `ppo.kl_penalty`"),
    ("trainer.loss_type=grpo", "`trainer.loss_type: grpo` is not PPO's loss"),
    ("trainer.importance_sampling_level=sequence", "PPO weighs tokens"),
    ("ppo.critic_warmup_steps=20", "leaves none of the 20 steps"),
]


@pytest.mark.parametrize(("override", "message"), BOUND)
def test_refused_with_the_trainer_section(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        bind_trainer(small(PPO, BATCH, "trainer.max_steps=20", override))
    assert message in str(caught.value)
    bind_trainer(small("algorithm.rollouts_per_prompt=2", BATCH, "trainer.max_steps=20", *_but_ppo(override)))


def _but_ppo(override: str) -> list[str]:
    """The same for GRPO, which has nothing against it."""
    return [] if override.startswith("ppo.") else [override]


def test_hypervolume_on_the_learning_rate_and_gradient_weighting_go_with_it() -> None:
    assert small(PPO, BOTH, HYPERVOLUME.format("learning_rate")).ppo is not None
    assert small(PPO, BOTH, "weighting.method=gradient", "ppo.detach=true").ppo is not None


def test_a_shared_critic_s_gradient_would_pass_for_the_rewards() -> None:
    gradient = (PPO, BOTH, "weighting.method=gradient")
    with pytest.raises(RecipeError, match=r"`weighting\.probe: last_projection` cannot tell the rewards' gradients"):
        small(*gradient)
    for allowed in ("ppo.detach=true", "ppo.critic=separate", "weighting.probe=last_blocks"):
        small(*gradient, allowed)


def test_weight_decay_would_move_the_policy_while_the_critic_warms_up() -> None:
    decay = ("algorithm.name=ppo", "trainer.weight_decay=0.1")
    with pytest.raises(RecipeError, match=r"`trainer\.weight_decay` would shrink the policy"):
        bind_trainer(small(*decay, "ppo.critic_warmup_steps=3"))
    bind_trainer(small(*decay))
