"""Evaluation through TRL's vLLM engine: its settings are swapped in and put back. The engine itself is a stand-in."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from trl.generation.vllm_generation import VLLMGeneration

from rlbal.tiny import build_tokenizer
from rlbal.trainers.evaluator import PolicyEvaluator
from rlbal.trainers.rollout import generation_limit
from tests.support import make_recipe

SWAPPED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length", "generation_kwargs")


class Engine:
    """Answers every prompt with its own tokens and the end token, and notes the settings it was called with."""

    def __init__(self, end: int) -> None:
        self.end, self.synced, self.seen = end, 0, {}
        self.training = dict.fromkeys(SWAPPED, "as in training")
        vars(self).update(self.training)

    def sync_weights(self) -> None:
        self.synced += 1

    def generate(self, prompts: list[list[int]], images: None, num_generations: int) -> tuple[Any, ...]:
        self.seen = {name: getattr(self, name) for name in SWAPPED}
        return prompts, [[*ids[:3], self.end] for ids in prompts[:-1]] + [prompts[-1][:3]], None, None


def evaluator_with(engine: Engine, tokenizer: Any, tmp_path: Any) -> PolicyEvaluator:
    recipe = make_recipe(tmp_path, evaluation={"samples_per_prompt": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5})
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=tokenizer.eos_token_id))
    trainer: Any = SimpleNamespace(
        recipe=recipe,
        args=SimpleNamespace(max_completion_length=16, chat_template_kwargs=None),
        tokenizer=tokenizer,
        vllm_generation=engine,
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda given: given),
    )
    return PolicyEvaluator(trainer, SimpleNamespace())  # type: ignore[arg-type]


def test_settings_are_evaluations_own_and_are_put_back(tmp_path: Any) -> None:
    tokenizer = build_tokenizer([])
    engine = Engine(tokenizer.eos_token_id)
    evaluator = evaluator_with(engine, tokenizer, tmp_path)

    samples = evaluator._vllm_samples(["one", "three"], [0, 1], greedy=False, limit=12)
    assert engine.seen == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": None,
        "repetition_penalty": 1.0,
        "max_completion_length": 12,
        "generation_kwargs": {},
    }
    assert [[sample.text for sample in row] for row in samples] == [["one", "one"], ["thr", "thr"]]
    assert [[sample.truncated for sample in row] for row in samples] == [[False, False], [False, True]]
    assert engine.synced == 1

    (first, _) = evaluator._vllm_samples(["one", "three"], [0, 1], greedy=True, limit=16)
    assert engine.seen["temperature"] == 0.0 and len(first) == 1
    assert engine.seen["max_completion_length"] == 16
    assert {name: getattr(engine, name) for name in SWAPPED} == engine.training


def test_trls_engine_reads_these_settings_when_it_generates() -> None:
    source = inspect.getsource(VLLMGeneration.generate)
    assert not [name for name in SWAPPED if f"self.{name}" not in source]
    assert list(inspect.signature(VLLMGeneration.generate).parameters)[:4] == [
        "self",
        "prompts",
        "images",
        "num_generations",
    ]


@pytest.mark.parametrize(("cap", "seen"), [(12, 12), (99, 64)])
def test_the_cap_of_a_budget_is_the_engine_s_for_one_generation(cap: int, seen: int) -> None:
    """The engine reads it at every call (see above); TRL's own limit, which the `dr_grpo` loss divides by, stays."""
    engine = SimpleNamespace(max_completion_length=64)
    trainer: Any = SimpleNamespace(use_vllm=True, vllm_generation=engine, max_completion_length=64)
    with pytest.raises(RuntimeError), generation_limit(trainer, cap):
        assert (engine.max_completion_length, trainer.max_completion_length) == (seen, 64)
        raise RuntimeError
    assert engine.max_completion_length == 64
