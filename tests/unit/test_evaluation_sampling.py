"""Samples from a tiny random model: what they depend on, and what they must leave alone."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from rlbal.errors import DataError, RecipeError, RunError
from rlbal.recipe import EvaluationSection, TinySection
from rlbal.sampling import InverseCdf, end_tokens, generate_samples, prompt_token_ids
from rlbal.tiny import build_model, build_tokenizer

PROMPTS = ["1+2=", "a much longer prompt", "7", "9-4="]
SETTINGS = EvaluationSection(samples_per_prompt=3, temperature=0.8, top_k=200, top_p=0.9, batch_size=5)
TOKENIZER = build_tokenizer([])
# With a quarter of the bytes as end tokens, completions of a random model end at many lengths.
ENDS = list(range(64))


@pytest.fixture
def model() -> Any:
    policy = build_model(TinySection(hidden_size=32, layers=2, heads=2), TOKENIZER, seed=0)
    policy.generation_config.eos_token_id = ENDS
    return policy


def sample(model: Any, prompts: list[Any] = PROMPTS, **changes: Any) -> list[list[Any]]:
    options: dict[str, Any] = {"settings": SETTINGS, "max_new_tokens": 8, "seed": 5, **changes}
    return generate_samples(model, TOKENIZER, prompts, options.pop("settings"), **options)


def by_hand(model: Any, prompt: str, uniforms: Any | None, limit: int = 8) -> list[int]:
    """Decode one unpadded prompt without a cache: the likeliest token, or the one at each uniform number."""
    ids: list[int] = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    for step in range(limit):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
        if uniforms is None:
            token = int(logits.argmax())
        else:
            probabilities = np.exp(logits / 0.8)
            kept = np.argsort(-probabilities)[:200]
            probabilities = probabilities[kept] / probabilities[kept].sum()
            # The smallest set of likeliest tokens that holds 0.9 of the probability.
            nucleus = np.sort(kept[: int(np.searchsorted(probabilities.cumsum(), 0.9)) + 1])
            weights = np.exp(logits[nucleus] / 0.8)
            token = int(nucleus[np.searchsorted(weights.cumsum() / weights.sum(), uniforms[step], side="right")])
        ids.append(token)
        if token in [*ENDS, TOKENIZER.eos_token_id]:
            break
    return ids[start:]


def test_greedy_is_the_argmax(model: Any) -> None:
    samples = sample(model, greedy=True)
    assert [row[0].ids for row in samples] == [by_hand(model.eval(), prompt, None) for prompt in PROMPTS]
    assert [len(row) for row in samples] == [1, 1, 1, 1]


def test_sampling_follows_temperature_top_k_and_top_p(model: Any) -> None:
    samples = sample(model)
    for position, prompt in enumerate(PROMPTS):
        for number, found in enumerate(samples[position]):
            uniforms = np.random.default_rng((5, position, number)).random(8)
            assert found.ids == by_hand(model.eval(), prompt, uniforms)


def test_inverse_cdf_draws_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 2.0, float("-inf"), 1.0])
    rows = 20_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random((rows, 1)))
    scores = InverseCdf(uniforms, prompt_length=3)(torch.zeros(rows, 3, dtype=torch.long), logits.expand(rows, -1))
    assert (scores.isfinite().sum(dim=1) == 1).all()
    shares = torch.bincount(scores.argmax(dim=1), minlength=4) / rows
    assert shares[2] == 0
    # Four standard errors: 4·√(0.25/20000) = 0.014.
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.0142, rtol=0)


def test_samples_depend_on_seed_and_position_only(model: Any) -> None:
    samples = sample(model)
    assert sample(model) == samples
    assert sample(model, seed=6) != samples
    one_by_one = SETTINGS.model_copy(update={"batch_size": 1})
    assert sample(model, settings=one_by_one) == samples
    assert sample(model, [PROMPTS[3], PROMPTS[1]], positions=[3, 1]) == [samples[3], samples[1]]
    assert sample(model, [PROMPTS[0]] * 2)[0] != sample(model, [PROMPTS[0]] * 2)[1]


def test_every_end_token_ends_a_completion_and_the_rest_are_truncated(model: Any) -> None:
    assert end_tokens(model, TOKENIZER) == [*ENDS, TOKENIZER.eos_token_id]
    found = [one for row in sample(model, max_new_tokens=3) for one in row]
    ends = {*ENDS, TOKENIZER.eos_token_id}
    for one in found:
        assert not ends.intersection(one.ids[:-1])
        assert one.truncated == (one.ids[-1] not in ends)
        assert len(one.ids) == 3 or not one.truncated
    assert {one.truncated for one in found} == {True, False}


def test_text_is_without_special_tokens(model: Any) -> None:
    model.generation_config.eos_token_id = None
    model.model.norm.weight.data[:] = 0  # all logits 0: every token, the end token too, is as likely
    found = [one for row in sample(model, ["1"] * 400, settings=EvaluationSection(samples_per_prompt=1)) for one in row]
    ended = [one for one in found if not one.truncated]
    assert ended
    for one in ended:
        assert one.ids[-1] == TOKENIZER.eos_token_id
        assert one.text == TOKENIZER.decode([token for token in one.ids if token < 256])


def test_training_randomness_and_modes_are_untouched(model: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    config = model.generation_config
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    sample(model)
    sample(model, greedy=True)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state[1])
    assert random.getstate() == python_state
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.generation_config is config


def test_dropout_is_off(model: Any) -> None:
    expected = sample(model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    assert sample(model) == expected


LEAKS = GenerationConfig(
    do_sample=True,
    temperature=0.01,
    top_k=1,
    top_p=0.1,
    min_p=0.5,
    repetition_penalty=3.0,
    no_repeat_ngram_size=1,
    suppress_tokens=list(range(100, 256)),
    num_return_sequences=2,
    min_new_tokens=5,
    eos_token_id=ENDS,
)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_leaks_from_the_models_generation_config(model: Any, greedy: bool, wrapped: bool) -> None:
    expected = sample(model, greedy=greedy)
    model.generation_config = LEAKS
    policy = model
    if wrapped:
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))  # starts as the identity
    assert sample(policy, greedy=greedy) == expected
    assert model.generation_config is LEAKS
    assert policy.generation_config is LEAKS


def test_a_diverged_policy_is_reported_and_left_as_it_was(model: Any) -> None:
    model.train()
    config = model.generation_config
    model.model.norm.weight.data[:] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        sample(model)
    assert model.training
    assert model.generation_config is config


def test_chat_prompts_go_through_the_template(model: Any) -> None:
    chat = [[{"role": "user", "content": "7"}]]
    assert prompt_token_ids(TOKENIZER, chat) == prompt_token_ids(TOKENIZER, ["user: 7\nassistant: "])
    assert sample(model, chat) == sample(model, ["user: 7\nassistant: "])


def test_prompts_that_cannot_be_tokenized() -> None:
    chat = [[{"role": "system", "content": "be brief"}]]
    plain = build_tokenizer([])
    plain.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        prompt_token_ids(plain, chat)
    plain.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match="System role not supported"):
        prompt_token_ids(plain, chat)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        prompt_token_ids(plain, ["1", ""])


def test_no_prompts_give_no_samples(model: Any) -> None:
    assert sample(model, []) == []
