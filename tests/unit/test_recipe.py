"""What a recipe may say, and the message for what it may not."""

import pytest

from rlbal.errors import RecipeError, nearest
from rlbal.recipe import parse_recipe, parse_yaml
from tests.small_recipe import SMALL, small


def refusal(*overrides):
    with pytest.raises(RecipeError) as caught:
        small(*overrides)
    return str(caught.value)


# Keys and types


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle=x", "`modle` is not a key here. Did you mean `model`?"),
        ("algorithm.nam=grpo", "`algorithm`: `nam` is not a key here. Did you mean `name`?"),
        ("model.tinny=3", "`model`: `tinny` is not a key here. Did you mean `tiny`?"),
        ("model.tiny.layer=3", "`model.tiny`: `layer` is not a key here. Did you mean `layers`?"),
        ("model.tiny.warm_start.step=3", "`model.tiny.warm_start`: `step` is not a key here. Did you mean `steps`?"),
        ("data.promt=x", "`data`: `promt` is not a key here. Did you mean `prompt`?"),
        ("rewards.function=x", "`rewards`: `function` is not a key here. Did you mean `functions`?"),
        (
            "rewards.functions.correct.wieght=2",
            "`rewards.functions.correct`: `wieght` is not a key here. Did you mean `weight`?",
        ),
        ("weighting.methd=x", "`weighting`: `methd` is not a key here. Did you mean `method`?"),
        ("advantage.scaling=x", "`advantage`: `scaling` is not a key here. Did you mean `scale`?"),
        ("budget.sched=x", "`budget`: `sched` is not a key here. Did you mean `schedule`?"),
        ("allocation.methods=x", "`allocation`: `methods` is not a key here. Did you mean `method`?"),
        ("evaluation.pass=[1]", "`evaluation`: `pass` is not a key here. Did you mean `pass_at`?"),
        ("launch.processes=8", "`launch`: `processes` is not a key here. Did you mean `num_processes`?"),
        (
            "advantage.x=1",
            "`advantage`: `x` is not a key here. "
            "Known here: `aggregation`, `baseline`, `beta`, `order`, `scale`, `whiten`.",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(override, message):
    assert refusal(override) == f"recipe:\n{message}"


def test_a_source_only_offers_its_own_keys():
    assert "`path` is not a key here" in refusal("data.path=x.jsonl")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=x", "`seed`: Input should be a valid integer, unable to parse string as an integer (got 'x')"),
        ("algorithm.name=gpro", "`algorithm.name`: Input should be 'grpo', 'rloo', 'reinforce' or 'ppo' (got 'gpro')"),
        (
            "algorithm.rollouts_per_prompt=0",
            "`algorithm.rollouts_per_prompt`: Input should be greater than or equal to 1",
        ),
        ("evaluation.pass_at=[1, x]", "`evaluation.pass_at.1`: Input should be a valid integer"),
        (
            "rewards.functions.correct.weight=.nan",
            "`rewards.functions.correct.weight`: Input should be a finite number",
        ),
        ("rewards.functions.correct.range=[0]", "`rewards.functions.correct.range.1`: Field required"),
        ("rewards.functions.correct={}", "`rewards.functions.correct.function`: Field required"),
        ("trainer=3", "`trainer`: this is a section: give it keys of its own (got 3)"),
        ("model=Qwen/Qwen3-0.6B", "`model`: this is a section: give it keys of its own (got 'Qwen/Qwen3-0.6B')"),
        ("data.source=fil", "`data.source`: 'fil' is no source of data. Did you mean `file`?"),
        (
            "data={task: chain_sum}",
            "`data.source`: None is no source of data. Known here: `file`, `folder`, `hub`, `reasoning_gym`.",
        ),
        (
            "data.prompt={question}",
            "`data.prompt`: Input should be a valid string; put quotes around text that starts with {",
        ),
    ],
)
def test_a_wrong_value_names_its_key(override, message):
    assert message in refusal(override)


def test_missing_sections_are_named_together():
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"seed": 1})
    lines = str(caught.value).splitlines()
    assert lines == ["recipe:", *(f"`{key}`: Field required" for key in ("output_dir", "model", "data", "rewards"))]


def test_an_empty_section_is_all_defaults():
    assert parse_recipe(parse_yaml(SMALL + "trainer:\nevaluation:\nadvantage:\n")) == small()


def test_nearest_lists_few_options_and_stays_silent_about_many():
    assert nearest("zzz", ["b", "a"]) == "Known here: `a`, `b`."
    assert nearest("zzz", [f"a{number}" for number in range(30)]) == ""


