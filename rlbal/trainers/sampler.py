"""How many rows an epoch has. Which prompts they are, `rlbal.prompts.pool` says when generation is due."""

from collections.abc import Iterator

from torch.utils.data import Sampler


class RowsPerEpoch(Sampler[int]):
    """Stands for as many rows of training data as an epoch takes; it always names row 0.

    accelerate fetches a batch ahead, when the prompts of the next one and their shares are not known yet. So the data
    loader only keeps time: a generation batch has `prompts_per_batch` prompts with `rows_per_prompt` rows each, and
    comes `repeats` times, once for every micro-batch that draws on it. Prompts that do not fill a last batch are left
    out.
    """

    def __init__(self, num_prompts: int, prompts_per_batch: int, rows_per_prompt: int, repeats: int) -> None:
        self.rows = num_prompts // prompts_per_batch * prompts_per_batch * rows_per_prompt * repeats

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter([0] * self.rows)
