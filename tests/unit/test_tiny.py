import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlbal.errors import RecipeError
from rlbal.recipe import TinySection
from rlbal.tiny import BYTES, EOS, PAD, build_model, build_tokenizer

PHRASES = ["<think>", "</think>", "<answer>", "</answer>", "Work it out: ", "naïve → "]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4 - 1 - 7 =",
        "<think>4;-1=3</think>",
        "  two\n\tlines \r\n",
        "naïve → é Ġ 日本語 👩‍👩‍👧",
        "<0x41>\x00\x7f ▁",
        "don 't .",
    ],
)
def test_any_text_round_trips(text):
    tokenizer = build_tokenizer(PHRASES)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokens_are_bytes_and_phrases():
    tokenizer = build_tokenizer(PHRASES)
    ids = tokenizer("Work it out: 12<think>é")["input_ids"]
    # Byte b has id b; 256 and 257 are padding and end; the phrases follow in order. é is the bytes C3 A9.
    assert ids == [262, ord("1"), ord("2"), 258, 0xC3, 0xA9]
    assert len(tokenizer) == 256 + 2 + 6
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)


def test_the_longest_phrase_wins():
    assert build_tokenizer(["ab", "abc"])("abcab")["input_ids"] == [259, 258]


def test_phrases_survive_decoding_without_special_tokens():
    tokenizer = build_tokenizer(PHRASES)
    ids = tokenizer("<answer>3</answer>")["input_ids"] + [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == ["<answer>3</answer>"]


def test_bytes_cut_in_the_middle_of_a_character_decode_without_an_error():
    assert build_tokenizer([]).decode([0xC3, ord("a")]).startswith("\ufffd")


def test_chat_template():
    tokenizer = build_tokenizer([])
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1 ="}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "system: Add.\nuser: 1 + 1 =\nassistant: "
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "2"}], tokenize=False)
    assert whole == prompt + "2" + EOS + "\n"


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        (["a", ""], "empty phrase"),
        (["ab", "ab"], "'ab' 2 times"),
        ([EOS], "already a token"),
        ([BYTES[65]], "'<0x41>'"),
    ],
)
def test_bad_phrases_are_refused(phrases, message):
    with pytest.raises(RecipeError, match=rf"model\.tiny\.phrases.*{message}"):
        build_tokenizer(phrases)


def test_default_model_is_small_and_generates():
    tokenizer = build_tokenizer(PHRASES)
    model = build_model(TinySection(), tokenizer, seed=0)
    assert 300_000 < model.num_parameters() < 1_000_000
    assert model.dtype == torch.float32
    prompt = tokenizer("1 + 1 =", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3)
    assert out.shape == (1, 7 + 3)
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (256, 257)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    tiny, tokenizer = TinySection(hidden_size=16, heads=2, layers=1), build_tokenizer([])
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (build_model(tiny, tokenizer, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.rand(1) == expected
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_folder_loads_with_the_auto_classes(tmp_path):
    tokenizer = build_tokenizer(PHRASES)
    model = build_model(TinySection(hidden_size=16, heads=2, layers=1), tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer_again = AutoTokenizer.from_pretrained(tmp_path)
    model_again = AutoModelForCausalLM.from_pretrained(tmp_path)
    text = "<think>naïve → 12 日本"
    ids = tokenizer_again(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert tokenizer_again.decode(ids, skip_special_tokens=True) == text
    assert tokenizer_again.chat_template == tokenizer.chat_template
    assert model_again.generation_config.eos_token_id == tokenizer_again.eos_token_id == tokenizer.eos_token_id
    inputs = torch.tensor([ids])
    assert torch.equal(model(inputs).logits, model_again(inputs).logits)


@pytest.mark.parametrize(("hidden_size", "heads"), [(30, 4), (12, 4)])  # not divisible; heads of odd size 3
def test_heads_must_divide_the_hidden_size(hidden_size, heads):
    with pytest.raises(RecipeError, match=rf"hidden_size` {hidden_size}.*multiple of {2 * heads}(?s:.*)|multiple of 8"):
        build_model(TinySection(hidden_size=hidden_size, heads=heads), build_tokenizer([]), seed=0)
