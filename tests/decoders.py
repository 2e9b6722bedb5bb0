"""Tiny random models of the decoding tests, and transformers' own decoding of their prompts."""

from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

V, PAD = 64, 0
# A fifth of the vocabulary ends a completion, so that rows leave at many lengths.
ENDS = list(range(1, 14))
COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # peaked enough for a text to go on in more than one way
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": ENDS,
}
# Everything that decides on the next token.
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01}


def qwen(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**COMMON, "tie_word_embeddings": False, **changes})).eval()


def settings(**changes: Any) -> GenerationConfig:
    values = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": ENDS, "use_cache": True}
    if changes.get("do_sample"):
        values |= {"top_k": 0, "temperature": 1.0, "top_p": 1.0}
    return GenerationConfig(**{**values, **changes})


def make_prompts(seed: int, different: int = 7, rows: int = 16) -> list[list[int]]:
    """Prompts of 1 to 9 tokens; some come several times, not side by side."""
    dice = np.random.default_rng(seed)
    some = [dice.integers(14, V, size=dice.integers(1, 10)).tolist() for _ in range(different)]
    return [some[index] for index in dice.integers(0, different, size=rows)]


def uniforms(rows: int, seed: int = 0, limit: int = 12) -> Any:
    return np.random.default_rng(seed).random((rows, limit))


def by_transformers(model: Any, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """`generate` on left-padded prompts, up to the end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    last = [next((i for i, token in enumerate(row) if token in ends), len(row) - 1) for row in output]
    return [row[: stop + 1] for row, stop in zip(output, last, strict=True)]
