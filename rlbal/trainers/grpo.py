"""GRPO, RLOO and REINFORCE on TRL's GRPOTrainer.

One training step, in the order of the methods below:

    _get_train_sampler               keeps time: so many rows make up an epoch
    _prepare_inputs                  generation is due: which prompts, how many rollouts each, and their rows
    _generate_and_score_completions  the budget goes into prompt, reward and cap; TRL generates and scores; our
                                     advantages replace TRL's, and the ledger learns how it went
    _calculate_rewards               raw rewards of all processes; failed scores decided alike on every process
    _compute_loss, _get_per_token_logps_and_entropies, training_step
                                     weights that learn from gradients watch the backward pass
    log                              what metrics.jsonl says of the step
    evaluate                         held-out evaluation with its own sampling

What then is trained on, `rlbal.trainers.compacted` says, and `rlbal.trainers.resumable` how a run is saved. TRL keeps
the loss, LoRA and the distributed engines. Each method has a contract test that fails when TRL changes under it.
"""

import time
from collections import deque
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from rlbal.balance.aggregation import prompt_level_factors
from rlbal.balance.gradients import gram_matrix
from rlbal.batch import RolloutBatch, batch_metrics, group_rows
from rlbal.batch_plan import BatchPlan
from rlbal.budget_sections import TOKEN_BUDGET
from rlbal.errors import TrainingStopped
from rlbal.evaluation import Evaluation
from rlbal.recipe import Recipe
from rlbal.rewards.loading import MEAN_LENGTH
from rlbal.rewards.outcomes import merge, verdict
from rlbal.rewards.suite import RewardSuite
from rlbal.scaling.compute import rollout_flops
from rlbal.speed import ROW_LOSSES, transformers_instead
from rlbal.trainer_args import completion_limit
from rlbal.trainers.allocator import RolloutAllocator
from rlbal.trainers.balance import RewardBalance
from rlbal.trainers.evaluator import PolicyEvaluator
from rlbal.trainers.influence import make_probe, teach_all
from rlbal.trainers.length_budget import LengthBudget
from rlbal.trainers.local_text import LocalText
from rlbal.trainers.microbatch import REWARD_ADVANTAGES
from rlbal.trainers.resumable import ResumableGRPOTrainer
from rlbal.trainers.rollout import Rollouts, generation_limit
from rlbal.trainers.sampler import RowsPerEpoch
from rlbal.trainers.state import BalanceState
from rlbal.trainers.step_factor import StepFactor
from rlbal.trainers.totals import Totals, model_shape


