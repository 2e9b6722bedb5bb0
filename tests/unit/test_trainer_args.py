"""The recipe's `trainer:` section and TRL's GRPOConfig: what is refused, and what arrives."""

import dataclasses
import os
import typing

import pytest
import torch
from trl import GRPOConfig

from rlbal.errors import RecipeError, RunError
from rlbal.model import lora_config
from rlbal.recipe import parse_yaml
from rlbal.trainer_args import bind_trainer, check_engine, missing_package, training_args
from rlbal.trainer_section import (
    BELOW_ONE,
    CHOICES,
    NOT_NEGATIVE,
    OWNED,
    POSITIVE,
    trainer_model,
    validate_trainer,
)
from tests.small_recipe import small


def refusal(*overrides):
    with pytest.raises(RecipeError) as caught:
        bind_trainer(small(*overrides))
    return str(caught.value)


# Keys and types


def test_an_unknown_key_names_the_nearest():
    assert refusal("trainer.learning_rat=1e-5") == (
        "`trainer.learning_rat` is not a field of TRL's GRPOConfig. Did you mean `learning_rate`?"
    )


@pytest.mark.parametrize("key", OWNED)
def test_a_key_that_another_section_decides_names_its_place(key):
    assert refusal(f"trainer.{key}=1") == (
        f"`trainer.{key}` is not set here\nFix: its place in the recipe: {OWNED[key]}"
    )


def test_owned_and_known_keys_are_trl_fields():
    fields = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    assert OWNED.keys() | CHOICES.keys() | POSITIVE | NOT_NEGATIVE | BELOW_ONE <= fields
    assert trainer_model().model_fields.keys() == fields - OWNED.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=abc", "`trainer.learning_rate`: Input should be a valid number, unable to parse string as a"),
        ("max_completion_length=", "`trainer.max_completion_length` needs a number of tokens"),
        ("learning_rate=", "`trainer.learning_rate`: Input should be a valid number (got None)"),
        ("learning_rate=.nan", "`trainer.learning_rate`: Input should be a finite number (got nan)"),
        ("max_steps=1.5", "`trainer.max_steps`: Input should be a valid integer, got a number with a fractional part"),
        ("bf16=perhaps", "`trainer.bf16`: Input should be a valid boolean, unable to interpret input (got 'perhaps')"),
        ("loss_type=dapoo", "`trainer.loss_type`: Input should be 'grpo', 'bnpo', 'dr_grpo', 'dapo', 'luspo', 'cispo'"),
        ("vllm_mode=srv", "`trainer.vllm_mode`: Input should be 'colocate' or 'server' (got 'srv')"),
        *(
            (f"{key}={bad}", f"`trainer.{key}`: Input should be greater than 0 (got {bad})")
            for key in sorted(POSITIVE)
            for bad in (0, -8)
        ),
        *(
            (f"{key}=-1", f"`trainer.{key}`: Input should be greater than or equal to 0 (got -1)")
            for key in sorted(NOT_NEGATIVE | BELOW_ONE)
        ),
        *((f"{key}=1", f"`trainer.{key}`: Input should be less than 1 (got 1)") for key in sorted(BELOW_ONE)),
        ("chat_template_kwargs=thinking", "`trainer.chat_template_kwargs`: 'thinking' is not a mapping"),
        ("save_strategy=best", "`trainer.save_strategy: best` needs evaluations"),
    ],
)
def test_a_wrong_value_names_its_key(override, message):
    assert refusal(f"trainer.{override}").startswith(message)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("optim=adamm", "adamm is not a valid OptimizerNames"),
        ("lr_scheduler_type=linaer", "linaer is not a valid SchedulerType"),
        ("warmup_steps=-1", "Got warmup_steps = -1.0"),
        ("accelerator_config=missing.json", "[Errno 2] No such file or directory: 'missing.json'"),
        ("auto_find_batch_size=true", "auto_find_batch_size is not supported by GRPO"),
        ("report_to=wanddb", "wanddb is not supported, only"),
    ],
)
def test_what_trl_refuses_comes_without_its_traceback(override, why):
    assert refusal(f"trainer.{override}").startswith(f"TRL refuses the `trainer:` section\nWhy: {why}")


