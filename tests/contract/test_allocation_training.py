"""Unequal groups in training: who gets how many rollouts, on what knowledge, and what they count in the loss."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlbal.errors import DataError, RewardError
from rlbal.prompts.allocation import posterior_counts
from rlbal.rewards.suite import RewardSuite
from rlbal.run import RunDirectory
from rlbal.trainers.callbacks import RunRecorder
from rlbal.trainers.grpo import BalancedGRPOTrainer
from tests.support import make_recipe, make_rows, make_trainer, parameters

FILE = Path(__file__).parent.parent / "scripted_rewards.py"
KNAPSACK: dict[str, Any] = {"method": "knapsack"}
BY_PROMPT = {
    "by_prompt": {"function": f"{FILE}:by_prompt", "range": [0, 1]},
    "even": {"function": f"{FILE}:even_share", "range": [0, 1], "weight": 0.5},
}


class Recorder(BalancedGRPOTrainer):
    """Keeps every batch, and the advantages that TRL's loss got."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.seen = [*getattr(self, "seen", []), (self.state.global_step, self.batch, output["advantages"].clone())]
        return output


def train(tmp_path: Path, rows: int = 4, **changes: Any) -> Recorder:
    """Four rows per batch of 16 by default, so that every batch is an epoch."""
    changes = {"rewards__functions": BY_PROMPT, "allocation": KNAPSACK, "trainer__max_steps": 4, **changes}
    recipe = make_recipe(tmp_path, **changes)
    with RewardSuite(recipe.rewards) as suite:
        suite.start()
        kwargs = {"rollout_func": None} if changes.get("sampled") else {}
        trainer = make_trainer(recipe, suite, rows=make_rows().select(range(rows)), **kwargs)
        trainer.__class__ = Recorder
        trainer.train()
    assert isinstance(trainer, Recorder)
    return trainer


def counts(batch: Any) -> dict[int, int]:
    return dict(Counter(batch.prompt_index_N.tolist()))


def test_beliefs_include_the_batch_just_finished(tmp_path: Path) -> None:
    """The counts of every batch, from beliefs kept here, loop by loop; those of one batch earlier give others."""
    forgetting = 0.3
    trainer = train(tmp_path, allocation={"method": "knapsack", "low": 1, "forgetting": forgetting})
    successes, failures, lagging_differs = np.zeros(4), np.zeros(4), False
    before = successes.copy(), failures.copy()
    for step, batch, _ in trainer.seen:
        if step:
            successes, failures = successes * (1 - forgetting), failures * (1 - forgetting)
        expected, lagging = (
            posterior_counts("knapsack", 0.5 + s, 0.5 + f, 16, 1, 128, np.random.default_rng(0)).tolist()
            for s, f in ((successes, failures), before)
        )
        given = counts(batch)
        if step:  # before the first batch all are equal; and no two prompts here come to be believed the same
            assert [given[prompt] for prompt in range(4)] == expected
            lagging_differs |= expected != lagging
        before = successes.copy(), failures.copy()
        for prompt, reward in zip(batch.prompt_index_N.tolist(), batch.rewards_NK[:, 0].tolist(), strict=True):
            successes[prompt] += reward
            failures[prompt] += 1 - reward
    assert [step for step, _, _ in trainer.seen] == [0, 1, 2, 3]
    assert lagging_differs


def test_every_batch_is_exactly_full_and_within_bounds(tmp_path: Path) -> None:
    trainer = train(tmp_path, rows=24, allocation={"method": "knapsack", "low": 2, "high": 5}, trainer__max_steps=12)
    sizes = {count for _, batch, _ in trainer.seen for count in counts(batch).values()}
    assert all(len(batch.prompt_index_N) == 16 and len(counts(batch)) == 4 for _, batch, _ in trainer.seen)
    assert 2 <= min(sizes) < max(sizes) <= 5
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["allocation/mean"] for entry in logs] == [4.0] * 12
    assert min(entry["allocation/min"] for entry in logs) == min(sizes)
    assert max(entry["allocation/max"] for entry in logs) == max(sizes)


