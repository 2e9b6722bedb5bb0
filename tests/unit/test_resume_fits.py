"""What may have changed between a checkpoint and the recipe that goes on from it."""

import pytest
from datasets import Dataset

from rlbal.batch_plan import BatchPlan
from rlbal.errors import RunError
from rlbal.resume import check_fits, data_probe, differences, identity
from tests.small_recipe import small

PLAN = BatchPlan(num_processes=1, per_device=16, accumulation=1, steps_per_generation=1, rollouts_per_prompt=8)


def rows(count=20, first="1 + 1?"):
    return Dataset.from_dict({"prompt": [first, *(f"{number}?" for number in range(count - 1))]})


def said(*overrides, plan=PLAN, data=None, engine="plain"):
    return identity(small(*overrides), plan, data or rows(), engine)


def fits(then, now, mid_cycle=False):
    return check_fits(then, now, "checkpoint-4", mid_cycle)


def test_differences_are_named_by_their_keys():
    then = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": {"x": 1}}
    now = {"a": 1, "b": {"c": [1, 3], "d": 0.5}, "new": True}
    assert differences(then, now) == {
        "b.c": ([1, 2], [1, 3]),
        "b.d": (None, 0.5),
        "gone": ({"x": 1}, None),
        "new": (None, True),
    }


def test_the_same_recipe_fits_and_nothing_is_said():
    assert fits(said(), said()) == []


@pytest.mark.parametrize("override", ["output_dir=runs/other", "trainer.report_to=none", "trainer.save_steps=3"])
def test_what_only_says_how_a_run_is_recorded_may_change(override):
    assert fits(said(), said(override)) == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainer.max_grad_norm=0.5", "resumed with another `trainer.max_grad_norm` (None then, 0.5 now)"),
        ("evaluation.every=7", "resumed with another `evaluation.every` (None then, 7 now)"),
        (
            "rewards.functions.correct.weight=2.0",
            "resumed with another `rewards.functions.correct.weight` (1.0 then, 2.0 now)",
        ),
        ("trainer.max_steps=900", "resumed with another `trainer.max_steps` (None then, 900 now)"),
    ],
)
def test_what_a_run_may_go_on_with_is_told(override, told):
    assert fits(said(), said(override)) == [told]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["trainer.learning_rate=0.5"], ["`trainer.learning_rate` (None then, 0.5 now)"]),
        (["trainer.adam_beta1=0.5"], ["`trainer.adam_beta1` (None then, 0.5 now)"]),
        (["seed=3"], ["`seed` (0 then, 3 now)"]),
        (["model.tiny.hidden_size=64"], ["`model.tiny.hidden_size` (96 then, 64 now)"]),
        (["lora.r=4"], ["`lora` (None then, {'r': 4} now)"]),
        (["algorithm.name=ppo"], ["`algorithm.name` (grpo then, ppo now)"]),
        (["trainer.optim=sgd", "seed=1"], ["`seed` (0 then, 1 now)", "`trainer.optim` (None then, sgd now)"]),
        (
            ["rewards.functions.new.function=reward_fns.format:boxed", "rewards.success=correct"],
            ["`rewards.functions.new`"],
        ),
    ],
)
def test_what_a_checkpoint_is_tied_to_is_refused_by_name(overrides, named):
    with pytest.raises(RunError) as refused:
        fits(said(), said(*overrides))
    assert str(refused.value).startswith("checkpoint-4 does not fit the recipe\nWhy: different are ")
    assert all(words in str(refused.value) for words in named)
    assert "\nFix: resume with the recipe in the run's directory" in str(refused.value)


def test_a_file_of_data_may_move_but_not_change():
    assert fits(said(), said("data.size=600")) == ["resumed with another `data.size` (10000 then, 600 now)"]
    with pytest.raises(RunError, match=r"the training data \(20 rows then, 20 now, other rows\)"):
        fits(said(), said(data=rows(first="2 + 2?")))
    with pytest.raises(RunError, match=r"`data.prompt` \([\s\S]* then, .* now\)"):
        fits(said(), said("data.prompt='Q: {question}'", data=rows(first="Q: 1 + 1?")))


def test_the_probe_sees_the_size_and_the_prompts():
    assert data_probe(rows()) == data_probe(rows())
    assert data_probe(rows())["rows"] == 20
    assert data_probe(rows(count=21))["digest"] != data_probe(rows())["digest"]
    assert len({data_probe(rows(count=5000, first=first))["digest"] for first in ("a", "b")}) == 2


def test_other_batches_are_refused():
    smaller = BatchPlan(num_processes=1, per_device=8, accumulation=1, steps_per_generation=1, rollouts_per_prompt=8)
    with pytest.raises(
        RunError, match=r"16 rollouts of 2 prompts, 16 rows a step then, 8 rollouts of 1 prompts, 8 rows"
    ):
        fits(said(), said(plan=smaller))


def test_more_processes_with_the_same_batches_are_told_or_refused():
    halves = BatchPlan(num_processes=2, per_device=8, accumulation=1, steps_per_generation=1, rollouts_per_prompt=8)
    assert fits(said(), said(plan=halves)) == ["resumed on 2 processes, not 1: equal up to rounding at best"]
    with pytest.raises(RunError, match=r"the number of processes \(1 then, 2 now; it holds rollouts of each of them\)"):
        fits(said(), said(plan=halves), mid_cycle=True)
    with pytest.raises(RunError, match="the optimizer's state is in as many pieces"):
        fits(said(engine="zero2"), said(plan=halves, engine="zero2"))


def test_another_engine_is_refused():
    with pytest.raises(RunError, match=r"`launch.accelerate` \(zero2 then, plain now\)"):
        fits(said(engine="zero2"), said())


@pytest.mark.parametrize(("place", "refused"), [("/elsewhere/base", False), ("/models/other", True)])
def test_the_folder_of_the_model_may_move(place, refused):
    then, now = (said("model={}", f"model.name_or_path={path}") for path in ("/models/base", place))
    if refused:
        with pytest.raises(RunError, match=r"`model.name_or_path` \(/models/base then, /models/other now\)"):
            fits(then, now)
    else:
        assert fits(then, now) == [f"resumed with another `model.name_or_path` (/models/base then, {place} now)"]
