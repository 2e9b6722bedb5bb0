"""Models and options that our decoding leaves to transformers, and that evaluation samples alike from them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import rlbal.sampling
from rlbal.decodable import unsupported
from rlbal.recipe import EvaluationSection
from rlbal.sampling import generate_samples
from rlbal.tiny import build_tokenizer
from tests.decoders import COMMON, V, qwen


def linear_attention() -> Any:
    torch.manual_seed(0)
    extra = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    return Qwen3NextForCausalLM(Qwen3NextConfig(**{**COMMON, **extra})).eval()


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()


def encoder_decoder() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(linear_attention, "keys and values"), (mamba, "keys and values"), (encoder_decoder, "cache of its own")],
)
def test_models_that_are_left_to_transformers(make: Callable[[], Any], reason: str) -> None:
    assert reason in str(unsupported(make(), {}))


def test_options_that_are_left_to_transformers() -> None:
    assert unsupported(qwen(), {"top_h": 0.5, "typical_p": 0.9, "min_new_tokens": 3}) is None
    reason = unsupported(qwen(), {"num_beams": 4, "top_p": 0.9, "constraints": []})
    assert reason == "`trainer.generation_kwargs` asks for constraints, num_beams"
    for option in (
        "guidance_scale",
        "prompt_lookup_num_tokens",
        "penalty_alpha",
        "use_cache",
        "stop_strings",
        "watermarking_config",
    ):
        assert option in str(unsupported(qwen(), {option: None}))


def test_options_of_the_model_itself_count_too() -> None:
    """`generate` fills what is not given from the model's generation config."""
    model = qwen()
    model.generation_config.update(temperature=0.7, top_k=20, repetition_penalty=1.05, pad_token_id=0, min_length=2)
    assert unsupported(model, {}) is None
    for option, value in {"num_beams": 2, "guidance_scale": 1.5, "cache_implementation": "static"}.items():
        model = qwen()
        model.generation_config.update(**{option: value})
        assert unsupported(model, {}) == f"the model's generation config asks for {option}"


@pytest.mark.parametrize("greedy", [False, True])
def test_evaluation_gives_the_same_samples_either_way(greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer([])
    model = qwen(5, vocab_size=len(tokenizer), eos_token_id=None)
    model.generation_config.eos_token_id = list(range(0, 80))
    section = EvaluationSection(samples_per_prompt=3, temperature=0.8, top_k=100, top_p=0.9, batch_size=5)
    prompts, options = ["1+2=", "a much longer prompt", "7", "7"], {"max_new_tokens": 10, "seed": 1, "greedy": greedy}
    calls: list[str] = []
    for name in ("decode", "_decode_all_rows"):
        real = getattr(rlbal.sampling, name)
        record = lambda *args, _real=real, _name=name, **kwargs: (calls.append(_name), _real(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(rlbal.sampling, name, record)
    ours = generate_samples(model, tokenizer, prompts, section, **options)
    monkeypatch.setattr(rlbal.sampling, "unsupported", lambda model, options: "for this test")
    theirs = generate_samples(model, tokenizer, prompts, section, **options)
    assert set(calls) == {"decode", "_decode_all_rows"} and calls == sorted(calls, reverse=True)
    assert ours == theirs
    assert len({len(sample.ids) for row in ours for sample in row}) >= 2


def test_evaluation_of_a_model_that_is_left_to_transformers() -> None:
    tokenizer = build_tokenizer([])
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4))
    section = EvaluationSection(samples_per_prompt=2, batch_size=3)
    found = generate_samples(model, tokenizer, ["1+2=", "9-4="], section, max_new_tokens=5, seed=0)
    assert [len(row) for row in found] == [2, 2]
    assert all(1 <= len(sample.ids) <= 5 for row in found for sample in row)
