"""What weighting does to training: how the factor of hypervolume weighting is cancelled, and where it is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from rlbal.balance.hypervolume import HypervolumeWeighting
from rlbal.batch import RolloutBatch
from rlbal.errors import RewardError, RunError, TrainingStopped
from rlbal.recipe import Recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.trainers.balance import RewardBalance
from tests.support import REWARDS_FILE, make_recipe, make_trainer, parameters

HYPERVOLUME = {"method": "hypervolume", "objectives": {"even": "max", "tokens": "min"}}
FACTOR = 1.7


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    return make_recipe(folder, **{"trainer__gradient_checkpointing": False, "trainer__loss_type": "dapo", **changes})


def train(recipe: Recipe) -> tuple[torch.Tensor, list[dict[str, Any]], Any]:
    """How the parameters moved, what was logged, and the trainer."""
    trainer = make_trainer(recipe, RewardSuite(recipe.rewards))
    start = parameters(trainer.model)
    torch.manual_seed(0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return parameters(trainer.model) - start, logs, trainer


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference as a share of the longest way."""
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.fixture
def constant_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HypervolumeWeighting, "factor", property(lambda self: FACTOR))


RANGED = {
    "even": {"function": f"{REWARDS_FILE}:even_share", "range": [0, 1]},
    "short": {"function": f"{REWARDS_FILE}:short", "range": [0, 1]},
}
ADAM = {"trainer__optim": "adamw_torch", "trainer__learning_rate": 1e-3, "trainer__weight_decay": 0.0}
SGD = {"trainer__optim": "sgd", "trainer__learning_rate": 0.05}


@pytest.mark.usefixtures("constant_factor")
@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adam", "sgd"])
def test_on_the_learning_rate_a_step_is_as_much_longer(optimizer: dict[str, Any], tmp_path: Path) -> None:
    settings = {**optimizer, "trainer__max_steps": 1}
    fixed, _, _ = train(recipe_for(tmp_path, **settings))
    scaled, logs, trainer = train(recipe_for(tmp_path, **settings, weighting=HYPERVOLUME))
    assert apart(scaled, FACTOR * fixed) < 1e-4  # float32 parameters of size 1 move by 1e-3
    # The schedule knows nothing of it, and the optimizer is as it was.
    assert logs[0]["learning_rate"] == settings["trainer__learning_rate"]
    assert trainer.optimizer.param_groups[0]["lr"] == settings["trainer__learning_rate"]


@pytest.mark.usefixtures("constant_factor")
def test_a_schedule_goes_on_as_if_nothing_was(tmp_path: Path) -> None:
    settings = {**ADAM, "trainer__lr_scheduler_type": "cosine", "trainer__gradient_accumulation_steps": 2}
    _, plain, _ = train(recipe_for(tmp_path, **settings))
    _, scaled, _ = train(recipe_for(tmp_path, **settings, weighting=HYPERVOLUME))
    assert [entry["learning_rate"] for entry in scaled] == [entry["learning_rate"] for entry in plain]
    assert len({entry["learning_rate"] for entry in plain}) == 3


@pytest.mark.usefixtures("constant_factor")
def test_first_cancellation_on_rewards_normalization_divides_it_away(tmp_path: Path) -> None:
    """Up to the epsilon next to the deviation; without normalization it is there."""
    weighting = {**HYPERVOLUME, "apply": "rewards"}
    fixed, _, _ = train(recipe_for(tmp_path, **SGD))
    scaled, _, _ = train(recipe_for(tmp_path, **SGD, weighting=weighting))
    assert apart(scaled, fixed) < 5e-3
    one_step = {**SGD, "advantage__scale": "none", "trainer__max_steps": 1}
    fixed, _, _ = train(recipe_for(tmp_path, **one_step))
    scaled, _, _ = train(recipe_for(tmp_path, **one_step, weighting=weighting))
    assert apart(scaled, FACTOR * fixed) < 1e-4


@pytest.mark.usefixtures("constant_factor")
def test_second_cancellation_on_advantages_adam_divides_it_away(tmp_path: Path) -> None:
    """Up to Adam's epsilon; under SGD it is there."""
    weighting = {**HYPERVOLUME, "apply": "advantages"}
    fixed, _, _ = train(recipe_for(tmp_path, **ADAM))
    scaled, _, _ = train(recipe_for(tmp_path, **ADAM, weighting=weighting))
    # Parameters with next to no gradient aside, where epsilon counts.
    assert (scaled - fixed).norm() < 0.01 * fixed.norm()
    one_step = {**SGD, "trainer__max_steps": 1}
    fixed, _, _ = train(recipe_for(tmp_path, **one_step))
    scaled, _, _ = train(recipe_for(tmp_path, **one_step, weighting=weighting))
    assert apart(scaled, FACTOR * fixed) < 1e-4


