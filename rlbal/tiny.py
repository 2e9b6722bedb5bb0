"""A tiny causal LM and its byte tokenizer, built on the spot: RL in minutes on a machine without GPU or model hub.

Both are standard transformers classes: `save_pretrained` writes a folder that `AutoModelForCausalLM` and
`AutoTokenizer` load.
"""

from collections import Counter
from typing import cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlbal.errors import RecipeError
from rlbal.recipe import TinySection

PAD, EOS = "<|pad|>", "<|end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the names that byte fallback looks for
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + (eos_token if message['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def build_tokenizer(phrases: list[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per UTF-8 byte, so every text round-trips and every digit is one token.

    Phrases are ordinary tokens, not special ones: TRL decodes completions without special tokens, and a reward must
    still see `<think>`.

    Args:
        phrases: strings that become one token each; where several fit, the longest wins.

    Raises:
        RecipeError: a phrase is empty, appears twice, or is the name of a byte or special token.
    """
    for phrase, count in Counter(phrases).items():
        if not phrase:
            raise RecipeError("`model.tiny.phrases` holds an empty phrase", fix="remove it")
        if count > 1:
            raise RecipeError(f"`model.tiny.phrases` holds {phrase!r} {count} times", fix="keep one of them")
        if phrase in (PAD, EOS, *BYTES):
            raise RecipeError(f"`model.tiny.phrases`: {phrase!r} is already a token of its own", fix="remove it")
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(BYTES)}, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([PAD, EOS])
    core.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tiny: TinySection, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Make a randomly initialised Qwen3 in float32: 0.36 M parameters at the defaults, the same for the same seed.

    Raises:
        RecipeError: `hidden_size` does not divide into heads of an even size (rotary positions turn pairs).
    """
    if tiny.hidden_size % (2 * tiny.heads):
        raise RecipeError(
            f"`model.tiny.hidden_size` {tiny.hidden_size} does not divide into {tiny.heads} heads of an even size",
            fix=f"use a multiple of {2 * tiny.heads}, or change `model.tiny.heads`",
        )
    pad, eos = cast(int, tokenizer.pad_token_id), cast(int, tokenizer.eos_token_id)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.hidden_size * 8 // 3,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.heads,
        head_dim=tiny.hidden_size // tiny.heads,
        max_position_embeddings=tiny.max_positions,
        tie_word_embeddings=True,
        initializer_range=0.05,  # transformers' 0.02 suits wide models; a narrow one then learns half as fast
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float()
    model.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=eos, do_sample=True)
    return model
