"""PPO in the trainer: what a batch of rollouts becomes, what travels with its rows, and what then learns."""

import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation

from rlbal.errors import RunError
from rlbal.rewards.suite import RewardSuite
from rlbal.trainer_args import training_args
from rlbal.trainers.grpo import BalancedGRPOTrainer
from rlbal.trainers.ppo import BalancedPPOTrainer, hide_critic
from rlbal.trainers.value import CRITIC_FILE
from tests.support import REWARDS_FILE, make_model, make_recipe, make_rows, parameters, scripted_rollouts

MULTI_STEP = {
    "trainer__per_device_train_batch_size": 4,
    "trainer__gradient_accumulation_steps": 2,
    "trainer__steps_per_generation": 4,
    "trainer__num_iterations": 2,
}


class Recorder(BalancedPPOTrainer):
    """Keeps what each generation batch became, and the parts it was cut into."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.outputs = [*getattr(self, "outputs", []), output]
        return output

    def _split(self, micro_batches: Any) -> Any:
        self.parts = super()._split(micro_batches)
        return self.parts


def make_ppo(folder: Path, **changes: Any) -> Recorder:
    """A trainer on scripted rollouts, one of each prompt; `changes` as for `make_recipe`."""
    lora = changes.pop("lora", None)
    recipe = make_recipe(folder, **{"algorithm__name": "ppo", "algorithm__rollouts_per_prompt": 1, **changes})
    args, plan = training_args(recipe, 1)
    model, tokenizer = make_model(recipe)
    assert recipe.ppo is not None
    return Recorder(
        recipe=recipe,
        plan=plan,
        suite=RewardSuite(recipe.rewards),
        rows=make_rows(),
        eval_rows=None,
        tokenizer=tokenizer,
        model=model,
        args=args,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if lora else None,
        rollout_func=scripted_rollouts,
        critic_model=make_model(recipe)[0] if recipe.ppo.critic == "separate" else None,
    )


def opinionated(trainer: Recorder) -> Recorder:
    """Its critic's values differ from the start."""
    torch.nn.init.normal_(trainer.critic.head[2].weight, generator=torch.Generator().manual_seed(2))
    return trainer


def policy_and_critic(trainer: Recorder) -> tuple[torch.Tensor, torch.Tensor]:
    critic = {id(parameter) for parameter in trainer.critic.parameters()}
    own = [one.detach().flatten() for one in trainer.model.parameters() if id(one) not in critic]
    return torch.cat(own).clone(), parameters(trainer.critic).clone()