def test_mean_belief_has_a_uniform_first_epoch(tmp_path: Path) -> None:
    trainer = train(tmp_path, rows=8, allocation={"method": "knapsack", "belief": "mean"})
    given = [set(counts(batch).values()) for _, batch, _ in trainer.seen]
    assert given[:2] == [{4}, {4}]
    assert all(len(sizes) > 1 for sizes in given[2:])


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    one, again, other = (train(tmp_path, rows=24, trainer__max_steps=8, seed=seed) for seed in (0, 0, 1))
    assert [counts(batch) for _, batch, _ in one.seen] == [counts(batch) for _, batch, _ in again.seen]
    assert [counts(batch) for _, batch, _ in one.seen] != [counts(batch) for _, batch, _ in other.seen]
    assert torch.equal(parameters(one.model), parameters(again.model))


def test_the_table_of_rollouts_by_success_adds_up(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    batch, tables = trainer.seen[-1][1], trainer.allocator.tables()
    for table in tables.values():
        assert [sum(column) for column in zip(*table, strict=True)] == [4, 16]
    rates = {prompt: batch.rewards_NK[batch.prompt_index_N == prompt, 0].double().mean().item() for prompt in range(4)}
    expected = [[0, 0] for _ in range(11)]
    for prompt, rate in rates.items():
        expected[int(10 * rate + 0.5)][0] += 1
        expected[int(10 * rate + 0.5)][1] += counts(batch)[prompt]
    assert tables["allocation/by_success"] == expected


def test_accuracy_is_that_of_the_prompts_not_of_the_rows(tmp_path: Path) -> None:
    """Hard prompts get more rows and retired ones none; neither says that the policy got worse."""
    trainer = train(tmp_path)
    batch, allocator = trainer.seen[-1][1], trainer.allocator
    rates = [batch.rewards_NK[batch.prompt_index_N == prompt, 0].double().mean().item() for prompt in range(4)]
    assert allocator.accuracy == pytest.approx(sum(rates) / 4)
    assert allocator.accuracy != pytest.approx(batch.rewards_NK[:, 0].mean().item(), abs=1e-3)
    allocator.ledger.retired_M[:] = [True, False, False, False]
    allocator.observe(batch, 3)
    assert allocator.accuracy == pytest.approx(1 / 4 + 3 / 4 * sum(rates) / 4)


def test_what_is_believed_with_the_last_visit_alone(tmp_path: Path) -> None:
    """Beta(1/2, 1/2) and the last visit: not the prior, though a later step leaves nothing of the counts."""
    trainer = train(tmp_path, allocation={"method": "knapsack", "belief": "mean"})
    batch = trainer.seen[-1][1]
    own = [batch.rewards_NK[batch.prompt_index_N == prompt, 0].double() for prompt in range(4)]
    expected = [(0.5 + one.sum().item()) / (1 + len(one)) for one in own]
    assert not trainer.allocator.ledger.prior.fitted
    assert trainer.allocator.believed(range(4), 50).tolist() == pytest.approx(expected)


def test_a_failed_step_leaves_no_trace_in_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generations per optimizer step, of which the second of step 3 fails: the resumed run repeats the first."""
    changes = {
        "rewards__functions": BY_PROMPT,
        "allocation": KNAPSACK,
        "trainer__gradient_accumulation_steps": 2,
        "trainer__steps_per_generation": 1,
        "trainer__max_steps": 4,
    }
    whole = train(tmp_path / "whole", rows=24, **changes)
    recipe = make_recipe(tmp_path, **changes)
    score, calls = BalancedGRPOTrainer._calculate_rewards, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 6:
            raise RewardError("no more")
        return score(self, *args)

    with RewardSuite(recipe.rewards) as suite:
        suite.start()
        recorder = RunRecorder(RunDirectory(tmp_path))
        trainer = make_trainer(recipe, suite, callbacks=[recorder])
        recorder.trainer, trainer.__class__ = trainer, Recorder
        monkeypatch.setattr(BalancedGRPOTrainer, "_calculate_rewards", failing)
        with pytest.raises(RewardError, match="no more"):
            trainer.train()
        trainer.save_now()
        monkeypatch.undo()
        checkpoint = tmp_path / "checkpoint-2"
        rest = make_trainer(recipe, suite)
        rest.__class__ = Recorder
        rest.learned.load(checkpoint)
        assert rest.totals.rollouts == 4 * 16
        rest.train(resume_from_checkpoint=str(checkpoint))
    assert isinstance(trainer, Recorder) and isinstance(rest, Recorder)
    prompts = [set(batch.prompt_index_N.tolist()) for _, batch, _ in whole.seen]
    assert [set(batch.prompt_index_N.tolist()) for _, batch, _ in trainer.seen] == prompts[:5]
    assert [set(batch.prompt_index_N.tolist()) for _, batch, _ in rest.seen] == prompts[4:]


METHODS = {
    "fixed": {"method": "fixed"},
    "schedule": {"method": "schedule", "points": {"by_prompt": [[0, 1], [1, 0.5]]}},
    "hypervolume": {"method": "hypervolume", "objectives": {"by_prompt": "max", "tokens": "min"}},
    "gradient": {"method": "gradient", "step_size": 0.5},
}
ADVANTAGES = [
    *[{"scale": scale} for scale in ("none", "group_std", "batch_std")],
    {"scale": "group_std", "order": "normalize_then_sum", "whiten": True},
    {"scale": "beta", "order": "normalize_then_sum", "baseline": "group"},
]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "reinforce"])
@pytest.mark.parametrize("advantage", ADVANTAGES, ids=str)
def test_every_algorithm_scale_and_weighting(algorithm: str, advantage: dict[str, Any], tmp_path: Path) -> None:
    for name, weighting in METHODS.items():
        if name == "hypervolume" and advantage.get("whiten"):
            continue  # refused: the factor would cancel
        trainer = train(
            tmp_path,
            algorithm={"name": algorithm, "rollouts_per_prompt": 4},
            advantage=advantage,
            weighting=weighting,
            trainer__learning_rate=0.01,
        )
        assert len(set(counts(trainer.seen[-1][1]).values())) > 1
        moved = parameters(trainer.model)
        assert moved.isfinite().all() and trainer.seen[-1][2].abs().max() > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"r": 4, "target_modules": ["q_proj"]}},
        {"trainer__gradient_accumulation_steps": 2, "trainer__per_device_train_batch_size": 8},
        {"speed__generation": "transformers", "sampled": True},
        {"sampled": True, "speed__rows_at_once": 5},
        {
            "sampled": True,
            "trainer__use_transformers_continuous_batching": True,
            "trainer__transformers_continuous_batching_config": {
                "num_blocks": 512,
                "max_batch_tokens": 1024,
                "page_size": 16,
            },
        },
    ],
    ids=["lora", "accumulation", "transformers", "rlbal", "continuous batching"],
)
def test_with_lora_and_every_engine_that_runs_here(changes: dict[str, Any], tmp_path: Path) -> None:
    sampled = changes.pop("sampled", False)
    recipe = make_recipe(
        tmp_path, rewards__functions=BY_PROMPT, allocation=KNAPSACK, trainer__learning_rate=0.01, **changes
    )
    from rlbal.model import lora_config

    kwargs: dict[str, Any] = {"peft_config": lora_config(recipe), "rows": make_rows().select(range(4))}
    with RewardSuite(recipe.rewards) as suite:
        suite.start()
        if sampled:
            kwargs["rollout_func"] = None
        trainer = make_trainer(recipe, suite, **kwargs)
        if sampled and trainer._rollouts is not None:
            trainer.rollout_func = trainer._rollouts
        trainer.__class__ = Recorder
        trainer.train()
    assert isinstance(trainer, Recorder)
    assert any(len(set(counts(batch).values())) > 1 for _, batch, _ in trainer.seen)
    assert all(sum(counts(batch).values()) == 16 for _, batch, _ in trainer.seen)


@pytest.mark.parametrize(
    ("loss", "by_tokens"),
    [("dapo", True), ("bnpo", True), ("luspo", False), ("dr_grpo", False), ("grpo", False), ("sapo", False)],
)
def test_prompts_weigh_alike(loss: str, by_tokens: bool, tmp_path: Path) -> None:
    """A prompt weighs by its rows' factors times their share of what the loss divides by: tokens, or rows."""
    changes: dict[str, Any] = {"trainer__loss_type": loss, "trainer__max_steps": 2}
    if loss == "luspo":
        changes["trainer__importance_sampling_level"] = "sequence"
    runs = {
        how: train(tmp_path, **changes, advantage={"aggregation": how, "scale": "none"}) for how in ("prompt", "loss")
    }
    # The first batches are the same, since the models are.
    batch, prompt_N, loss_N = runs["prompt"].seen[0][1], runs["prompt"].seen[0][2], runs["loss"].seen[0][2]
    torch.testing.assert_close(batch.rewards_NK, runs["loss"].seen[0][1].rewards_NK)
    assert runs["loss"].recipe.advantage.aggregation == "loss"
    logged = {how: torch.tensor(list(run._logs["advantages"])) for how, run in runs.items()}
    assert len(logged["prompt"]) == 16
    factors_N = runs["prompt"]._prompt_factors(batch)
    size_N = batch.completion_tokens_N.double() if by_tokens else torch.ones(16, dtype=torch.float64)
    weight_P = torch.zeros(4, dtype=torch.float64).index_add(0, batch.group_N, factors_N * size_N)
    torch.testing.assert_close(weight_P, torch.full((4,), float(size_N.sum() / 4), dtype=torch.float64))
    # Rows were shuffled alike: each advantage is the other's times a factor of its prompt.
    ratio_N = (prompt_N / loss_N)[loss_N.abs() > 1e-6]
    assert {round(float(ratio), 4) for ratio in ratio_N} <= {round(float(factor), 4) for factor in factors_N}


def test_aggregation_follows_the_allocation_unless_told(tmp_path: Path) -> None:
    assert make_recipe(tmp_path).advantage.aggregation == "loss"
    assert make_recipe(tmp_path, allocation=KNAPSACK).advantage.aggregation == "prompt"
    assert make_recipe(tmp_path, allocation=KNAPSACK, advantage__aggregation="loss").advantage.aggregation == "loss"
    assert make_recipe(tmp_path, advantage__aggregation="prompt").advantage.aggregation == "prompt"


def test_equal_groups_of_equal_length_need_no_factor(tmp_path: Path) -> None:
    trainer = train(
        tmp_path, allocation={"method": "uniform"}, advantage__aggregation="prompt", trainer__loss_type="grpo"
    )
    assert trainer._prompt_factors(trainer.seen[0][1]).tolist() == [1.0] * 16


def test_masked_truncated_rows_count_nowhere(tmp_path: Path) -> None:
    trainer = train(tmp_path, trainer__mask_truncated_completions=True)
    batch = trainer.seen[0][1]
    assert batch.truncated_N.any() and not batch.truncated_N.all()
    factors_N, size_N = trainer._prompt_factors(batch), batch.completion_tokens_N * ~batch.truncated_N
    weight_P = torch.zeros(4, dtype=torch.float64).index_add(0, batch.group_N, factors_N * size_N)
    kept_P = torch.zeros(4).index_add(0, batch.group_N, size_N.float()) > 0
    assert torch.allclose(weight_P[kept_P], size_N.sum() / kept_P.sum().double())


def test_a_checkpoint_holds_ledger_and_pool(tmp_path: Path) -> None:
    trainer = train(tmp_path, rows=24)
    trainer.learned.save(tmp_path)
    fresh = make_trainer(trainer.recipe, trainer.suite)
    fresh.learned.load(tmp_path)
    for name, array in trainer.allocator.ledger.state_dict().items():
        np.testing.assert_array_equal(fresh.allocator.ledger.state_dict()[name], array)
    assert trainer.allocator.draw(4).tolist() == fresh.allocator.draw(4).tolist()


def test_a_stream_of_rows_is_refused(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, rewards__functions=BY_PROMPT, allocation=KNAPSACK)
    with pytest.raises(DataError, match=r"a stream \(IterableDataset\)(?s:.)*Dataset.from_list"):
        make_trainer(recipe, RewardSuite(recipe.rewards), rows=make_rows().to_iterable_dataset())


def test_a_success_outside_its_range_stops_with_the_fix(tmp_path: Path) -> None:
    functions = {"many": {"function": f"{FILE}:number_of_tokens"}}
    with pytest.raises(
        RewardError, match=r"`many` says whether a rollout succeeded and gave \d+, outside \[0, 1\]"
    ) as caught:
        train(tmp_path, rewards__functions=functions)
    assert "rewards.functions.many.range" in str(caught.value)


def test_a_graded_success_counts_by_its_range(tmp_path: Path) -> None:
    functions = {"many": {"function": f"{FILE}:number_of_tokens", "range": [0, 20]}}
    trainer = train(tmp_path, rewards__functions=functions, trainer__max_steps=1)
    batch = trainer.seen[0][1]
    for prompt in range(4):
        own = batch.completion_tokens_N[batch.prompt_index_N == prompt].double() / 20
        assert trainer.allocator.ledger.success_rates([prompt])[0] == pytest.approx(own.mean().item(), abs=1e-6)
