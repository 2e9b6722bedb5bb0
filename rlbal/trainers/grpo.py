"""GRPO, RLOO and REINFORCE on TRL's GRPOTrainer.

One training step, in the order of the methods below:

    _get_train_sampler               which prompts come next
    training_step                    the parts of a micro-batch, one backward pass each
    _prepare_inputs                  generation is due: how many rollouts each prompt gets, and their rows;
                                     afterwards, micro-batches without rows and padding that teach nothing
    _generate_and_score_completions  TRL generates and scores; our advantages replace TRL's
    _calculate_rewards               raw rewards of all processes; failed scores decided alike on every process
    log                              what metrics.jsonl says of the step
    evaluate                         held-out evaluation with its own sampling

TRL keeps generation, the loss, LoRA, checkpoints and the distributed engines. Each method calls `super()`, and each has
a contract test that fails when TRL changes under it.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from rlbal.balance.advantages import AdvantageRule, compute_advantages
from rlbal.balance.weighting import FixedWeighting
from rlbal.batch import RolloutBatch, batch_metrics, group_rows
from rlbal.batch_plan import BatchPlan
from rlbal.errors import TrainingStopped
from rlbal.evaluation import Evaluation
from rlbal.prompts.allocation import uniform_counts
from rlbal.prompts.budget import NoBudget
from rlbal.recipe import Recipe
from rlbal.rewards.outcomes import merge, verdict
from rlbal.rewards.suite import RewardSuite
from rlbal.scaling.compute import rollout_flops
from rlbal.trainers.evaluator import PolicyEvaluator
from rlbal.trainers.microbatch import Compaction, compact, compaction, inexact, share_left
from rlbal.trainers.rollout import Rollouts, reason_for_transformers
from rlbal.trainers.sampler import PromptSampler
from rlbal.trainers.totals import Totals, model_shape

logger = logging.getLogger(__name__)


class BalancedGRPOTrainer(GRPOTrainer):
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

    args: GRPOConfig

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
        functions = recipe.rewards.functions
        self.rule = AdvantageRule(**recipe.advantage.model_dump())
        self.weighting = FixedWeighting([spec.weight for spec in functions.values()])
        self.budget = NoBudget()
        ranges = [spec.range for spec in functions.values()]
        self.ranges_K2 = torch.tensor(ranges) if all(ranges) else None
        self.success = list(functions).index(recipe.rewards.success_name)
        self.batch: RolloutBatch | None = None
        self.totals = Totals()
        self._report: dict[str, float] = {}
        self._times: dict[str, float] = dict.fromkeys(("generate", "reward", "balance"), 0.0)
        self._last_reward_seconds = 0.0
        self.step_started = time.perf_counter()
        self.last_evaluation: tuple[int, Evaluation] | None = None
        self.notes: list[str] = []
        self._rollouts = self._choose_generation(kwargs["model"], kwargs["args"])
        if self._rollouts is not None:
            kwargs.setdefault("rollout_func", self._rollouts)
        super().__init__(
            reward_funcs=list(suite.functions),
            # The loader hands out positions only; rows are fetched when generation is due.
            train_dataset=rows.select_columns(["prompt_index"]),
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            **kwargs,
        )
        self.shape = model_shape(self.accelerator.unwrap_model(self.model))
        self.evaluator = PolicyEvaluator(self, eval_rows) if eval_rows is not None else None
        self._compaction = self._choose_compaction()

    def _choose_generation(self, model: Any, args: GRPOConfig) -> Rollouts | None:
        """Our own generation, or None where the recipe asks for another or the model needs transformers'."""
        speed = self.recipe.speed
        if speed.generation != "rlbal" or args.use_vllm or args.use_transformers_continuous_batching:
            return None
        reason = reason_for_transformers(model, args)
        if reason is not None:
            self.notes.append(f"rollouts are generated by transformers: {reason}")
            return None
        return Rollouts(self, speed.rows_at_once)

    def _choose_compaction(self) -> Compaction | None:
        """How micro-batches are compacted, or None; says so where the recipe's loss does not allow it."""
        if not self.recipe.speed.compact_micro_batches:
            return None
        reason = inexact(self)
        if reason is not None:
            self.notes.append(f"micro-batches are not compacted: {reason}")
            return None
        return compaction(self, self.recipe.speed.max_tokens_per_micro_batch)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        del dataset
        return PromptSampler(
            num_prompts=len(self.rows),
            prompts_per_batch=self.plan.prompts,
            rows_per_prompt=self.plan.rollouts_per_prompt,
            repeats=self.num_iterations * self.plan.steps_per_generation,
            shuffle=bool(self.shuffle_dataset),
            seed=self.args.seed,
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        parts, step = self._prepare_inputs(inputs), self._step
        loss = torch.zeros((), device=self.accelerator.device)
        for index, part in enumerate(parts):
            self._step = step  # TRL counts its micro-batches with it, and a part is no step of its own
            with nullcontext() if index == len(parts) - 1 else self._without_sync(model):
                loss += super().training_step(model, part, num_items_in_batch)
        self._step = step + 1
        return loss

    @contextmanager
    def _without_sync(self, model: Any) -> Iterator[None]:
        """Backward passes that only accumulate: DDP does not reduce, and DeepSpeed takes no step."""
        state, deepspeed = self.accelerator.gradient_state, DistributedType.DEEPSPEED
        before = state.sync_gradients
        state._set_sync_gradients(False)
        with nullcontext() if self.accelerator.distributed_type == deepspeed else self.accelerator.no_sync(model):
            yield
        state._set_sync_gradients(before)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The parts that this step trains on; a part itself, which TRL asks for again, is ready as it is."""
        if isinstance(generation_batch, dict):
            return generation_batch
        every = self.plan.steps_per_generation * self.num_iterations
        due = self._step % every == 0 or self._buffered_inputs is None
        if due:
            generation_batch = self._allocate(generation_batch)
        parts = super()._prepare_inputs(generation_batch)
        if due:
            buffered: Any = self._split(self._buffered_inputs)  # type: ignore[arg-type]
            self._buffered_inputs = buffered
            parts = buffered[self._step % self.plan.steps_per_generation]
        return parts

    def _split(self, micro_batches: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """TRL's micro-batches as lists of parts, compacted where that is possible."""
        whole = [[one] for one in micro_batches]
        if self._compaction is None:
            return whole
        parts = compact(
            micro_batches,
            # Optimizer steps begin and end at multiples of it, also in later iterations over the same rollouts.
            math.gcd(self.plan.steps_per_generation, self.plan.accumulation),
            self._compaction,
            self.accelerator.gather,
            self.accelerator.process_index,
        )
        if parts is None:
            self._compaction = None
            logger.warning("micro-batches are not compacted: they hold more than text")
            return whole
        self._report |= share_left(micro_batches, parts)
        return parts

    def _allocate(self, loaded: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """This process's rows of the generation batch, one per rollout."""
        local = torch.tensor([row["prompt_index"] for row in loaded], device=self.accelerator.device)
        index_N = self.accelerator.gather(local).cpu()
        prompts_P = torch.tensor(list(dict.fromkeys(index_N.tolist())))
        index_N = prompts_P.repeat_interleave(uniform_counts(len(prompts_P), len(index_N)))
        mine = index_N[self._local_slice(len(loaded))].tolist()
        row_of = {index: self.rows[index] for index in set(mine)}
        return [dict(row_of[index]) for index in mine]

    def _local_slice(self, local_rows: int) -> slice:
        start = self.accelerator.process_index * local_rows
        return slice(start, start + local_rows)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        if self._rollouts is not None:
            self._rollouts.inputs = inputs
        output = super()._generate_and_score_completions(inputs)
        balance_started = time.perf_counter()
        self._times["generate"] += balance_started - started - self._last_reward_seconds
        self._times["reward"] += self._last_reward_seconds

        self.batch = self._gather_batch(inputs, output)
        weights_K = self.weighting.weights()
        advantages_N, details = compute_advantages(
            self.batch.rewards_NK, self.batch.group_N, weights_K, self.rule, self.ranges_K2
        )
        output["advantages"] = advantages_N[self._local_slice(len(inputs))].to(self.accelerator.device)
        logged: deque[float] = self._logs["advantages"]  # type: ignore[assignment]
        logged.clear()
        logged.extend(advantages_N.tolist())
        self._account(weights_K, advantages_N, details)
        self._times["balance"] += time.perf_counter() - balance_started
        return output

    def _gather_batch(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> RolloutBatch:
        """The batch over all processes; per-row numbers travel, never text."""
        prompt_tokens = output["prompt_mask"].sum(dim=1).tolist()
        local = [
            [row["prompt_index"], prompt, len(ids), ids[-1] not in self._final_tokens]
            for row, prompt, ids in zip(inputs, prompt_tokens, self._completion_ids, strict=True)
        ]
        columns = self.accelerator.gather(torch.tensor(local, device=self.accelerator.device)).cpu()
        index_N, prompt_N, completion_N, truncated_N = columns.unbind(1)
        return RolloutBatch(
            prompt_index_N=index_N,
            group_N=group_rows(index_N),
            rewards_NK=self._rewards_NK,
            completion_tokens_N=completion_N,
            prompt_tokens_N=prompt_N,
            truncated_N=truncated_N.bool(),
        )

    def _account(self, weights_K: torch.Tensor, advantages_N: torch.Tensor, details: dict[str, list[float]]) -> None:
        """Count what the batch cost, and keep what metrics.jsonl will say of it."""
        batch, names = self.batch, self.suite.names
        assert batch is not None
        prompt_tokens, completion_tokens = batch.prompt_tokens_N.tolist(), batch.completion_tokens_N.tolist()
        self.totals.rollouts += len(completion_tokens)
        self.totals.tokens_generated += sum(completion_tokens)
        self.totals.flops += rollout_flops(self.shape, prompt_tokens, completion_tokens, self.num_iterations)
        budget = self.budget.tokens(self.state.global_step)
        self._report = batch_metrics(batch, weights_K, names, self.success, budget)
        self._report["advantage/abs_mean"] = advantages_N.abs().mean().item()
        for detail, values in details.items():
            self._report |= {f"beta/{detail}/{name}": value for name, value in zip(names, values, strict=True)}
        self._report |= self._failures

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        started = time.perf_counter()
        lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=self.accelerator.device)
        mean_length = self.accelerator.gather(lengths).double().mean().item()
        inputs = [{**row, "mean_completion_length": mean_length} for row in inputs]
        rewards_NK = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
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
            anywhere = torch.tensor(len(failures), device=self.accelerator.device)
            if self.accelerator.reduce(anywhere, reduction="sum").item() > 0:
                failures = merge(gather_object(failures))
        self._failures = {f"reward/{one.reward}/failed/{one.reason}": one.count / num_rows for one in failures}
        reason = verdict(failures, num_rows, self.recipe.rewards)
        if reason is not None:
            raise TrainingStopped(reason)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._report | self.totals.metrics(self.accelerator.num_processes)
            step_seconds = time.perf_counter() - self.step_started
            logs |= {f"time/{part}": seconds for part, seconds in self._times.items()}
            logs["time/train"] = step_seconds - sum(self._times.values())
            self._times = dict.fromkeys(self._times, 0.0)
            self._metrics["train"].pop("step_time", None)  # TRL's would take a part for a step; time/* say it
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
        return metrics

    @property
    def _final_tokens(self) -> set[int]:
        """A completion that ends otherwise was cut off by the token limit (as TRL has it)."""
        return {*self.eos_token_ids, self._tokenizer.pad_token_id}

    def rlbal_state(self) -> dict[str, Any]:
        """What a checkpoint needs besides TRL's part."""
        return {
            "totals": self.totals.metrics(self.accelerator.num_processes),
            "weighting": self.weighting.state_dict(),
        }

    def load_rlbal_state(self, state: dict[str, Any]) -> None:
        """Go on from `rlbal_state`."""
        self.totals.load(state["totals"])
        self.weighting.load_state_dict(state["weighting"])

    def save_now(self) -> None:
        """Write a checkpoint of the last complete optimizer step, outside the training loop."""
        self._save_checkpoint(self.model, trial=None)
        self.callback_handler.on_save(self.args, self.state, self.control)