@pytest.mark.usefixtures("constant_factor")
def test_third_cancellation_on_advantages_clipping_cuts_it_off(tmp_path: Path) -> None:
    weighting = {**HYPERVOLUME, "apply": "advantages"}
    clipped = {**SGD, "trainer__max_grad_norm": 0.01, "trainer__max_steps": 1}
    fixed, logs, _ = train(recipe_for(tmp_path, **clipped))
    assert logs[0]["grad_norm"] > 0.01
    scaled, _, _ = train(recipe_for(tmp_path, **clipped, weighting=weighting))
    assert apart(scaled, fixed) < 1e-4


def test_scores_are_means_over_the_training_batch(tmp_path: Path) -> None:
    """The trainer's factor is what the logged means give, one after another; `tokens` goes from 0 to the limit."""
    _, logs, trainer = train(recipe_for(tmp_path, **SGD, trainer__max_steps=6, weighting=HYPERVOLUME))
    alone = HypervolumeWeighting(
        [1.0, 0.5], {"even": "max", "tokens": "min"}, {"even": (0.0, 1.0), "tokens": (0.0, 16.0)}, 0.9
    )
    for entry in logs:
        alone.observe({"even": entry["reward/even/mean"], "tokens": entry["length/mean"]})
        assert entry["hypervolume/factor"] == pytest.approx(alone.factor)
    assert len({entry["hypervolume/factor"] for entry in logs}) > 2
    assert trainer.balance.tables() == alone.tables()


def test_scores_of_evaluations(tmp_path: Path) -> None:
    weighting = {**HYPERVOLUME, "source": "validation"}
    recipe = recipe_for(tmp_path, data__eval_size=8, evaluation__every=1, weighting=weighting)
    balance = RewardBalance(recipe, 16)
    for mean in (0.2, 0.3, 0.3):
        balance.observe_evaluation({"reward/even": mean, "reward/short": 0.0, "length/mean": 8.0})
    # (0.2, 0.5) and (0.3, 0.5): 0.1 x 0.5 more; then nothing more, so the factor is 0.5.
    assert balance.metrics()["hypervolume/value"] == pytest.approx(0.15)
    assert balance.factor_on("learning_rate") == 0.5
    rewards_NK, group_N = torch.tensor([[1.0, 1.0], [0.9, 0.8]]), torch.tensor([0, 0])
    tokens_N = torch.tensor([1, 1])
    batch = RolloutBatch(
        prompt_index_N=group_N,
        group_N=group_N,
        rewards_NK=rewards_NK,
        completion_tokens_N=tokens_N,
        prompt_tokens_N=tokens_N,
        truncated_N=torch.tensor([False, False]),
    )
    balance.advantages(batch, 0.5)
    assert balance.metrics()["hypervolume/value"] == pytest.approx(0.15), "training scores must not count"


def test_a_schedule_of_weights(tmp_path: Path) -> None:
    """Over four steps progress is 0, 1/4, 1/2, 3/4; from 1 to 3 in the first half, then constant."""
    weighting = {"method": "schedule", "points": {"even": [[0, 1], [0.5, 3]]}}
    _, logs, _ = train(recipe_for(tmp_path, **SGD, trainer__max_steps=4, weighting=weighting))
    assert [entry["weight/even"] for entry in logs] == pytest.approx([1, 2, 3, 3])
    assert [entry["weight/short"] for entry in logs] == [0.5] * 4


def test_an_objective_that_is_never_scored(tmp_path: Path) -> None:
    functions = {
        "even": {"function": f"{REWARDS_FILE}:even_share", "range": [0, 1]},
        "gone": {"function": f"{REWARDS_FILE}:never", "range": [0, 1]},
    }
    weighting = {"method": "hypervolume", "objectives": {"even": "max", "gone": "max"}}
    with pytest.raises((RewardError, TrainingStopped), match=r"gone.*weighting\.objectives"):
        train(recipe_for(tmp_path, weighting=weighting, rewards__functions=functions))


WEIGHTINGS = {
    "schedule": {"method": "schedule", "points": {"even": [[0, 1], [1, 0]]}},
    "hypervolume": HYPERVOLUME,
    "gradient": {"method": "gradient", "step_size": 0.5},
}


SCALES = [
    (algorithm, scale, order)
    for algorithm in ("grpo", "rloo", "reinforce")
    for scale in ("none", "group_std", "batch_std")
    for order in ("sum_then_normalize", "normalize_then_sum")
]


