"""Our decoding gives what transformers' gives, whatever else is in the batch, and keeps its promises."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.cache_utils import DynamicLayer

import rlbal.decoding
from rlbal.decodable import unsupported
from rlbal.decoding import decode
from rlbal.errors import RunError
from tests.decoders import COMMON, ENDS, PAD, SAMPLING, V, by_transformers, make_prompts, qwen, settings, uniforms


@pytest.fixture(params=[1 / 8, 1e-9, 2.0], ids=["drop an eighth", "drop at once", "never drop"])
def drop_share(request: Any, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(rlbal.decoding, "DROP_SHARE", request.param)
    return float(request.param)


@pytest.fixture
def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows whenever some are dropped."""
    sizes: list[int] = []
    keep = rlbal.decoding._Active.keep

    def counted(self: Any, indices: torch.Tensor) -> None:
        sizes.append(len(indices))
        keep(self, indices)

    monkeypatch.setattr(rlbal.decoding._Active, "keep", counted)
    return sizes


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_transformers(seed: int, drop_share: float, batch_sizes: list[int]) -> None:
    model, prompts = qwen(seed), make_prompts(seed)
    found = decode(model, prompts, settings(), None)
    assert found == by_transformers(model, prompts, settings())
    assert len({len(completion) for completion in found}) >= 3
    assert batch_sizes == sorted(set(batch_sizes), reverse=True)
    assert len(batch_sizes) >= 2 if drop_share < 1 else not batch_sizes


def test_greedy_with_one_prompt_and_without_padding() -> None:
    model = qwen()
    for prompts in ([[20, 30, 40]], [[20, 30, 40]] * 5, [[20], [30]]):
        assert decode(model, prompts, settings(), None) == by_transformers(model, prompts, settings())


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"min_new_tokens": 5},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(14, 40))},
        {"bad_words_ids": [[46], [35, 26]]},
        {"forced_eos_token_id": 3},
        {"begin_suppress_tokens": ENDS},
        {"exponential_decay_length_penalty": (2, 1.5)},
        {"max_new_tokens": 1},
        {"eos_token_id": None},
        {"eos_token_id": 5},
    ],
    ids=str,
)
def test_greedy_with_the_options_of_generate(options: dict[str, Any]) -> None:
    model, prompts, config = qwen(3, eos_token_id=None), make_prompts(3), settings(**{"max_new_tokens": 6, **options})
    found = decode(model, prompts, config, None)
    assert found == by_transformers(model, prompts, config)
    assert found != decode(model, prompts, settings(max_new_tokens=6), None), "the option does nothing here"


def test_padding_is_no_repetition() -> None:
    """The pad token left of a prompt is none that the prompt holds, also when only some rows are left."""
    model, config = qwen(3, eos_token_id=None), settings(repetition_penalty=1.7, **{**SAMPLING, "top_k": 0})
    with torch.no_grad():
        model.lm_head.weight[PAD] *= 2  # likely enough to be drawn
    prompts = make_prompts(3)
    numbers = uniforms(16)
    expected = [decode(model, [prompt], config, numbers[row : row + 1])[0] for row, prompt in enumerate(prompts)]
    assert decode(model, prompts, config, numbers) == expected
    assert PAD in {token for row in expected for token in row}


def sliding() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**COMMON, sliding_window=4, tie_word_embeddings=False)).eval()


def alternating() -> Any:
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention"]
    config = {**COMMON, "sliding_window": 4, "layer_types": types, "query_pre_attn_scalar": 16}
    return Gemma2ForCausalLM(Gemma2Config(**config, tie_word_embeddings=False)).eval()


def learned_positions() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def test_the_cache_that_it_replaces_is_transformers_own() -> None:
    """A layer of another kind stays as it is; those that are replaced hold everything."""
    kinds = [type(layer) for layer in DynamicCache(config=alternating().config).layers]
    assert len(kinds) == 2 and kinds[1] is DynamicLayer and kinds[0] is not DynamicLayer


@pytest.mark.parametrize("make", [sliding, alternating, learned_positions])
def test_greedy_of_other_models(make: Callable[[], Any], drop_share: float) -> None:
    """Windows shorter than prompt and completion, and positions that padding must not shift."""
    model, config = make(), settings(max_new_tokens=20)
    assert unsupported(model, {}) is None
    lengths = set()
    for seed in range(3):
        prompts = make_prompts(seed)
        found = decode(model, prompts, config, None)
        assert found == by_transformers(model, prompts, config)
        assert max(len(prompt) + len(row) for prompt, row in zip(prompts, found, strict=True)) > 8
        lengths |= {len(completion) for completion in found}
    assert len(lengths) >= 3


