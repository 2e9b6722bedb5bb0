"""The order of prompts: TRL's in the first epoch, another but repeatable one in each later epoch."""

import pytest
from trl.trainer.utils import RepeatSampler

from rlbal.trainers.sampler import PromptSampler


def order(epoch=0, num_prompts=11, prompts_per_batch=3, rows_per_prompt=4, repeats=2, shuffle=True, seed=5):
    sampler = PromptSampler(num_prompts, prompts_per_batch, rows_per_prompt, repeats, shuffle, seed)
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    return indices


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("num_prompts", "prompts_per_batch"), [(11, 3), (12, 3), (2, 3), (5, 1)])
def test_the_first_epoch_is_trls(num_prompts, prompts_per_batch, shuffle):
    theirs = RepeatSampler(range(num_prompts), 4, batch_size=prompts_per_batch, repeat_count=2, shuffle=shuffle, seed=5)
    assert order(0, num_prompts, prompts_per_batch, shuffle=shuffle) == list(theirs)


def test_a_block_is_each_prompt_in_a_row_repeated_and_the_incomplete_last_one_is_dropped():
    assert order(num_prompts=5, prompts_per_batch=2, rows_per_prompt=3, repeats=2, shuffle=False) == [
        *[0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1],
        *[2, 2, 2, 3, 3, 3, 2, 2, 2, 3, 3, 3],
    ]


def test_every_prompt_comes_once_per_epoch():
    indices = order(num_prompts=12)
    assert sorted(indices) == sorted(list(range(12)) * 8)


def test_epochs_differ_and_repeat_by_seed():
    assert order(1) != order(0)
    assert order(1) == order(1)
    assert order(1, seed=6) != order(1)


def test_reading_twice_changes_nothing():
    sampler = PromptSampler(11, 3, 4, 2, True, 5)
    assert list(sampler) == list(sampler)
