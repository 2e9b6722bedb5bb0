"""The memory estimate, with the arithmetic written out."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from rlbal.memory import critic_parameters, estimate_memory, zero_stage
from rlbal.shipped import shipped_dir
from rlbal.trainers.value import Critic


class Config(SimpleNamespace):
    def get_text_config(self) -> "Config":
        return self


CONFIG = Config(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3, vocab_size=10)
COMMON: dict[str, Any] = {"rows": 4, "micro_rows": 2, "prompt_tokens": 5, "completion_tokens": 7, "reference": False}


def estimate(config: Any = CONFIG, parameters: int = 1000, trainable: int = 1000, **changes: Any) -> dict[str, float]:
    values = {"dtype": "bfloat16", "stage": 0, "num_processes": 4, **COMMON, **changes}
    made = estimate_memory(config, parameters=parameters, trainable=trainable, **values)
    parts = made.parts()
    assert made.total == sum(parts.values())
    return {**parts, "full logits": made.full_logits}


def test_full_precision() -> None:
    assert estimate(dtype="float32") == {
        "weights": 1000 * 4,
        "gradients": 1000 * 4,
        "optimizer": 1000 * (4 + 4),  # two moments
        "critic": 0,
        "reference": 0,
        # keys and values, 3 layers, 1 head of 8 / 2 = 4, 5 + 7 tokens, 4 bytes, 4 rows
        "generation cache": 2 * 3 * 1 * 4 * 12 * 4 * 4,
        "full logits": 2 * 7 * 10 * 4,  # 2 rows, 7 tokens, 10 words, always in 32 bits
    }


def test_quantized_weights_take_what_they_take() -> None:
    found = estimate(weight_bytes=600, trainable=10)
    assert (found["weights"], found["gradients"], found["optimizer"]) == (600, 10 * 2, 10 * 8)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "reference"),
    [
        (0, 2000, 2000, 8000, 2000),
        (1, 2000, 2000, 12000 / 4, 2000),  # ZeRO adds a 32-bit copy of 16-bit weights to the optimizer
        (2, 2000, 2000 / 4, 12000 / 4, 2000),
        (3, 2000 / 4, 2000 / 4, 12000 / 4, 2000 / 4),
    ],
)
def test_zero_stages_over_four_devices(
    stage: int, weights: float, gradients: float, optimizer: float, reference: float
) -> None:
    found = estimate(stage=stage, reference=True)
    assert [found[part] for part in ("weights", "gradients", "optimizer", "reference")] == [
        weights,
        gradients,
        optimizer,
        reference,
    ]
    assert found["generation cache"] == 2 * 3 * 1 * 4 * 12 * 2 * 4  # never sharded


def test_zero_keeps_no_copy_of_weights_in_32_bits() -> None:
    assert estimate(stage=3, dtype="float32")["optimizer"] == 8000 / 4


def test_lora_trains_a_tenth() -> None:
    found = estimate(trainable=100)
    assert (found["weights"], found["gradients"], found["optimizer"]) == (2000, 200, 800)


@pytest.mark.parametrize(
    ("stage", "critic"),
    [
        (0, 2000 + 2000 + 8000),  # weights, gradients, two moments in 32 bits
        (1, 2000 + 2000 + 12000 / 4),  # and a 32-bit copy, over four devices
        (2, 2000 + 2000 / 4 + 12000 / 4),
        (3, 2000 / 4 + 2000 / 4 + 12000 / 4),
    ],
)
def test_a_critic_is_trained_whole(stage: int, critic: float) -> None:
    found = estimate(stage=stage, critic=1000)
    assert found["critic"] == critic
    assert estimate(stage=stage, critic=1000, trainable=100)["critic"] == critic  # whatever LoRA does to the policy
    assert {**found, "critic": 0} == estimate(stage=stage)


def test_a_critic_has_as_many_weights_as_it_is_built_with() -> None:
    head, whole = Critic(8, seed=0), Critic(8, seed=0, backbone=nn.Linear(8, 8))
    assert critic_parameters(8) == sum(one.numel() for one in head.parameters()) == (64 + 8) + (8 + 1)
    assert critic_parameters(8, 8 * 8 + 8) == sum(one.numel() for one in whole.parameters())


def test_heads_as_the_config_has_them() -> None:
    """A head size of its own; and no groups of key-value heads."""
    own = Config(hidden_size=8, num_attention_heads=2, head_dim=16, num_hidden_layers=3, vocab_size=10)
    assert estimate(own)["generation cache"] == 2 * 3 * 2 * 16 * 12 * 2 * 4


@pytest.mark.parametrize(("name", "stage"), [("multi_gpu", 0), ("zero1", 1), ("zero2", 2), ("zero3", 3)])
def test_the_stage_of_shipped_configurations(name: str, stage: int) -> None:
    assert zero_stage(shipped_dir("accelerate_configs") / f"{name}.yaml") == stage


def test_no_configuration_is_no_zero() -> None:
    assert zero_stage(None) == 0