def test_greedy_of_a_model_with_lora() -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model, prompts = get_peft_model(qwen(), lora).eval(), make_prompts(0)
    assert unsupported(model, {}) is None
    found = decode(model, prompts, settings(), None)
    assert found == by_transformers(model, prompts, settings())
    with model.disable_adapter():
        assert found != decode(model, prompts, settings(), None)


# Sampling: a row's completion depends on its prompt and its numbers alone.


@pytest.mark.parametrize("seed", range(3))
def test_sampling_does_not_depend_on_the_batch(seed: int, drop_share: float) -> None:
    model, prompts, config = qwen(seed), make_prompts(seed), settings(**SAMPLING)
    numbers = uniforms(16, seed)
    expected = [decode(model, [prompts[row]], config, numbers[row : row + 1])[0] for row in range(16)]
    assert len({len(completion) for completion in expected}) >= 3
    assert decode(model, prompts, config, numbers) == expected
    order = np.random.default_rng(seed).permutation(16)
    shuffled = decode(model, [prompts[row] for row in order], config, numbers[order])
    assert shuffled == [expected[row] for row in order]
    waves = [decode(model, prompts[start : start + 5], config, numbers[start : start + 5]) for start in (0, 5, 10)]
    assert [row for wave in waves for row in wave] == expected[:15]
    assert decode(model, prompts, config, uniforms(16, seed + 100)) != expected


def test_looking_less_often_changes_nothing(monkeypatch: pytest.MonkeyPatch, batch_sizes: list[int]) -> None:
    """An accelerator is looked at every few steps only; until then rows go on after their end."""
    model, prompts, numbers = qwen(1), make_prompts(1, rows=24), uniforms(24, 1, limit=30)
    config = settings(**SAMPLING, max_new_tokens=30)
    expected = decode(model, prompts, config, numbers)
    drops, looks = len(batch_sizes), []
    real = rlbal.decoding._anyone_left
    monkeypatch.setattr(rlbal.decoding, "_anyone_left", lambda *left: (looks.append(1), real(*left))[1])
    for every in (4, 16, 100):
        looks.clear()
        batch_sizes.clear()
        monkeypatch.setitem(rlbal.decoding.STEPS_BETWEEN_LOOKS, "cpu", every)
        assert decode(model, prompts, config, numbers) == expected
        assert 1 <= len(looks) <= -(-30 // every)
        assert len(batch_sizes) < drops


# What a caller is promised.


def test_a_completion_has_at_least_one_token() -> None:
    model = qwen()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.where(torch.arange(V) == 7, 100.0, 0.0))
    prompts = make_prompts(0)
    assert decode(model, prompts, settings(), None) == [[7]] * 16
    assert decode(model, prompts, settings(**SAMPLING), uniforms(16)) == [[7]] * 16


def test_no_completion_is_longer_than_the_cap() -> None:
    model, prompts = qwen(), make_prompts(0, rows=32)
    found = decode(model, prompts, settings(do_sample=True, max_new_tokens=4), uniforms(32, limit=4))
    longest = [row for row in found if len(row) == 4]
    assert max(map(len, found)) == 4
    assert any(row[-1] not in ENDS for row in longest) and any(len(row) < 4 for row in found)
    for row in found:
        assert not set(row[:-1]) & set(ENDS)
        assert len(row) == 4 or row[-1] in ENDS


def test_every_row_is_handed_over_once_and_early(drop_share: float) -> None:
    model, prompts, config = qwen(2), make_prompts(2), settings(**SAMPLING, max_new_tokens=30)
    calls: list[tuple[int, list[int], list[list[int]]]] = []
    steps = 0

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal steps
        steps += 1

    model.register_forward_hook(count, with_kwargs=True)
    found = decode(
        model, prompts, config, uniforms(16, 2, 30), on_finished=lambda rows, done: calls.append((steps, rows, done))
    )
    handed = {row: completion for _, rows, done in calls for row, completion in zip(rows, done, strict=True)}
    assert sorted(row for _, rows, _ in calls for row in rows) == list(range(16))
    assert [handed[row] for row in range(16)] == found
    assert all(rows for _, rows, _ in calls)
    # A row is handed over with its last token, while others go on: n tokens take n calls of the model.
    for when, rows, done in calls:
        assert {len(completion) for completion in done} == {when}, rows
    assert calls[0][0] < calls[-1][0] == max(map(len, found))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(value: float) -> None:
    model = qwen()
    model.model.norm.weight.data[3] = value
    with pytest.raises(RunError, match="not finite"):
        decode(model, [[20, 30]], settings(do_sample=True), uniforms(1))


def test_the_model_is_left_as_it_was() -> None:
    model = qwen().train()
    config, state = model.generation_config, torch.get_rng_state()
    decode(model, make_prompts(0), settings(**SAMPLING), uniforms(16))
    assert model.training and model.generation_config is config
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.tensor([[20, 30, 40]])
    model(input_ids=ids, labels=ids).loss.backward()  # nothing of it was made for inference only
