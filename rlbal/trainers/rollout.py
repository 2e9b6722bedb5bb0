"""Rollouts by rlbal's own decoding, as the `rollout_func` that TRL calls when a generation batch is due."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from trl.models import unwrap_model_for_generation

from rlbal.decoding import decode
from rlbal.sampling import prompt_token_ids
from rlbal.trainer_args import chat_options

if TYPE_CHECKING:
    from rlbal.trainers.grpo import BalancedGRPOTrainer


@contextmanager
def policy_for_generation(trainer: "BalancedGRPOTrainer") -> Iterator[Any]:
    """The policy's model with its weights in place, as TRL unwraps it for its own generation."""
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]
        ) as model,
        trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
    ):
        yield model


@contextmanager
def generation_limit(trainer: "BalancedGRPOTrainer", tokens: int) -> Iterator[None]:
    """Stop generating after so many tokens at the latest, in whichever engine generates; put back afterwards.

    `max_completion_length` of the trainer stays: it scales the `dr_grpo` loss, and evaluation goes by it.
    """
    engine, name = (
        (trainer.vllm_generation, "max_completion_length")
        if trainer.use_vllm
        else (trainer.generation_config, "max_new_tokens")
    )
    before = getattr(engine, name)
    setattr(engine, name, min(before, tokens))
    try:
        yield
    finally:
        setattr(engine, name, before)


def weights_in_parts(trainer: "BalancedGRPOTrainer") -> bool:
    """Whether processes must call the model equally often, since each holds a part of its weights."""
    if trainer.accelerator.num_processes == 1:
        return False
    return trainer._dist.is_fsdp or (trainer._dist.is_zero3 and not trainer.args.ds3_gather_for_generation)


def core_to_spare(device: torch.device) -> bool:
    """Whether verification can run beside generation without taking its cores, which costs more than it saves."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return device.type != "cpu" or torch.get_num_threads() * processes < len(os.sched_getaffinity(0))


class Rollouts:
    """Decodes the prompts of a generation batch; the rewards of finished rows start while others still go on.

    The tokens of rollout n of the run are drawn with numbers seeded by (seed, n) alone: the same on any number of
    processes, whichever rows are decoded together, and after a resume.

    Args:
        trainer: whose policy, settings and rewards are used.
        rows_at_once: how many rows are decoded together; None for all.
    """

    def __init__(self, trainer: "BalancedGRPOTrainer", rows_at_once: int | None) -> None:
        self.trainer, self.rows_at_once = trainer, rows_at_once
        self.inputs: list[dict[str, Any]] = []  # this process's rows of the generation batch, one per rollout

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """One completion for each prompt, in order, in the form that TRL expects."""
        own, N = self.trainer, len(prompts)
        ids = prompt_token_ids(own.tokenizer, prompts, chat_options(own.args))
        completions: list[list[int]] = [[]] * N
        with policy_for_generation(own) as model:
            for wave in self._waves(N):
                for row, completion in zip(wave, self._decode(model, ids, wave), strict=True):
                    completions[row] = completion
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    @property
    def _overlaps(self) -> bool:
        """Whether rewards can start early, with the arguments they would get later; TRL may parse chat completions."""
        parsed = any(getattr(self.trainer.tokenizer, kind, None) for kind in ("response_template", "response_schema"))
        return self.trainer.suite.overlaps and not parsed and core_to_spare(self.trainer.accelerator.device)

    def _decode(self, model: Any, ids: list[list[int]], wave: list[int]) -> list[list[int]]:
        own, overlaps = self.trainer, self._overlaps
        first, limit = (
            own.totals.rollouts + own.accelerator.process_index * len(ids),
            own.generation_config.max_new_tokens,
        )
        uniforms_RT = np.stack([np.random.default_rng((own.args.seed, first + row)).random(limit) for row in wave])

        def on_finished(rows: list[int], done: list[list[int]]) -> None:
            if overlaps:
                self._prefetch([wave[row] for row in rows], done)

        return decode(
            model,
            [ids[row] for row in wave],
            own.generation_config,
            uniforms_RT,
            on_finished=on_finished,
            device=own.accelerator.device,
            synced=weights_in_parts(own),
        )

    def _waves(self, N: int) -> list[list[int]]:
        """Rows to be decoded together: those expected to be longest first, so that the rows of a wave end together.

        Expected by the ledger, which checkpoints hold: what is decoded together decides the last bits of the logits.
        """
        rows = list(range(N))
        if self.rows_at_once is None or self.rows_at_once >= len(rows):
            return [rows]
        prompt_of_row = [row["prompt_index"] for row in self.inputs]
        expected = self.trainer.allocator.ledger.expected_lengths(np.array(prompt_of_row))
        # A prompt's rows stay together: they share its prefill.
        rows.sort(key=lambda row: (-expected[row], prompt_of_row[row]))
        return [rows[start : start + self.rows_at_once] for start in range(0, len(rows), self.rows_at_once)]

    def _prefetch(self, rows: list[int], completions: list[list[int]]) -> None:
        """Have finished rows scored, with the arguments that the rewards will get."""
        own = self.trainer
        inputs = [self.inputs[row] for row in rows]
        prompts = [row["prompt"] for row in inputs]
        texts: list[Any] = own.tokenizer.batch_decode(completions, skip_special_tokens=True)
        if not isinstance(prompts[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        others = inputs[0].keys() - {"prompt", "completion", "completion_ids"}  # TRL passes the same
        columns = {key: [row[key] for row in inputs] for key in others}
        own.suite.prefetch(prompts, texts, completions, columns)