@pytest.mark.parametrize(
    ("algorithm", "scale", "order"),
    [*SCALES, ("grpo", "beta", "normalize_then_sum")],  # beta is defined for group means, reward by reward
)
def test_every_method_with_every_algorithm_scale_and_order(
    algorithm: str, scale: str, order: str, tmp_path: Path
) -> None:
    for weighting in WEIGHTINGS.values():
        moved, logs, _ = train(
            recipe_for(
                tmp_path,
                algorithm={"name": algorithm, "rollouts_per_prompt": 4},
                advantage={"scale": scale, "order": order},
                weighting=weighting,
                trainer__max_steps=2,
                trainer__learning_rate=0.01,
            )
        )
        assert moved.isfinite().all() and moved.abs().max() > 0
        if weighting["method"] == "gradient":
            first, second = ([entry["weight/even"], entry["weight/short"]] for entry in logs)
            assert sum(first) == pytest.approx(1) and sum(second) == pytest.approx(1) and first != second


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_checkpoint_holds_what_was_learned(name: str, tmp_path: Path) -> None:
    recipe = recipe_for(
        tmp_path,
        **SGD,
        weighting=WEIGHTINGS[name],
        advantage={"scale": "beta", "order": "normalize_then_sum", "beta": {"estimator": "beta_binomial"}},
    )
    _, _, trained = train(recipe)
    trained.learned.save(tmp_path)
    fresh = make_trainer(recipe, RewardSuite(recipe.rewards))
    fresh.learned.load(tmp_path)
    assert fresh.balance.state_dict() == trained.balance.state_dict()
    assert fresh.balance.batches == 3
    for progress in (0.0, 0.5):
        assert torch.equal(fresh.balance.weighting.weights(progress), trained.balance.weighting.weights(progress))
    assert fresh.balance.weighting.factor == trained.balance.weighting.factor
    assert fresh.balance.tables() == trained.balance.tables()


OTHER_WAY = {"even": "min", "tokens": "min"}
ANOTHER = [
    ("weighting.method", "gradient", {}),
    ("advantage.scale", "fixed", {"advantage": {"scale": "beta", "order": "normalize_then_sum"}}),
    ("rewards.functions", "gradient", {"rewards__functions": {"short": RANGED["short"], "even": RANGED["even"]}}),
    ("weighting.objectives", "hypervolume", {"weighting": {**HYPERVOLUME, "objectives": OTHER_WAY}}),
    ("the ranges of the objectives", "hypervolume", {"trainer__max_completion_length": 20}),
]


@pytest.mark.parametrize(("key", "name", "changes"), ANOTHER)
def test_a_checkpoint_of_another_recipe_is_refused(
    key: str, name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    written = "fixed" if key == "weighting.method" else name
    weighting = {"method": "fixed"} if written == "fixed" else WEIGHTINGS[written]
    saved = RewardBalance(recipe_for(tmp_path, rewards__functions=RANGED, weighting=weighting), 16).state_dict()
    now = {"method": "fixed"} if name == "fixed" else WEIGHTINGS[name]
    recipe = recipe_for(tmp_path, **{"rewards__functions": RANGED, "weighting": now, **changes})
    limit = recipe.trainer["max_completion_length"]
    with pytest.raises(RunError, match=f"`{key}`"):
        RewardBalance(recipe, limit).load_state_dict(json.loads(json.dumps(saved)))


def test_raw_reward_logs_stay_unweighted(tmp_path: Path) -> None:
    _, fixed, _ = train(recipe_for(tmp_path, **SGD, trainer__max_steps=1))
    for weighting in (*WEIGHTINGS.values(), {**HYPERVOLUME, "apply": "rewards"}):
        _, logs, _ = train(recipe_for(tmp_path, **SGD, trainer__max_steps=1, weighting=weighting))
        for key in ("reward/even/mean", "rewards/even/mean", "reward/short/mean", "rewards/short/mean"):
            assert logs[0][key] == fixed[0][key]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_method_with_lora(name: str, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, **SGD, weighting=WEIGHTINGS[name])
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(recipe, RewardSuite(recipe.rewards), peft_config=config)
    start = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {key for key, value in trainer.model.named_parameters() if not torch.equal(value, start[key])}
    assert moved and all("lora_" in key for key in moved)
    learned = {"schedule": "weight/even", "hypervolume": "hypervolume/factor", "gradient": "weight/even"}[name]
    assert len({entry[learned] for entry in trainer.state.log_history if "loss" in entry}) > 1
