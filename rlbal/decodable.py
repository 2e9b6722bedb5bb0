"""Which models and which options of `generate` `rlbal.decoding` can stand in for."""

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Options of `generate` that treat each row by itself, so that rows may leave.
ROW_BY_ROW = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "sequence_bias",
    "suppress_tokens",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
}

# Options by which a model's own generation config asks for another way of decoding, and the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "cache_implementation": (None,),
    "constraints": (None,),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "stop_strings": (None,),
    "token_healing": (None, False),
    "use_mtp": (None, False),
    "watermarking_config": (None,),
}


def unsupported(model: Any, generation_kwargs: dict[str, Any]) -> str | None:
    """Why a model's completions cannot be decoded here with these options of `generate`, in words; None if they can.

    Options that are not given come from the model's own generation config, as in `generate`.
    """
    if others := sorted(set(generation_kwargs) - ROW_BY_ROW):
        return f"`trainer.generation_kwargs` asks for {', '.join(others)}"
    own = model.generation_config
    if others := [key for key, values in NEUTRAL.items() if getattr(own, key, None) not in values]:
        return f"the model's generation config asks for {', '.join(others)}"
    if model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():
        return "the model has a cache of its own"
    if not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers):
        return "the model has layers that keep something else than keys and values"
    return None