class BalancedGRPOTrainer(ResumableGRPOTrainer):
    """TRL's GRPOTrainer with rlbal deciding how much each reward, prompt and rollout counts.

    Args:
        recipe: the run's recipe.
        plan: its batch arithmetic for the processes at hand.
        suite: the loaded reward functions.
        rows: training data with `prompt`, `prompt_index` and the columns the rewards need.
        eval_rows: held-out data with the same columns, or None.
        tokenizer: the model's.
        kwargs: `model`, `args`, `peft_config` and `callbacks` as for GRPOTrainer.
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        plan: BatchPlan,
        suite: RewardSuite,
        rows: Dataset,
        eval_rows: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.plan, self.suite, self.rows, self.tokenizer = recipe, plan, suite, rows, tokenizer
        self.balance = RewardBalance(recipe, completion_limit(kwargs["args"]))
        self.allocator = RolloutAllocator(recipe, plan, rows, kwargs["args"].shuffle_dataset)
        limit, total = completion_limit(kwargs["args"]), kwargs["args"].max_steps
        self.budget = LengthBudget(recipe, limit, total, self.allocator)
        self.learned = BalanceState(self)
        self.success = list(recipe.rewards.functions).index(recipe.rewards.success_name)
        self.batch: RolloutBatch | None = None
        self.totals = Totals()
        self._local_text = LocalText()
        self._report: dict[str, float] = {}
        self._times: dict[str, float] = dict.fromkeys(("allocate", "generate", "reward", "balance"), 0.0)
        self._last_reward_seconds = 0.0
        self.step_started = time.perf_counter()
        self.last_evaluation: tuple[int, Evaluation] | None = None
        reason = transformers_instead(recipe, kwargs["model"], kwargs["args"])
        self._rollouts = Rollouts(self, recipe.speed.rows_at_once) if reason is None else None
        if self._rollouts is not None:
            kwargs.setdefault("rollout_func", self._rollouts)
        super().__init__(
            reward_funcs=list(suite.functions),
            # The loader only keeps time; rows are chosen and fetched when generation is due.
            train_dataset=rows.select_columns(["prompt_index"]),
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            compact=recipe.speed.compact_micro_batches,
            max_tokens=recipe.speed.max_tokens_per_micro_batch,
            **kwargs,
        )
        self._step_factor = StepFactor()
        self.add_callback(self._step_factor)
        self._probe, self._sampled_by_this_policy = make_probe(self), False
        self.shape = model_shape(self.accelerator.unwrap_model(self.model))
        self.evaluator = PolicyEvaluator(self, eval_rows) if eval_rows is not None else None
        if reason:
            self.notes.append(f"rollouts are generated by transformers: {reason}")

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        del dataset
        repeats = self.num_iterations * self.plan.steps_per_generation
        return RowsPerEpoch(len(self.rows), self.plan.prompts, self.plan.rollouts_per_prompt, repeats)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self.generation_is_due and not isinstance(generation_batch, dict):
            generation_batch = self._allocate(len(generation_batch))
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:  # type: ignore[union-attr]
            self._step_factor.apply(self.optimizer, self.balance.factor_on("learning_rate"))
        return inputs

    def _allocate(self, local_rows: int) -> list[dict[str, Any]]:
        """This process's rows of the generation batch, one per rollout."""
        started = time.perf_counter()
        mine = self.allocator.draw(self.state.global_step)[self._local_slice(local_rows)].tolist()
        turn = {index: turn for turn, index in enumerate(dict.fromkeys(mine))}
        columns = self.rows[list(turn)]
        rows = [{name: values[turn[index]] for name, values in columns.items()} for index in mine]
        self._times["allocate"] += time.perf_counter() - started
        return rows

    def _local_slice(self, local_rows: int) -> slice:
        start = self.accelerator.process_index * local_rows
        return slice(start, start + local_rows)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        inputs, cap = self.budget.tell(inputs, self.state.global_step)
        if self._rollouts is not None:
            self._rollouts.inputs = inputs
        text_stays = nullcontext() if self.log_completions else self._local_text.stays()
        with generation_limit(self, cap), text_stays:
            output = super()._generate_and_score_completions(inputs)
        balance_started = time.perf_counter()
        self._times["generate"] += balance_started - started - self._last_reward_seconds
        self._times["reward"] += self._last_reward_seconds

        self.batch = self._gather_batch(inputs, output)
        advantages_N = self._take_advantages(self.batch, output, self._local_slice(len(inputs)))
        self._sampled_by_this_policy = True
        logged: deque[float] = self._logs["advantages"]  # type: ignore[assignment]
        logged.clear()
        logged.extend(advantages_N.tolist())
        self._account(advantages_N)
        self._times["balance"] += time.perf_counter() - balance_started
        started = time.perf_counter()
        self.allocator.observe(self.batch, self.state.global_step)
        self._report |= self.budget.observe(self.batch, self.state.global_step) | self.allocator.metrics()
        self._times["allocate"] += time.perf_counter() - started
        return output

    def _take_advantages(self, batch: RolloutBatch, output: dict[str, Any], mine: slice) -> torch.Tensor:
        """Put this process's advantages into `output`; those of all rows, (N,)."""
        advantages_N = self.balance.advantages(batch, self._progress)
        factors_N = self._prompt_factors(batch).to(advantages_N.dtype)
        advantages_N = advantages_N * factors_N
        if self.balance.probe_is_due:
            own_NK = self.balance.reward_advantages(batch) * factors_N[:, None]
            advantages_N = teach_all(advantages_N, own_NK)
            output[REWARD_ADVANTAGES] = own_NK[mine].to(self.accelerator.device)
        output["advantages"] = advantages_N[mine].to(self.accelerator.device)
        return advantages_N

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    def _gather_batch(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> RolloutBatch:
        """The batch over all processes; per-row numbers travel, never text."""
        prompt_tokens = output["prompt_mask"].sum(dim=1).tolist()
        local = [
            [row["prompt_index"], prompt, len(ids), ids[-1] not in self._final_tokens, row.get(TOKEN_BUDGET, 0)]
            for row, prompt, ids in zip(inputs, prompt_tokens, self._completion_ids, strict=True)
        ]
        columns = self.accelerator.gather(torch.tensor(local, device=self.accelerator.device)).cpu()
        index_N, prompt_N, completion_N, truncated_N, budget_N = columns.unbind(1)
        return RolloutBatch(
            prompt_index_N=index_N,
            group_N=group_rows(index_N),
            rewards_NK=self._rewards_NK,
            completion_tokens_N=completion_N,
            prompt_tokens_N=prompt_N,
            truncated_N=truncated_N.bool(),
            budget_N=None if self.recipe.budget.schedule == "none" else budget_N,
        )

    def _prompt_factors(self, batch: RolloutBatch) -> torch.Tensor:
        """What advantages are multiplied by so that prompts weigh alike in the loss, or 1: (N,)."""
        if self.recipe.advantage.aggregation != "prompt":
            return torch.ones(len(batch.group_N), dtype=torch.float64)
        tokens_N = batch.completion_tokens_N.double()
        if self.args.loss_type in ROW_LOSSES:
            tokens_N = torch.ones_like(tokens_N)
        if self.mask_truncated_completions:
            tokens_N = tokens_N * ~batch.truncated_N
        return torch.from_numpy(prompt_level_factors(tokens_N, batch.group_N))

    def _account(self, advantages_N: torch.Tensor) -> None:
        """Count what the batch cost, and keep what metrics.jsonl will say of it."""
        batch, names = self.batch, self.suite.names
        assert batch is not None
        prompt_tokens, completion_tokens = batch.prompt_tokens_N.tolist(), batch.completion_tokens_N.tolist()
        self.totals.rollouts += len(completion_tokens)
        self.totals.tokens_generated += sum(completion_tokens)
        self.totals.flops += rollout_flops(self.shape, prompt_tokens, completion_tokens, self.num_iterations)
        self._report = batch_metrics(batch, self.balance.weights_K, names, self.success)
        self._report["advantage/abs_mean"] = advantages_N.abs().mean().item()
        self._report |= self._failures

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        started = time.perf_counter()
        lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=self.accelerator.device)
        mean_length = self.accelerator.gather(lengths).double().mean().item()
        inputs = [{**row, MEAN_LENGTH: mean_length} for row in inputs]
        rewards_NK = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._local_text.texts = (prompts, completions)
        if not self.log_completions:
            self._pending_extra_logs.clear()  # columns of the table that is not shown
        self._settle_failures(len(rewards_NK))
        self._rewards_NK, self._completion_ids = rewards_NK.cpu(), completion_ids_list
        self._last_reward_seconds = time.perf_counter() - started
        return rewards_NK

    def _settle_failures(self, num_rows: int) -> None:
        """Add up failed scores over the processes; all of them stop, or none.

        Raises:
            TrainingStopped: `rewards.on_error` says so.
        """
        failures = self.suite.take_failures()
        if self.accelerator.num_processes > 1:
            local = [len(failures), len(self._pending_metrics)]
            anywhere = torch.tensor(local, device=self.accelerator.device)
            failed, metrics = self.accelerator.reduce(anywhere, reduction="sum").tolist()
            self._local_text.metrics_logged = metrics > 0
            if failed > 0:
                failures = merge(gather_object(failures))
        self._failures = {f"reward/{one.reward}/failed/{one.reason}": one.count / num_rows for one in failures}
        reason = verdict(failures, num_rows, self.recipe.rewards)
        if reason is not None:
            raise TrainingStopped(reason)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._probe is not None and self._sampled_by_this_policy:
            self._probe.before_loss(inputs)
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, *args: Any, **rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        result = super()._get_per_token_logps_and_entropies(model, *args, **rest)
        if self._probe is not None:
            self._probe.after_forward(result[0])
        return result

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._sampled_by_this_policy = False
            if self._probe is not None and (gradients := self._probe.take()):
                reduced = [self.accelerator.reduce(one, reduction="mean") for one in gradients]
                self.balance.observe_gram(gram_matrix(reduced))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= (
                self._report
                | self.balance.metrics()
                | self.compaction_metrics
                | self.totals.metrics(self.accelerator.num_processes)
            )
            step_seconds = time.perf_counter() - self.step_started
            logs |= {f"time/{part}": seconds for part, seconds in self._times.items()}
            logs["time/train"] = step_seconds - sum(self._times.values())
            self._times = dict.fromkeys(self._times, 0.0)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        del eval_dataset, ignore_keys
        if self.evaluator is None:
            return {}
        evaluation = self.evaluator.run()
        self.last_evaluation = (self.state.global_step, evaluation)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluation.metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.balance.observe_evaluation(evaluation.metrics)
        return metrics

    @property
    def _final_tokens(self) -> set[int]:
        """A completion that ends otherwise was cut off by the token limit (as TRL has it)."""
        return {*self.eos_token_ids, self._tokenizer.pad_token_id}
