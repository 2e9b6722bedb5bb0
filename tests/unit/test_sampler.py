"""The loader's epochs are as long as TRL's."""

import pytest
from trl.trainer.utils import RepeatSampler

from rlbal.trainers.sampler import RowsPerEpoch


@pytest.mark.parametrize(("num_prompts", "prompts_per_batch"), [(11, 3), (12, 3), (2, 3), (5, 1)])
def test_as_many_rows_as_trl_has(num_prompts: int, prompts_per_batch: int) -> None:
    theirs = RepeatSampler(range(num_prompts), 4, batch_size=prompts_per_batch, repeat_count=2)
    ours = RowsPerEpoch(num_prompts, prompts_per_batch, 4, 2)
    assert len(ours) == len(list(ours)) == len(list(theirs))


def test_it_only_keeps_time() -> None:
    assert list(RowsPerEpoch(5, 2, 3, 1)) == [0] * 12  # two whole batches of two prompts, three rows each
