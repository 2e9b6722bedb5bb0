"""How much memory a run needs per device: weights, gradients, optimizer, critic, generation cache and logits.

An estimate from the recipe and the model's shape. Activations are not in it: they depend on the attention kernels and
on gradient checkpointing more than on anything a recipe says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlbal.launch import read_accelerate_config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device."""

    weights: float
    gradients: float
    optimizer: float
    critic: float
    reference: float
    generation_cache: float
    full_logits: float

    def parts(self) -> dict[str, float]:
        """All but `full_logits`: TRL computes log-probabilities in tiles and never holds the logits of a batch."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "critic": self.critic,
            "reference": self.reference,
            "generation cache": self.generation_cache,
        }

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(self.parts().values())


def zero_stage(accelerate_config: Path | None) -> int:
    """The ZeRO stage of an accelerate configuration; 0 without DeepSpeed."""
    if accelerate_config is None:
        return 0
    return int((read_accelerate_config(accelerate_config).get("deepspeed_config") or {}).get("zero_stage", 0))


def critic_parameters(width: int, backbone: int = 0) -> int:
    """Weights of PPO's critic: its head, as `rlbal.trainers.value` builds it, and what is below.

    Args:
        width: of the hidden states.
        backbone: weights of a separate critic's own model.
    """
    return (width * width + width) + (width + 1) + backbone


def estimate_memory(
    config: Any,
    *,
    parameters: int,
    trainable: int,
    dtype: str,
    stage: int,
    num_processes: int,
    rows: int,
    micro_rows: int,
    prompt_tokens: int,
    completion_tokens: int,
    reference: bool,
    critic: int = 0,
    weight_bytes: int | None = None,
) -> MemoryEstimate:
    """Estimate bytes per device with AdamW (two moments in 32 bits, and a 32-bit copy of weights in fewer bits).

    Args:
        config: the model's transformers config.
        parameters: all weights.
        trainable: weights that are trained (LoRA's only, under LoRA).
        dtype: of the weights.
        stage: ZeRO stage, 0 for none: 1 shards the optimizer, 2 gradients too, 3 weights too.
        num_processes: devices sharing the shards.
        rows: completions generated at once on one device.
        micro_rows: rows of one training micro-batch on one device.
        prompt_tokens: longest prompt.
        completion_tokens: longest completion.
        reference: a reference model is held for the KL term.
        critic: weights of PPO's critic, all of which are trained.
        weight_bytes: what all weights take where that is not `dtype` each, as when they are quantized.
    """
    size = BYTES[dtype]
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    cache_row = 2 * text.num_hidden_layers * kv_heads * head_size * (prompt_tokens + completion_tokens) * size
    master = 4 if size < 4 and stage > 0 else 0

    def share(from_stage: int) -> int:
        return num_processes if stage >= from_stage else 1

    return MemoryEstimate(
        weights=(parameters * size if weight_bytes is None else weight_bytes) / share(3),
        gradients=trainable * size / share(2),
        optimizer=trainable * (8 + master) / share(1),
        critic=critic * (size / share(3) + size / share(2) + (8 + master) / share(1)),
        reference=parameters * size / share(3) if reference else 0.0,
        generation_cache=float(rows * cache_row),
        full_logits=float(micro_rows * completion_tokens * text.vocab_size * 4),
    )