def states_by_hand(trainer: Recorder, output: dict[str, Any]) -> torch.Tensor:
    """Values of all states of a batch with the present weights, from a plain forward pass: (B, T + 1)."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        states = trainer.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        return trainer.critic(states[:, output["prompt_ids"].shape[1] - 1 :])


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("steps", [{}, MULTI_STEP], ids=["aligned", "several steps"])
@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
def test_a_batch_by_hand(tmp_path: Path, compact, steps, truncation):
    changes = {"ppo__truncation": truncation, "ppo__gamma": 0.9, "ppo__lam": 0.5, "ppo__whiten": False, **steps}
    trainer = opinionated(make_ppo(tmp_path, speed__compact_micro_batches=compact, **changes))
    rows = [{"prompt": prompt, "prompt_index": index} for index, prompt in enumerate(make_rows()["prompt"][:16])]
    trainer.model.train()
    output = trainer._generate_and_score_completions(rows)
    values = states_by_hand(trainer, output)
    batch = trainer.batch
    rewards = (batch.rewards_NK.double() * torch.tensor([1.0, 0.5])).sum(dim=1)
    assert batch.truncated_N.any() and not batch.truncated_N.all()
    for row, length in enumerate(batch.completion_tokens_N.tolist()):
        after = values[row, length].item() if truncation == "bootstrap" and batch.truncated_N[row] else 0.0
        advantage = 0.0
        for t in reversed(range(length)):
            reward = rewards[row].item() if t == length - 1 else 0.0
            advantage = reward + 0.9 * after - values[row, t].item() + 0.45 * advantage
            after = values[row, t].item()
            assert output["advantages"][row, t].item() == pytest.approx(advantage, rel=1e-4, abs=1e-4)
            assert output["returns"][row, t].item() == pytest.approx(advantage + after, rel=1e-4, abs=1e-4)
            assert output["old_values"][row, t].item() == pytest.approx(after, rel=1e-4, abs=1e-4)
        assert output["advantages"][row, length:].abs().sum() == 0
    assert ("old_per_token_logps" in output) == bool(steps)


def test_what_a_row_needs_travels_with_it(tmp_path: Path):
    trainer = opinionated(make_ppo(tmp_path, trainer__max_steps=1, **MULTI_STEP))
    trainer.train()
    (output,) = trainer.outputs
    assert trainer._compaction is not None

    def found(batch: dict[str, torch.Tensor]) -> set[tuple[float, ...]]:
        rows = set()
        for row, length in enumerate(batch["completion_mask"].sum(dim=1).tolist()):
            keys = ("completion_ids", "advantages", "returns", "old_values", "old_per_token_logps")
            rows.add(tuple(number for key in keys for number in batch[key][row, :length].tolist()))
        return rows

    parts = [part for some in trainer.parts for part in some]
    assert set().union(*map(found, parts)) == found(output)
    assert sum(len(part["returns"]) for part in parts) == 16


@pytest.mark.parametrize("steps", [{}, MULTI_STEP], ids=["aligned", "several steps"])
def test_compaction_changes_nothing(tmp_path: Path, steps):
    after = []
    for compact in (True, False):
        trainer = opinionated(make_ppo(tmp_path, speed__compact_micro_batches=compact, **steps))
        trainer.train()
        after.append(parameters(trainer.model))
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-5)


LEARNING = {
    "trainer__learning_rate": 0.003,
    "trainer__optim": "adamw_torch",
    "trainer__max_steps": 10,
    "ppo__critic_learning_rate": 0.03,
}


@pytest.mark.parametrize("kind", ["shared", "detached", "separate", "lora", "checkpointing"])
def test_the_critic_learns_and_says_so(tmp_path: Path, kind):
    changes = {
        "detached": {"ppo__detach": True},
        "separate": {"ppo__critic": "separate", "ppo__critic_learning_rate": 0.003},
        "lora": {"lora": {"r": 4}},
        "checkpointing": {"trainer__gradient_checkpointing": True},
    }.get(kind, {})
    trainer = make_ppo(tmp_path, **{"trainer__gradient_checkpointing": False, **LEARNING, **changes})
    policy, critic = policy_and_critic(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 10
    losses = [log["ppo/value_loss"] for log in logs]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert logs[0]["ppo/value_mean"] == 0 and logs[0]["ppo/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert logs[-1]["ppo/value_mean"] == pytest.approx(logs[-1]["ppo/return_mean"], abs=0.3)
    policy_after, critic_after = policy_and_critic(trainer)
    assert not torch.equal(policy, policy_after) and not torch.equal(critic, critic_after)


def test_while_the_critic_warms_up_the_policy_stays(tmp_path: Path):
    trainer = make_ppo(tmp_path, **{**LEARNING, "trainer__max_steps": 3, "ppo__critic_warmup_steps": 2})
    before, after = [], []
    original = trainer.training_step

    def step(*args: Any) -> torch.Tensor:
        before.append(policy_and_critic(trainer))
        return original(*args)

    trainer.training_step = step
    trainer.train()
    after = [*before[1:], policy_and_critic(trainer)]
    assert [torch.equal(one[0], other[0]) for one, other in zip(before, after, strict=True)] == [True, True, False]
    assert [torch.equal(one[1], other[1]) for one, other in zip(before, after, strict=True)] == [False, False, False]


def test_adam_does_not_remember_the_warm_up(tmp_path: Path):
    """Its first step after 20 steps of zero gradients is as long as a first step ever is: the learning rate."""
    adam = {"trainer__optim": "adamw_torch", "trainer__learning_rate": 1e-3, "trainer__adam_beta2": 0.999}
    trainer = make_ppo(tmp_path, **adam, trainer__max_steps=23, ppo__critic_warmup_steps=20)
    before: list[torch.Tensor] = []
    original = trainer.training_step

    def step(*args: Any) -> torch.Tensor:
        before.append(policy_and_critic(trainer)[0])
        return original(*args)

    trainer.training_step = step
    trainer.train()
    longest = [(one - other).abs().max().item() for one, other in pairwise([*before, policy_and_critic(trainer)[0]])]
    assert longest[:20] == [0.0] * 20
    assert longest[20] == pytest.approx(1e-3, rel=1e-2)
    assert max(longest[20:]) < 1.5e-3


def test_a_warm_up_longer_than_the_epochs_is_refused(tmp_path: Path):
    trainer = make_ppo(tmp_path, trainer__max_steps=-1, trainer__num_train_epochs=1, ppo__critic_warmup_steps=100)
    with pytest.raises(RunError, match=r"`ppo.critic_warmup_steps` \(100\) leaves none of the \d+ steps"):
        trainer.train()


def test_the_penalty_is_in_the_rewards_and_not_in_the_loss(tmp_path: Path):
    changes = {"ppo__kl_penalty": 0.5, "ppo__whiten": False, "ppo__lam": 1.0, "trainer__max_steps": 1}
    trainer = make_ppo(tmp_path, lora={"r": 4, "init_lora_weights": False}, **changes)
    trainer.train()
    (output,) = trainer.outputs
    # Values are 0 and λ = 1: the first token's advantage is the reward less all that is paid on the way.
    paid = 0.5 * ((trainer._old_logps_BT - output["ref_per_token_logps"]) * output["completion_mask"]).sum(dim=1)
    assert paid.abs().max() > 0.01
    rewards = (trainer.batch.rewards_NK * torch.tensor([1.0, 0.5])).sum(dim=1)
    torch.testing.assert_close(output["advantages"][:, 0], rewards - paid, rtol=1e-4, atol=1e-4)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert "kl" not in logs[0] and logs[0]["ppo/kl"] != 0
    assert trainer.beta == 0.5


def test_values_are_the_policy_s_also_where_the_reference_is_the_policy_without_its_adapter(tmp_path: Path):
    trainer = make_ppo(tmp_path, lora={"r": 4, "init_lora_weights": False}, ppo__kl_penalty=0.5)
    opinionated(trainer).model.train()
    rows = [{"prompt": prompt, "prompt_index": index} for index, prompt in enumerate(make_rows()["prompt"][:16])]
    output = trainer._generate_and_score_completions(rows)
    assert "ref_per_token_logps" in output and "old_per_token_logps" not in output
    mask = output["completion_mask"].bool()
    expected = states_by_hand(trainer, output)[:, :-1]
    torch.testing.assert_close(output["old_values"][mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_a_row_without_scores_teaches_nothing(tmp_path: Path):
    function = f"{REWARDS_FILE}:sometimes_missing"
    trainer = make_ppo(tmp_path, rewards__functions={"some": {"function": function}}, trainer__max_steps=1)
    opinionated(trainer).train()
    (output,) = trainer.outputs
    missing = trainer.batch.rewards_NK.isnan().all(dim=1)
    assert missing.any() and not missing.all()
    assert output["advantages"][missing].abs().sum() == 0
    assert output["returns"][missing].isnan().all() and output["returns"][~missing].isfinite().all()
    scored = output["completion_mask"].bool() & ~missing[:, None]
    # Whitened over the tokens of the others.
    assert output["advantages"][scored].mean().item() == pytest.approx(0, abs=1e-5)
    assert output["advantages"][scored].var(correction=0).item() == pytest.approx(1, rel=1e-4)


def test_rows_without_scores_leave_the_critic_alone(tmp_path: Path):
    """Also in later steps on the same rollouts, when its values are no longer what they were."""
    rewards = {"some": {"function": f"{REWARDS_FILE}:never"}}
    trainer = make_ppo(tmp_path, rewards__functions=rewards, **{**LEARNING, "trainer__num_iterations": 2})
    _, critic = policy_and_critic(opinionated(trainer))
    trainer.train()
    assert torch.equal(policy_and_critic(trainer)[1], critic)


def test_the_critic_expects_rewards_as_they_are(tmp_path: Path):
    """Also one that is the same in the whole batch; where one is missing, its mean over the others."""
    functions = {
        "always": {"function": f"{REWARDS_FILE}:one", "range": [0, 1]},
        "some": {"function": f"{REWARDS_FILE}:sometimes_missing", "weight": 0.5},
    }
    trainer = make_ppo(tmp_path, rewards__functions=functions, trainer__max_steps=1, ppo__lam=1.0, ppo__gamma=1.0)
    trainer.train()
    some = trainer.batch.rewards_NK[:, 1]
    assert some.isnan().any()
    (output,) = trainer.outputs
    filled = torch.where(some.isnan(), some.nanmean(), some)
    torch.testing.assert_close(output["returns"][:, 0], 1.0 + 0.5 * filled, rtol=1e-5, atol=1e-5)


def test_rows_without_advantages_still_teach_the_critic(tmp_path: Path):
    # A new critic says 0, which is right where the reward is 0: no advantage, until the critic has changed.
    changes = {"ppo__whiten": False, "trainer__max_steps": 1, "rewards__functions__even__weight": 0.0}
    trainer = make_ppo(tmp_path, **{**MULTI_STEP, **changes})
    trainer.train()
    (output,) = trainer.outputs
    assert 0 < (output["advantages"] == 0).all(dim=1).sum() < 16
    assert sum(len(part["returns"]) for some in trainer.parts for part in some) == 16


def test_unequal_groups_weigh_by_prompt(tmp_path: Path):
    changes = {"allocation": {"method": "knapsack", "low": 1}, "rewards__success": "short"}
    changes |= {"algorithm__rollouts_per_prompt": 4}
    trainer = make_ppo(tmp_path, **changes, ppo__lam=1.0, ppo__whiten=False, trainer__max_steps=8)
    trainer.train()
    assert len(set(trainer.batch.counts_P.tolist())) > 1
    tokens, groups = trainer.batch.completion_tokens_N.double(), trainer.batch.group_N
    rewards = (trainer.batch.rewards_NK.double() * torch.tensor([1.0, 0.5])).sum(dim=1)
    output = trainer.outputs[-1]
    for row in range(16):
        factor = tokens.sum() / (trainer.batch.num_prompts * tokens[groups == groups[row]].sum())
        expected = factor * (rewards[row] - output["old_values"][row, 0])
        assert output["advantages"][row, 0].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


def test_vllm_is_not_given_the_critic() -> None:
    class Generation:
        def _iter_named_params(self) -> Any:
            yield from [("model.embed", 1), ("critic.head.0.weight", 2), ("lm_head.weight", 3)]

    generation = Generation()
    hide_critic(generation)
    assert list(generation._iter_named_params()) == [("model.embed", 1), ("lm_head.weight", 3)]
    source = inspect.getsource(vllm_generation.VLLMGeneration.sync_weights)
    assert "self._iter_named_params()" in source and "named_parameters" not in source


def test_gradient_weighting_watches_rewards_less_their_batch_mean(tmp_path: Path):
    trainer = make_ppo(tmp_path, weighting__method="gradient", trainer__max_steps=2, ppo__detach=True)
    trainer.train()
    rewards = trainer.batch.rewards_NK
    torch.testing.assert_close(trainer.outputs[-1]["reward_advantages"], rewards - rewards.mean(dim=0))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["weight/even"] != logs[0]["weight/even"]


@pytest.mark.parametrize("separate", [False, True])
def test_the_policy_is_saved_alone_and_the_critic_comes_back(tmp_path: Path, separate):
    changes = {"ppo__critic": "separate" if separate else "shared", "trainer__save_strategy": "steps"}
    changes |= {"trainer__save_steps": 2, **LEARNING, "trainer__max_steps": 2}
    trainer = make_ppo(tmp_path, **changes)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    loaded, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values())
    policy, critic = policy_and_critic(trainer)
    assert torch.equal(torch.cat([one.detach().flatten() for one in loaded.parameters()]), policy)
    assert (checkpoint / CRITIC_FILE).is_file()
    again = make_ppo(tmp_path, **changes)
    assert not torch.equal(policy_and_critic(again)[1], critic)
    again._load_from_checkpoint(str(checkpoint))
    for found, expected in zip(policy_and_critic(again), (policy, critic), strict=True):
        assert torch.equal(found, expected)


def test_the_critic_has_its_own_learning_rate(tmp_path: Path):
    trainer = make_ppo(tmp_path, ppo__critic_learning_rate=0.25)
    optimizer = trainer.create_optimizer()
    own = {id(parameter) for parameter in trainer.critic.parameters()}
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    assert {rates[key] for key in own} == {0.25} and {rates[key] for key in rates.keys() - own} == {0.5}
    assert len(rates) == len(list(trainer.model.parameters()))


def test_overrides_of_trl_are_those_of_the_docstring() -> None:
    ours = {name for name, value in vars(BalancedPPOTrainer).items() if callable(value)}
    assert {name for name in ours if hasattr(BalancedGRPOTrainer, name)} == {
        "__init__",
        "_generate_and_score_completions",
        "_get_per_token_logps_and_entropies",
        "_take_advantages",
        "_compute_loss",
        "training_step",
        "create_optimizer",
        "create_scheduler",
        "_save",
        "_load_from_checkpoint",
    }
