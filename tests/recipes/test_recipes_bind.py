"""Every shipped recipe is one that a person can launch: it binds here, without the GPUs or the data it asks for."""

import importlib
import itertools
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from peft import LoraConfig

from rlbal.prompts.templates import parse_template
from rlbal.recipe import parse_recipe, read_recipe
from rlbal.recipe_file import parse_yaml
from rlbal.trainer_args import bind_trainer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("**/*.yaml"))

every_recipe = pytest.mark.parametrize("name", RECIPES)


def header(name: str) -> str:
    """The comment lines before the first key, without their `#`, continued lines joined."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    comments = itertools.takewhile(lambda line: line.startswith("#") or not line, lines)
    return re.sub(r"\\\s*\n\s*", "", "\n".join(line.lstrip("#") for line in comments))


def test_the_promised_recipes_are_there():
    assert {
        "recipes/qwen2.5-1.5b/grpo_gsm8k.yaml",
        "recipes/qwen2.5-1.5b/grpo_gsm8k_lora.yaml",
        "recipes/qwen2.5-1.5b/ppo_gsm8k.yaml",
        "recipes/tiny/ppo.yaml",
        "recipes/qwen2.5-7b/grpo_gsm8k_qlora.yaml",
        "recipes/qwen2.5-7b/grpo_math.yaml",
        "recipes/qwen2.5-7b/grpo_math_2nodes.yaml",
        "recipes/qwen2.5-7b/length_budget_gsm8k.yaml",
        "recipes/qwen2.5-7b/length_budget_math500.yaml",
        "recipes/qwen2.5-math-7b/beta_math.yaml",
        "recipes/qwen2.5-math-7b/knapsack_dapo.yaml",
        "recipes/qwen3-8b/gradient_weights_math500.yaml",
        "recipes/qwen3-8b/hypervolume_math500.yaml",
    } <= set(RECIPES)


@every_recipe
def test_binds_without_its_gpus(name):
    recipe = read_recipe(ROOT / name)
    args, plan = bind_trainer(recipe)
    group_size = recipe.algorithm.rollouts_per_prompt
    assert plan.num_processes == recipe.launch.num_processes
    assert args.generation_batch_size == plan.rollouts == plan.prompts * group_size
    # A generation that is not a whole number of optimizer steps would carry rollouts over into the next one.
    assert plan.steps_per_generation % plan.accumulation == 0


@every_recipe
def test_resolved_recipe_reads_back_equal(name):
    recipe = read_recipe(ROOT / name)
    assert parse_recipe(parse_yaml(recipe.dump())) == recipe


@every_recipe
def test_names_what_exists(name):
    recipe = read_recipe(ROOT / name)
    for spec in recipe.rewards.functions.values():
        module, _, function = spec.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    parse_template(recipe.data.prompt, "data.prompt")
    parse_template(recipe.data.system or "", "data.system")
    if recipe.lora is not None:
        LoraConfig(**recipe.lora)


@every_recipe
def test_header_says_where_it_comes_from_and_how_to_launch_it(name):
    text = header(name)
    assert re.search(r"^\s*Source: .{20}", text, re.MULTILINE)
    assert re.search(r"^\s*Hardware: .{5}", text, re.MULTILINE)
    launched = re.findall(r"^\s*(?:rlbal train|accelerate launch .*-m rlbal\.train) (\S+)", text, re.MULTILINE)
    assert launched and set(launched) == {name}
    for script in re.findall(r"^\s*sbatch (\S+)", text, re.MULTILINE):
        assert name in (ROOT / script).read_text(encoding="utf-8")


@every_recipe
def test_header_and_launch_section_name_the_same_processes(name):
    launch = read_recipe(ROOT / name).launch
    configs = re.findall(r"--config_file (\S+)", header(name))
    if launch.accelerate is None:
        assert not configs and launch.num_processes == 1
    else:
        assert configs == [f"accelerate_configs/{launch.accelerate}.yaml"]
        assert load_config_from_file(str(ROOT / configs[0])).num_processes == launch.num_processes


def test_the_quickstart_takes_allocation_and_a_budget_by_override():
    recipe = read_recipe(ROOT / "recipes/quickstart.yaml", ["allocation.method=knapsack", "budget.schedule=linear"])
    args, plan = bind_trainer(recipe)
    assert args.num_generations == plan.rollouts  # TRL must not cut the batch into equal groups
    assert recipe.advantage.aggregation == "prompt"
