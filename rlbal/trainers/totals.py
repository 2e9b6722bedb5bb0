"""What a run has cost so far, over all processes and across resumes."""

import time
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from rlbal.scaling.compute import ModelShape


@dataclass
class Totals:
    """Cumulative counts of a run."""

    rollouts: int = 0
    tokens_generated: int = 0
    flops: float = 0.0
    gpu_seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def gpu_seconds(self, num_processes: int) -> float:
        """Wall seconds times processes (one device each), those before a resume included."""
        return self.gpu_seconds_before + (time.perf_counter() - self.started) * num_processes

    def metrics(self, num_processes: int) -> dict[str, float]:
        return {
            "rollouts": self.rollouts,
            "tokens_generated": self.tokens_generated,
            "flops": self.flops,
            "gpu_seconds": self.gpu_seconds(num_processes),
        }

    def load(self, saved: dict[str, float]) -> None:
        """Go on from what `metrics` gave when the checkpoint was written."""
        self.rollouts, self.tokens_generated = int(saved["rollouts"]), int(saved["tokens_generated"])
        self.flops, self.gpu_seconds_before = saved["flops"], saved["gpu_seconds"]
        self.started = time.perf_counter()


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The shape that FLOPs are counted from.

    Under ZeRO-3 a parameter's own size is 0 on this process; DeepSpeed keeps the true one in `ds_numel`.
    """
    config = model.config.get_text_config()
    total = sum(_size(parameter) for name, parameter in model.named_parameters() if "lora_" not in name)
    # A tied embedding is the output head too, so it multiplies once.
    if not config.tie_word_embeddings:
        total -= sum(_size(parameter) for parameter in model.get_input_embeddings().parameters())
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(total, config.num_hidden_layers, config.num_attention_heads * head_size)


def _size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
