"""Evaluation of the policy that is being trained, with whichever engine generates its rollouts."""

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset

from rlbal.evaluation import Evaluation, evaluate_policy
from rlbal.sampling import end_tokens, generate_samples, prompt_token_ids
from rlbal.scoring import Prompt, Sample
from rlbal.trainer_args import chat_options, completion_limit
from rlbal.trainers.rollout import policy_for_generation, weights_in_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlbal.trainers.grpo import BalancedGRPOTrainer


class PolicyEvaluator:
    """Runs `evaluate_policy` on a trainer's policy; ledger, weights, budget and random state stay as they are."""

    def __init__(self, trainer: "BalancedGRPOTrainer", rows: Dataset) -> None:
        self.trainer, self.rows = trainer, rows
        recipe = trainer.recipe
        self.max_new_tokens = recipe.evaluation.max_completion_length or completion_limit(trainer.args)

    def run(self) -> Evaluation:
        """Evaluate on every process; all of them return the same metrics."""
        accelerator, state = self.trainer.accelerator, self.trainer.state
        # After the last step there is no next one with a budget of its own.
        step = max(0, min(state.global_step, state.max_steps - 1))
        return evaluate_policy(
            self._vllm_samples if self.trainer.use_vllm else self._samples,
            self.rows,
            self.trainer.suite,
            self.trainer.recipe,
            max_new_tokens=self.max_new_tokens,
            budget=self.trainer.budget.tokens(step),
            gather=self._gather if accelerator.num_processes > 1 else None,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        accelerator = self.trainer.accelerator
        return accelerator.gather(torch.from_numpy(rows).to(accelerator.device)).cpu().numpy()

    def _samples(self, prompts: list[Prompt], positions: list[int], greedy: bool, limit: int) -> list[list[Sample]]:
        trainer = self.trainer
        with policy_for_generation(trainer) as model:
            return generate_samples(
                model,
                trainer.tokenizer,
                prompts,
                trainer.recipe.evaluation,
                max_new_tokens=limit,
                seed=trainer.recipe.seed,
                greedy=greedy,
                positions=positions,
                device=trainer.accelerator.device,
                # While training, the bar over steps has the terminal.
                progress=trainer.accelerator.is_main_process and not trainer.is_in_train,
                chat_template_kwargs=chat_options(trainer.args),
                synced=weights_in_parts(trainer),
            )

    def _vllm_samples(
        self, prompts: list[Prompt], positions: list[int], greedy: bool, limit: int
    ) -> list[list[Sample]]:
        """Through TRL's vLLM engine; its sampling is seeded by the engine, not by prompt."""
        trainer, tokenizer = self.trainer, self.trainer.tokenizer
        count = 1 if greedy else trainer.recipe.evaluation.samples_per_prompt
        ids = prompt_token_ids(tokenizer, prompts, chat_options(trainer.args))
        trainer.vllm_generation.sync_weights()
        with self._vllm_settings(greedy, limit):
            repeated = [row for row in ids for _ in range(count)]
            _, completions, _, _ = trainer.vllm_generation.generate(repeated, images=None, num_generations=count)
        ends = end_tokens(self.trainer.accelerator.unwrap_model(trainer.model), tokenizer)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        samples = [
            Sample(list(row), text, truncated=not row or row[-1] not in ends)
            for row, text in zip(completions, texts, strict=True)
        ]
        return [samples[start : start + count] for start in range(0, len(samples), count)]

    @contextmanager
    def _vllm_settings(self, greedy: bool, limit: int) -> "Iterator[None]":
        """Evaluation's sampling settings in TRL's engine, put back afterwards."""
        settings, engine = self.trainer.recipe.evaluation, self.trainer.vllm_generation
        wanted: dict[str, Any] = {
            "temperature": 0.0 if greedy else settings.temperature,
            "top_p": 1.0 if greedy else settings.top_p,
            "top_k": 0 if greedy else settings.top_k,
            "min_p": None,
            "repetition_penalty": 1.0,
            "max_completion_length": limit,
            "generation_kwargs": {},
        }
        with ExitStack() as stack:
            for name, value in wanted.items():
                stack.callback(setattr, engine, name, getattr(engine, name))
                setattr(engine, name, value)
            yield