def test_values_arrive_with_trls_types():
    values = validate_trainer({"learning_rate": "1e-5", "max_steps": 1e3, "bf16": "no", "report_to": ["tensorboard"]})
    assert values == {"learning_rate": 1e-5, "max_steps": 1000, "bf16": False, "report_to": ["tensorboard"]}
    assert type(values["max_steps"]) is int
    args, _ = bind_trainer(small("trainer.learning_rate=1e-5"))
    assert args.learning_rate == 1e-5


def test_unset_fields_keep_trls_defaults():
    args, _ = bind_trainer(small())
    theirs = GRPOConfig(output_dir="x", use_cpu=True)
    for key in (
        "learning_rate",
        "beta",
        "loss_type",
        "epsilon",
        "max_completion_length",
        "temperature",
        "num_iterations",
    ):
        assert getattr(args, key) == getattr(theirs, key)


def test_other_sections_arrive_in_trls_fields():
    args, _ = bind_trainer(
        small(
            "output_dir=runs/x",
            "seed=7",
            "advantage.scale=batch_std",
            "advantage.order=normalize_then_sum",
            "rewards.functions.short={function: 'a:b', weight: 0.25}",
            "evaluation.every=5",
            "evaluation.best_metric=reward/short",
        )
    )
    assert (args.output_dir, args.seed, args.num_generations) == ("runs/x", 7, 8)
    assert (args.scale_rewards, args.multi_objective_aggregation) == ("batch", "normalize_then_sum")
    assert args.reward_weights == [1.0, 0.25]
    assert (args.eval_strategy, args.eval_steps, args.metric_for_best_model) == ("steps", 5, "eval_reward/short")
    assert args.greater_is_better and args.logging_steps == 1 and args.report_to == []


# Batches


def test_sizes_bind_against_the_recipes_processes_not_those_here():
    """8 processes x 1 row make one group of 8; this one process with its one row could not hold a group."""
    recipe = small("launch.num_processes=8", "trainer.per_device_train_batch_size=1")
    args, plan = bind_trainer(recipe)
    assert (plan.num_processes, plan.per_device, plan.rollouts, plan.prompts) == (8, 1, 8, 1)
    assert args.generation_batch_size == 8
    with pytest.raises(RecipeError, match="a generation batch of 1 rollouts does not divide into groups of 8"):
        training_args(recipe, 1)


def test_live_sizes_are_those_of_the_live_processes():
    args, plan = training_args(small("launch.num_processes=8", "trainer.per_device_train_batch_size=16"), 1)
    assert plan.rollouts == args.generation_batch_size == 16
    assert args.per_device_train_batch_size == 16


@pytest.mark.parametrize(
    ("overrides", "steps", "rollouts", "prompts"),
    [
        ([], 1, 8, 1),  # TRL's 8 rows per device
        (["trainer.gradient_accumulation_steps=4"], 4, 32, 4),
        (["trainer.gradient_accumulation_steps=4", "trainer.steps_per_generation=8"], 8, 64, 8),
        (["trainer.generation_batch_size=64", "launch.num_processes=2"], 4, 64, 8),
        (["algorithm.name=reinforce", "algorithm.rollouts_per_prompt=1"], 1, 8, 8),
    ],
)
def test_batch_arithmetic(overrides, steps, rollouts, prompts):
    args, plan = bind_trainer(small(*overrides))
    assert (plan.steps_per_generation, plan.rollouts, plan.prompts) == (steps, rollouts, prompts)
    assert (args.steps_per_generation, args.generation_batch_size) == (steps, rollouts)


