"""Which prompts are visited when."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class PromptSampler(Sampler[int]):
    """Positions of prompts in the training data: every prompt once per epoch, a block per generation batch.

    A block holds `prompts_per_batch` prompts, each `rows_per_prompt` times in a row so that it fills the generation
    batch of all processes, and comes `repeats` times, once for every micro-batch that draws on it. How many rollouts a
    prompt really gets is decided when generation is due, not here: accelerate fetches a block ahead. Epoch e is
    shuffled with `seed + e`, so that the order needs no state. Prompts that do not fill a last block are left out of
    that epoch.
    """

    def __init__(
        self, num_prompts: int, prompts_per_batch: int, rows_per_prompt: int, repeats: int, shuffle: bool, seed: int
    ) -> None:
        self.num_prompts, self.prompts_per_batch, self.rows_per_prompt = num_prompts, prompts_per_batch, rows_per_prompt
        self.repeats, self.shuffle, self.seed = repeats, shuffle, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        blocks = self.num_prompts // self.prompts_per_batch
        return blocks * self.prompts_per_batch * self.rows_per_prompt * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.num_prompts)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_prompts, generator=generator)
        for block in order.split(self.prompts_per_batch):
            if len(block) == self.prompts_per_batch:
                yield from block.repeat_interleave(self.rows_per_prompt).repeat(self.repeats).tolist()