# Combinations


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.name_or_path=Qwen/Qwen2.5-1.5B"],
            "`model`: give exactly one of `model.name_or_path` (hub id or folder) and `model.tiny`",
        ),
        (["model={}"], "`model`: give exactly one of `model.name_or_path` (hub id or folder) and `model.tiny`"),
        (
            ["rewards.functions.correct.function=exact_match"],
            "`rewards.functions.correct`: `exact_match` names no function; write `module:function` or "
            "`path/to/file.py:function`",
        ),
        (
            ["rewards.functions.correct.range=[1, 0]"],
            "`rewards.functions.correct`: `range` must be [low, high] with low < high, not [1.0, 0.0]",
        ),
        (["rewards.functions={}"], "`rewards`: `rewards.functions` is empty; name at least one reward function"),
        (
            ["rewards.functions.a/b={function: 'a:b'}"],
            "`rewards`: reward name `a/b` must start with a letter and hold only A-Z a-z 0-9 _ -",
        ),
        (
            ["rewards.functions.correct.weight=0"],
            "`rewards`: every reward has `weight: 0`, so there is nothing to learn; give at least one a weight",
        ),
        (
            ["rewards.success=corect"],
            "`rewards`: `rewards.success` names `corect`, which is not under `rewards.functions`. "
            "Did you mean `correct`?",
        ),
        (["evaluation.pass_at=[]"], "`evaluation`: `evaluation.pass_at` is empty; at least [1]"),
        (
            ["evaluation.pass_at=[1, 8]"],
            "`evaluation`: pass@8 needs as many samples: raise `evaluation.samples_per_prompt` (now 4) or lower "
            "`evaluation.pass_at`",
        ),
        (
            ["evaluation.best_metric=reward/corect"],
            "`evaluation.best_metric: reward/corect` is not measured. Did you mean `reward/correct`?",
        ),
        (
            ["evaluation.best_metric=pass@4"],
            "`evaluation.best_metric: pass@4` is not measured. Did you mean `pass@1`?",
        ),
        (
            ["evaluation.every=10", "data.eval_size=0"],
            "`evaluation.every` is set but no rows are held out: set `data.eval_size` above 0",
        ),
        (
            ["algorithm.rollouts_per_prompt=1"],
            "`advantage.baseline: group` compares the rollouts of one prompt, but `algorithm.rollouts_per_prompt` is "
            "1, so every advantage would be 0; use at least 2 rollouts, or `advantage.baseline: batch` or `none` "
            "(algorithm reinforce)",
        ),
        (
            ["advantage.baseline=batch", "algorithm.rollouts_per_prompt=1"],
            "`advantage.scale: group_std` needs several rollouts per prompt, but `algorithm.rollouts_per_prompt` is 1; "
            "use at least 2, or `advantage.scale: none` or `batch_std`",
        ),
        (
            ["advantage.scale=beta", "rewards.functions.correct.range=[0, 1]"],
            "`advantage.scale: beta` normalises each reward by its own Beta density, so it needs "
            "`advantage.order: normalize_then_sum`",
        ),
        (
            ["advantage.scale=beta", "advantage.order=normalize_then_sum"],
            "`advantage.scale: beta` maps rewards to [0, 1]: give `rewards.functions.correct.range`",
        ),
        (
            ["advantage.scale=beta", "advantage.order=normalize_then_sum", "algorithm.name=rloo"],
            "`advantage.scale: beta` is defined around the group mean: set `advantage.baseline: group`",
        ),
    ],
)
def test_an_impossible_combination_says_why(overrides, message):
    assert refusal(*overrides) == f"recipe:\n{message}"


def test_one_rollout_per_prompt_where_the_algorithm_allows_it():
    assert small("algorithm.name=reinforce", "algorithm.rollouts_per_prompt=1").advantage.baseline == "none"


@pytest.mark.parametrize(
    ("algorithm", "baseline", "scale"),
    [("grpo", "group", "group_std"), ("rloo", "leave_one_out", "none"), ("reinforce", "none", "none")],
)
def test_an_algorithm_is_a_baseline_and_a_scale(algorithm, baseline, scale):
    advantage = small(f"algorithm.name={algorithm}").advantage
    assert (advantage.baseline, advantage.scale) == (baseline, scale)


def test_advantage_keys_override_the_algorithm():
    advantage = small("algorithm.name=rloo", "advantage.scale=batch_std").advantage
    assert (advantage.baseline, advantage.scale) == ("leave_one_out", "batch_std")


def test_success_is_the_first_reward_unless_named():
    second = "rewards.functions.short={function: 'a:b'}"
    assert small(second).rewards.success_name == "correct"
    assert small(second, "rewards.success=short").rewards.success_name == "short"


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = small("output_dir=~/runs/a", 'data={source: file, path: ["~/a.jsonl", b~.jsonl], eval_path: ~/c.jsonl}')
    assert recipe.output_dir == "/home/someone/runs/a"
    assert (
        recipe.data.path == ["/home/someone/a.jsonl", "b~.jsonl"] and recipe.data.eval_path == "/home/someone/c.jsonl"
    )
