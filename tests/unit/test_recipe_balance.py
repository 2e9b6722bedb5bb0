"""What the `weighting` and `advantage.beta` sections may say, and the message for what they may not."""

import pytest

from rlbal.errors import RecipeError
from rlbal.recipe import Recipe, parse_recipe, parse_yaml
from tests.small_recipe import small

BOTH = "rewards.functions={{a: {{function: 'm:f', range: [0, 1]{a}}}, b: {{function: 'm:g', range: [0, 1]{b}}}}}"
TWO = BOTH.format(a="", b="")


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        small(*overrides)
    return str(caught.value)


def again(recipe: Recipe) -> Recipe:
    return parse_recipe(parse_yaml(recipe.dump()))


GOOD = [
    "weighting={}",
    "weighting.method=fixed",
    "weighting={method: schedule, points: {a: [[0, 1], [0.5, 0]]}}",
    "weighting={method: hypervolume, objectives: {a: max, tokens: min}}",
    "weighting={method: hypervolume, objectives: {a: max, b: min}, smoothing: 0.5, apply: advantages}",
    "weighting.method=gradient",
    "weighting={method: gradient, probe: last_blocks, blocks: 2, floor: 0.2, cap: 0.8}",
]


@pytest.mark.parametrize("override", GOOD)
def test_a_resolved_recipe_reads_back_equal(override: str) -> None:
    recipe = small(TWO, override)
    assert again(recipe) == recipe


def test_validation_scores_come_from_evaluations() -> None:
    weighting = "weighting={method: hypervolume, objectives: {a: max, b: max}, source: validation}"
    assert "set `evaluation.every`" in refusal(TWO, weighting)
    recipe = small(TWO, weighting, "evaluation={every: 5, best_metric: reward/a}")
    assert again(recipe) == recipe
    assert "`weighting.smoothing` is for `source: train`" in refusal(
        TWO, weighting.replace("validation", "validation, smoothing: 0.5"), "evaluation.every=5"
    )


BAD = [
    ("weighting.method=gradiant", "`weighting.method`: 'gradiant' is no method of weighting. Did you mean `gradient`?"),
    ("weighting={method: gradient, step: 1}", "`step` is not a key here. Did you mean `step_size`?"),
    ("weighting.step_size=1", "`step_size` is not a key here. Known here: `method`"),
    ("weighting={method: gradient, step_size: 0}", "`weighting.step_size`: Input should be greater than 0"),
    ("weighting={method: gradient, floor: 0.6}", "`weighting.floor: 0.6` is too high for 2 rewards"),
    ("weighting={method: gradient, cap: 0.4}", "`weighting.cap: 0.4` is too low for 2 rewards"),
    ("weighting={method: gradient, gradient_scale: unit}", "`weighting.gradient_scale: unit` gives two rewards"),
    ("weighting={method: gradient, blocks: 2}", "`weighting.blocks` is for `probe: last_blocks`"),
    ("weighting.method=schedule", "`weighting.points`: Field required"),
    ("weighting={method: schedule, points: {}}", "`weighting.points` is empty"),
    ("weighting={method: schedule, points: {c: [[0, 1]]}}", "`weighting.points.c`: `c` is not under"),
    ("weighting={method: schedule, points: {a: [[0.5, 1], [0, 1]]}}", "`weighting.points.a` must be [[progress"),
    ("weighting={method: schedule, points: {a: [[0, 1], [2, 1]]}}", "`weighting.points.a` must be [[progress"),
    ("weighting={method: schedule, points: {a: []}}", "`weighting.points.a` must be [[progress"),
    (
        "weighting={method: schedule, points: {a: [[0, 1], [0.5, 0]], b: [[0.5, 0], [1, 1]]}}",
        "`weighting.points` give every reward the weight 0 at progress 0.5",
    ),
    ("weighting.method=hypervolume", "`weighting.objectives` needs 2 to 6 objectives"),
    ("weighting={method: hypervolume, objectives: {a: max}}", "and has 1"),
    ("weighting={method: hypervolume, objectives: {a: max, b: }}", "`weighting.objectives.b` has no direction"),
    ("weighting={method: hypervolume, objectives: {a: up, b: max}}", "`weighting.objectives.a` has no direction"),
    ("weighting={method: hypervolume, objectives: {a: max, c: max}}", "`weighting.objectives.c`: `c` is not under"),
    ("weighting={method: hypervolume, objectives: 3}", "`weighting.objectives`: this is a section"),
    ("weighting=gradient", "`weighting`: this is a section"),
    ("advantage.beta.cap=3", "`advantage.beta` is for `advantage.scale: beta`, not `group_std`"),
]


@pytest.mark.parametrize(("override", "message"), BAD)
def test_what_is_refused_and_how(override: str, message: str) -> None:
    assert message in refusal(TWO, override)


def test_gradient_needs_weights_that_can_be_on_the_simplex() -> None:
    gradient = "weighting.method=gradient"
    assert "`rewards.functions.b.weight` cannot be -1.0" in refusal(BOTH.format(a="", b=", weight: -1"), gradient)
    assert "only one has a weight" in refusal(BOTH.format(a="", b=", weight: 0"), gradient)
    assert "only one has a weight" in refusal("rewards.functions={a: {function: 'm:f'}}", gradient)
    logged = "rewards.functions={a: {function: 'm:f'}, b: {function: 'm:f'}, c: {function: 'm:f', weight: 0}}"
    assert small(logged, "weighting={method: gradient, floor: 0.5}")


def test_objectives_need_ranges() -> None:
    functions = "rewards.functions={a: {function: 'm:f', range: [0, 1]}, b: {function: 'm:f'}}"
    weighting = "weighting={method: hypervolume, objectives: {a: max, b: max}}"
    assert "give `rewards.functions.b.range`" in refusal(functions, weighting)
    assert small(functions, "weighting={method: hypervolume, objectives: {a: max, tokens: min}}")


def test_scaled_rewards_would_leave_their_range() -> None:
    weighting = "weighting={method: hypervolume, objectives: {a: max, b: max}, apply: rewards}"
    beta = "advantage={scale: beta, order: normalize_then_sum}"
    assert "`weighting.apply: rewards` takes rewards out of the ranges" in refusal(TWO, weighting, beta)
    assert small(TWO, weighting)


def test_settings_of_beta() -> None:
    recipe = small(TWO, "advantage={scale: beta, order: normalize_then_sum}")
    assert recipe.advantage.beta is not None and recipe.advantage.beta.resolved_smoothing == 0.0
    other = small(TWO, "advantage={scale: beta, order: normalize_then_sum, beta: {estimator: beta_binomial}}")
    assert other.advantage.beta is not None and other.advantage.beta.resolved_smoothing == 0.9
    assert again(recipe) == recipe and again(other) == other
    assert "`advantage.beta`: `ema` is not a key here" in refusal(
        TWO, "advantage={scale: beta, order: normalize_then_sum, beta: {ema: 1}}"
    )
