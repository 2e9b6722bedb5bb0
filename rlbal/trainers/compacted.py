"""TRL's GRPOTrainer at the same gradient with less work: the seams through which `rlbal.trainers.microbatch` acts.

training_step                       a micro-batch is a list of parts, one backward pass each
_prepare_inputs                     after generation: micro-batches become lists of parts
_get_per_token_logps_and_entropies  old and reference log-probabilities of a whole batch, part by part
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from accelerate.utils import DistributedType
from trl import GRPOConfig, GRPOTrainer

from rlbal.speed import inexact, no_token_budget
from rlbal.trainers.microbatch import Compaction, MicroBatch, compact, forward_in_parts, rules, token_counts

logger = logging.getLogger(__name__)


class CompactedGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, training on parts of rows of similar length that have something to teach.

    Args:
        compact: switch it off with False, for comparison.
        max_tokens: tokens of a part, padding included; None for as many as TRL's micro-batches have.
        kwargs: as for GRPOTrainer.
    """

    args: GRPOConfig

    def __init__(self, *, compact: bool = True, max_tokens: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.notes: list[str] = []  # what a user should know of how this run is done
        self.compaction_metrics: dict[str, float] = {}
        self._compaction: Compaction | None = None
        config: Any = self.model.config  # type: ignore[union-attr]
        if compact and (reason := inexact(self.args, config)) is not None:
            if max_tokens is not None:
                raise no_token_budget(reason)
            self.notes.append(f"micro-batches are not compacted: {reason}")
        elif compact:
            self._compaction = rules(self, max_tokens)

    @property
    def generation_is_due(self) -> bool:
        """Whether the next training step begins with a new generation batch."""
        every = (self.args.steps_per_generation or 1) * self.num_iterations
        training = bool(self.model.training)  # type: ignore[union-attr]
        return training and (self._step % every == 0 or self._buffered_inputs is None)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        parts, step = self._prepare_inputs(inputs), self._step
        loss = torch.zeros((), device=self.accelerator.device)
        for index, part in enumerate(parts):
            self._step = step  # TRL counts its micro-batches with it, and a part is none of its own
            with nullcontext() if index == len(parts) - 1 else self._without_sync(model):
                loss += super().training_step(model, part, num_items_in_batch)
        self._step = step + 1
        self._metrics["train"].pop("step_time", None)  # of parts, not of steps
        return loss

    @contextmanager
    def _without_sync(self, model: Any) -> Iterator[None]:
        """Backward passes that only add up: DDP does not reduce, and DeepSpeed takes no step."""
        state, deepspeed = self.accelerator.gradient_state, DistributedType.DEEPSPEED
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with nullcontext() if self.accelerator.distributed_type == deepspeed else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The parts that this step trains on; a part itself, for which TRL asks again, is ready as it is."""
        if isinstance(generation_batch, dict):
            return generation_batch
        if not self.model.training:  # type: ignore[union-attr]
            return super()._prepare_inputs(generation_batch)
        due = self.generation_is_due
        parts = super()._prepare_inputs(generation_batch)
        if due:
            buffered: Any = self._split(self._buffered_inputs)  # type: ignore[arg-type]
            self._buffered_inputs = buffered
            parts = buffered[self._step % len(buffered)]
        return parts

    def _split(self, micro_batches: list[MicroBatch]) -> list[list[MicroBatch]]:
        """TRL's micro-batches as lists of parts, compacted where that is possible."""
        whole = [[one] for one in micro_batches]
        if self._compaction is None:
            return whole
        # Optimizer steps begin and end at multiples of it, also in later iterations over the same rollouts.
        block = math.gcd(len(micro_batches), self.args.gradient_accumulation_steps)
        accelerator = self.accelerator
        parts = compact(micro_batches, block, self._compaction, accelerator.gather, accelerator.process_index)
        if parts is None:
            self._compaction = None
            logger.warning("micro-batches are not compacted: they hold more than text")
            return whole
        counts = torch.stack([token_counts(some) for some in (micro_batches, list(chain(*parts)))])
        before, after = accelerator.reduce(counts.to(accelerator.device), reduction="sum")
        rows, tokens = (after / before).tolist()
        self.compaction_metrics = {"compaction/rows": rows, "compaction/tokens": tokens}
        return parts

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any, **rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        whole_batch = rest.get("batch_size") is not None and not args
        only_text = all(value is None for key, value in rest.items() if key != "batch_size")
        forward = super()._get_per_token_logps_and_entropies
        if self._compaction is None or not whole_batch or not only_text:
            return forward(model, input_ids, attention_mask, logits_to_keep, *args, **rest)
        logps = forward_in_parts(
            lambda ids, mask, keep: forward(model, ids, mask, keep)[0],
            input_ids,
            attention_mask,
            logits_to_keep,
            self._compaction,
            self.accelerator.gather,
            self.accelerator.process_index,
        )
        return logps, None, None
