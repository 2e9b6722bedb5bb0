"""What the `budget` section may say, and the message for what it may not."""

import re

import datasets
import pytest

from rlbal.budget_checks import check_positions, has_budget_field
from rlbal.errors import DataError, RecipeError
from rlbal.prompts.sources import Source
from rlbal.prompts.templates import render_prompts
from rlbal.recipe import FileData, Recipe, parse_recipe, parse_yaml
from rlbal.trainer_args import bind_trainer
from tests.small_recipe import small

TOLD = "data.prompt='{question} Use at most {token_budget} tokens.'"
LIMIT, STEPS = "trainer.max_completion_length=512", "trainer.max_steps=600"


def refusal(*overrides: str) -> str:
    """The message of a recipe that cannot be read."""
    with pytest.raises(RecipeError) as caught:
        small(*overrides)
    return str(caught.value)


def bound(*overrides: str) -> Recipe:
    recipe = small(TOLD, LIMIT, STEPS, "model.tiny.max_positions=2048", *overrides)
    bind_trainer(recipe)
    return recipe


def refusal_when_bound(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        bound(*overrides)
    return str(caught.value)


GOOD = [
    "budget={}",
    "budget={schedule: constant, tokens: 87}",
    "budget={schedule: exponential, start: 256, end: 87, decays: 7}",
    "budget={schedule: exponential, start: 256, gamma: 0.7, interval: 150, cap: false}",
    "budget.schedule=exponential",
    "budget.schedule=linear",
    "budget={schedule: linear, end: 100, scope: prompt, prompt_scale: [0.6, 1.0]}",
    "budget.schedule=adaptive",
    "budget={schedule: adaptive, start: 256, end: 87, levels: 4, window: 20, tolerance: 0.05}",
]


@pytest.mark.parametrize("override", GOOD)
def test_a_resolved_recipe_reads_back_equal(override: str) -> None:
    recipe = bound(override)
    assert parse_recipe(parse_yaml(recipe.dump())) == recipe


BAD = [
    ("budget.schedule=expo", "`budget.schedule`: 'expo' is no schedule of budget. Did you mean `exponential`?"),
    ("budget=linear", "`budget`: this is a section: give it keys of its own"),
    ("budget.start=256", "`budget`: `start` is not a key here. Known here: `schedule`"),
    ("budget={schedule: linear, gamma: 0.7}", "`budget`: `gamma` is not a key here."),
    ("budget.schedule=constant", "`budget.tokens`: Field required"),
    ("budget={schedule: constant, tokens: 0}", "`budget.tokens`: Input should be greater than or equal to 1"),
    ("budget={schedule: constant, tokens: 8.5}", "`budget.tokens`: Input should be a valid integer"),
    ("budget={schedule: linear, start: 87, end: 256}", "`budget.end` (256) must be below `budget.start` (87)"),
    ("budget={schedule: adaptive, start: 87, end: 87}", "swap them, or use `budget.schedule: constant`"),
    ("budget={schedule: linear, decays: 0}", "`budget.decays`: Input should be greater than or equal to 1"),
    ("budget={schedule: exponential, gamma: 1.0, interval: 9}", "`budget.gamma: 1.0` must lie between 0 and 1"),
    ("budget={schedule: exponential, gamma: 0, interval: 9}", "`budget.gamma: 0.0` must lie between 0 and 1"),
    ("budget={schedule: exponential, gamma: 0.7}", "`budget.interval` is missing: `gamma` and `interval` go together"),
    ("budget={schedule: exponential, interval: 9}", "`budget.gamma` is missing: `gamma` and `interval` go together"),
    ("budget={schedule: exponential, gamma: 0.7, interval: 9, end: 87}", "say the same; keep one pair"),
    ("budget={schedule: exponential, gamma: 0.7, interval: 9, decays: 3}", "say the same; keep one pair"),
    ("budget={schedule: adaptive, tolerance: 0}", "`budget.tolerance`: Input should be greater than 0"),
    ("budget={schedule: adaptive, window: 0}", "`budget.window`: Input should be greater than or equal to 1"),
    ("budget={schedule: adaptive, levels: 1}", "`budget.levels`: Input should be greater than or equal to 2"),
    ("budget={schedule: linear, scope: row}", "`budget.scope`: Input should be 'batch' or 'prompt' (got 'row')"),
    ("budget={schedule: linear, scope: prompt, prompt_scale: [1, 0.5]}", "with 0 < easy < hard, not [1.0, 0.5]"),
    ("budget={schedule: linear, scope: prompt, prompt_scale: [0, 1]}", "with 0 < easy < hard, not [0.0, 1.0]"),
    ("budget={schedule: linear, prompt_scale: [0.6, 1]}", "`budget.prompt_scale` is for `budget.scope: prompt`"),
]


@pytest.mark.parametrize(("override", "message"), BAD)
def test_what_is_refused_and_how(override: str, message: str) -> None:
    assert message in refusal(TOLD, override)


# The policy must be told


def test_a_budget_that_no_prompt_mentions() -> None:
    message = refusal("budget.schedule=linear")
    assert "`budget.schedule: linear` sets a token budget that no prompt mentions" in message
    assert '`data.prompt: "{question} Use at most {token_budget} tokens."`' in message
    assert "that no prompt mentions" in refusal(
        "data.prompt='{question} {{token_budget}}'", "budget={schedule: constant, tokens: 9}"
    )
    assert small("data.system='At most {token_budget} tokens.'", "budget.schedule=linear")
    assert small(TOLD)  # one recipe, with and without a budget


def test_a_broken_template_is_left_to_its_own_message() -> None:
    assert small("data.prompt='{question'", "budget.schedule=linear")


def test_a_row_may_not_hold_the_field_where_a_template_does() -> None:
    def render(question: str, prompt: str = "{question} {token_budget}", system: str | None = None) -> list[object]:
        source = Source(datasets.Dataset.from_list([{"question": question}]), "rows", lambda index: f"row {index + 1}")
        return list(render_prompts(source, FileData(source="file", path="rows", prompt=prompt, system=system)))

    assert render("1+1?") == ["1+1? {token_budget}"]
    own = re.escape("row 1: the prompt holds `{token_budget}` more often than the templates do")
    with pytest.raises(DataError, match=own):
        render("What is {token_budget}?")
    with pytest.raises(DataError, match=own):
        render("What is {token_budget}?", "{question}", "In {token_budget} tokens.")
    with pytest.raises(DataError, match=own):  # the row's text and the template's braces together
        render("token_budget", "{{{question}}} {token_budget}")
    assert render("What is {token_budget}?", "{question}") == ["What is {token_budget}?"]


def test_fields_are_found_as_templates_are_read() -> None:
    def has(prompt: str) -> bool:
        return has_budget_field(FileData(source="file", path="rows", prompt=prompt))

    assert has("{token_budget}") and has("{{{token_budget}}}")
    assert not has("{{token_budget}}") and not has("token_budget") and not has("{token_budgets}")


# Sizes, once TRL's defaults are known


def test_a_budget_above_the_models_positions() -> None:
    message = refusal_when_bound("model.tiny.max_positions=128", "budget={schedule: constant, tokens: 200}")
    assert "`budget.tokens` (200) leaves no room for a prompt in the model's 128 positions" in message
    assert "raise `model.tiny.max_positions`" in message
    assert "`budget.start` (128)" in refusal_when_bound(
        "model.tiny.max_positions=128", "budget={schedule: linear, start: 128}"
    )
    # The longest completion is the default of `start`.
    assert "`budget.start` (512)" in refusal_when_bound("model.tiny.max_positions=512", "budget.schedule=adaptive")


def test_a_budget_above_the_positions_of_a_model_that_is_loaded() -> None:
    recipe = bound("budget={schedule: constant, tokens: 200}")
    check_positions(recipe.budget, 512, 513)
    with pytest.raises(
        RecipeError, match=r"`budget.tokens` \(200\) leaves no room for a prompt .* 200 positions"
    ) as error:
        check_positions(recipe.budget, 512, 200)
    assert error.value.fix == "lower it, and `trainer.max_completion_length` with it"
    with pytest.raises(RecipeError, match=r"`budget.start` \(512\) leaves no room"):
        check_positions(bound("budget.schedule=adaptive").budget, 512, 512)
    # The budget would fit, the longest completion does not.
    for section in (recipe.budget, bound().budget):
        with pytest.raises(RecipeError, match=r"`trainer.max_completion_length` \(512\) leaves no room"):
            check_positions(section, 512, 512)


def test_a_budget_above_the_longest_completion() -> None:
    message = refusal_when_bound("budget={schedule: exponential, start: 513, gamma: 0.5, interval: 9}")
    assert "`budget.start` (513) is more than `trainer.max_completion_length` (512) allows" in message
    assert "lower the budget, or raise the limit" in message
    assert bound("budget={schedule: constant, tokens: 512}")
    # TRL's own default is 512.
    with pytest.raises(RecipeError, match=r"`budget.tokens` \(513\) is more than .* \(512\) allows"):
        bind_trainer(small(TOLD, "budget={schedule: constant, tokens: 513}"))


def test_a_budget_that_hard_prompts_raise_above_the_longest_completion() -> None:
    section = "budget={schedule: constant, tokens: 400, scope: prompt, prompt_scale: [0.5, %s]}"
    message = refusal_when_bound(section % 1.5)
    assert "`budget.tokens` x `budget.prompt_scale` (600) is more than `trainer.max_completion_length`" in message
    assert bound(section % 1.25)


def test_defaults_that_leave_nothing_to_tighten() -> None:
    # `start` is the longest completion, 512; `end` a third of `start`, at least 1.
    message = refusal_when_bound("budget={schedule: linear, end: 512}")
    assert "`budget.end` (512) must be below `budget.start` (512)" in message
    assert "`budget.end` (1) must be below `budget.start` (1)" in refusal_when_bound(
        "budget={schedule: adaptive, start: 1}"
    )


def test_drops_spread_over_the_run_need_its_length() -> None:
    message = refusal_when_bound("trainer.max_steps=-1", "budget.schedule=linear")
    assert "`budget.schedule: linear` spreads its drops over the run, and `trainer.max_steps` is not set" in message
    assert "gamma" not in message
    message = refusal_when_bound("trainer.max_steps=-1", "budget.schedule=exponential")
    assert "or give `budget.gamma` and `budget.interval`" in message
    for section in ("schedule: exponential, gamma: 0.7, interval: 9", "schedule: adaptive"):
        assert bound("trainer.max_steps=-1", f"budget={{{section}}}")


def test_more_drops_than_steps() -> None:
    message = refusal_when_bound("trainer.max_steps=7", "budget={schedule: linear, decays: 7}")
    assert "`budget.decays` (7) needs more optimizer steps than `trainer.max_steps` (7)" in message
    assert "Fix: at most 6" in message
    assert bound("trainer.max_steps=8", "budget={schedule: linear, decays: 7}")
    assert "`budget.decays` (3) needs more" in refusal_when_bound("trainer.max_steps=1", "budget.schedule=exponential")


def test_a_cap_whose_rows_would_leave_the_loss() -> None:
    section = "budget={schedule: constant, tokens: 9%s}"
    message = refusal_when_bound("trainer.mask_truncated_completions=true", section % "")
    assert "set `budget.cap: false`" in message
    assert bound("trainer.mask_truncated_completions=true", section % ", cap: false")


def test_rounding_of_a_raised_budget_is_that_of_training() -> None:
    """7 x 1.5 = 10.5 is told as 11."""
    section = "budget={schedule: constant, tokens: 7, scope: prompt, prompt_scale: [0.5, 1.5]}"
    assert "(11) is more than" in refusal_when_bound("trainer.max_completion_length=10", section)
    assert bound("trainer.max_completion_length=11", section)