def test_the_arithmetic_is_spelled_out():
    overrides = ["launch.num_processes=2", "trainer.gradient_accumulation_steps=3", "trainer.steps_per_generation=6"]
    _, plan = bind_trainer(small(*overrides))
    assert plan.explain() == (
        "2 processes x 8 rows per device x 6 steps per generation = 96 rollouts = 12 prompts x 8 rollouts; "
        "optimizer step every 3 micro-batches of 16 rows"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.per_device_train_batch_size=6", "launch.num_processes=2"],
            "a generation batch of 12 rollouts does not divide into groups of 8 (`algorithm.rollouts_per_prompt`)\n"
            "Why: 2 processes x 6 rows per device x 1 steps per generation = 12 (`launch.num_processes`, "
            "`trainer.per_device_train_batch_size`, `trainer.steps_per_generation` or "
            "`trainer.gradient_accumulation_steps`)\n"
            "Fix: make that product a multiple of 8",
        ),
        (
            ["trainer.generation_batch_size=32", "trainer.steps_per_generation=4"],
            "`trainer.generation_batch_size` and `trainer.steps_per_generation` say the same thing twice\n"
            "Fix: keep one of them",
        ),
        (
            ["trainer.generation_batch_size=24", "launch.num_processes=2"],
            "`trainer.generation_batch_size` (24) does not divide into micro-batches of 8 rows x 2 processes = 16\n"
            "Fix: make it a multiple of 16",
        ),
        (
            ["algorithm.name=reinforce", "algorithm.rollouts_per_prompt=1", "trainer.per_device_train_batch_size=1"],
            "a generation batch of 1 rollout cannot be compared with anything\n"
            "Fix: raise `trainer.per_device_train_batch_size` or `trainer.gradient_accumulation_steps`",
        ),
    ],
)
def test_sizes_that_do_not_work_out(overrides, message):
    assert refusal(*overrides) == message


# Generation engines


def test_the_vllm_server_needs_equal_groups():
    server = ["trainer.use_vllm=true", "trainer.vllm_mode=server"]
    alone = ["algorithm.name=reinforce", "algorithm.rollouts_per_prompt=1"]
    assert refusal(*server, *alone) == (
        "`trainer.vllm_mode: server` needs equal groups of at least 2 rollouts\n"
        "Why: TRL sends every num_generations-th prompt to the server and asks for that many completions of each\n"
        "Fix: use `trainer.vllm_mode: colocate`, or `allocation.method: uniform` with `algorithm.rollouts_per_prompt` "
        "above 1"
    )
    bind_trainer(small(*server))
    bind_trainer(small("trainer.use_vllm=true", "trainer.vllm_mode=colocate", *alone))


def test_one_engine_at_a_time():
    assert refusal("trainer.use_vllm=true", "trainer.use_transformers_continuous_batching=true") == (
        "`trainer.use_vllm` and `trainer.use_transformers_continuous_batching` are two engines for one job\n"
        "Fix: keep one of them"
    )


def test_vespo_on_vllm_needs_a_correction_by_token():
    """TRL's trainer refuses TRL's own default here, long after the recipe was read."""
    vespo = ["trainer.use_vllm=true", "trainer.loss_type=vespo"]
    assert refusal(*vespo) == (
        "`trainer.loss_type: vespo` corrects for vLLM token by token, but `trainer.vllm_importance_sampling_mode` is "
        "`sequence_mask`\nFix: set it to `token_truncate` or `token_mask`"
    )
    bind_trainer(small(*vespo, "trainer.vllm_importance_sampling_mode=token_mask"))
    bind_trainer(small("trainer.loss_type=vespo"))


@pytest.mark.parametrize("key", CHOICES)
def test_choices_are_the_ones_trl_documents(key):
    """`CHOICES` repeats what TRL only writes in a help text (or a Literal): every choice must appear there."""
    (field,) = [field for field in dataclasses.fields(GRPOConfig) if field.name == key]
    text = str(field.metadata.get("help")) + str(typing.get_type_hints(GRPOConfig)[key])
    assert all(choice in text for choice in CHOICES[key])


def test_a_bare_no_is_the_strategy_of_that_name():
    assert validate_trainer(parse_yaml("save_strategy: no")) == {"save_strategy": "no"}


# What the recipe needs beside TRL


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora={rank: 8}", "`lora.rank` is not a field of peft's LoraConfig."),
        ("lora={inference_mode: true}", "`lora.inference_mode` is not a field of peft's LoraConfig."),
        (
            "lora={r: eight}",
            "`lora.r`: Input should be a valid integer, unable to parse string as an integer (got 'eight",
        ),
        ("lora={r: 0}", "`lora.r`: Input should be greater than 0 (got 0)"),
        ("lora={bias: some}", "`lora.bias`: Input should be 'none', 'all' or 'lora_only' (got 'some')"),
        ("lora={task_type: SEQ_CLS}", "`lora.task_type` must be CAUSAL_LM"),
        ("launch.accelerate=zero33", "no accelerate configuration `zero33`. Did you mean `zero3`?"),
    ],
)
def test_adapters_and_launch_are_checked_with_the_recipe(override, message):
    assert refusal(override).startswith(message)


@pytest.mark.parametrize("lora", ["{}", "{r: 4, init_lora_weights: pissa}", "{target_modules: all-linear}"])
def test_adapters_that_peft_takes_are_taken(lora):
    recipe = small(f"lora={lora}")
    bind_trainer(recipe)
    taken = lora_config(recipe)
    assert {key: getattr(taken, key) for key in recipe.lora} == recipe.lora


def test_max_steps_of_0_is_refused():
    assert refusal("trainer.max_steps=0").startswith("`trainer.max_steps: 0` would train nothing")


def test_arguments_of_the_schedule_are_looked_at():
    cosine = ("trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.lr_scheduler_kwargs={min_lr_rate: 0.1}")
    assert bind_trainer(small(*cosine))[0].lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert "unexpected keyword argument 'x'" in refusal("trainer.lr_scheduler_kwargs={x: 1}")


@pytest.mark.parametrize(
    ("override", "message"),
    [("use_vllm=true", "`trainer.use_vllm` needs vLLM"), ("report_to=wandb", "`trainer.report_to: wandb` needs a")],
)
def test_a_missing_package_stops_training_but_not_the_reading_of_a_recipe(override, message, monkeypatch):
    monkeypatch.setattr("rlbal.trainer_args.find_spec", lambda name: None)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    args, _ = bind_trainer(small(f"trainer.{override}"))
    assert str(missing_package(args)).startswith(message)
    with pytest.raises(RecipeError, match="needs"):
        training_args(small(f"trainer.{override}"), 1)


def test_nothing_is_missing_for_a_plain_recipe():
    args, _ = bind_trainer(small("trainer.report_to=none"))
    assert missing_package(args) is None


# Without an accelerator


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without accelerator")
@pytest.mark.parametrize(("override", "precision"), [("seed=0", "no"), ("trainer.bf16=true", "bf16")])
def test_a_cpu_works_in_float32_whatever_the_launch_configuration_says(override, precision, monkeypatch):
    """As under accelerate_configs/zero2.yaml, which says bf16, unless the recipe says so too."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args, _ = training_args(small(override), 1)
    assert args.use_cpu and args.bf16 == (precision == "bf16")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == precision


def test_fsdp_that_has_become_ddp_is_refused(monkeypatch):
    check_engine("MULTI_CPU")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_engine("MULTI_GPU")
    with pytest.raises(RunError) as caught:
        check_engine("MULTI_CPU")
    assert str(caught.value) == (
        "FSDP needs GPUs, and there are none\n"
        "Why: on CPUs accelerate takes DDP in its place, and says nothing\n"
        "Fix: launch with zero2, zero3 or cpu_2proc of accelerate_configs/"
    )
