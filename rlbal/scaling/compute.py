"""Floating-point operations of a run, counted from lengths.

A forward pass costs 2 operations per weight that multiplies an activation and token, plus attention's two products of
2 * layers * width operations per token and token attended to. A training pass costs three forward passes: recomputation
under gradient checkpointing is not counted, since it buys nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """What the count needs to know of a model.

    Args:
        matmul_parameters: weights in matrix products, the output head included, the input embedding not.
        layers: transformer blocks.
        attention_width: query heads x head size.
    """

    matmul_parameters: int
    layers: int
    attention_width: int


def forward_flops(shape: ModelShape, tokens: int, attended: int) -> float:
    """Operations of one forward pass.

    Args:
        shape: the model.
        tokens: tokens processed.
        attended: sum over tokens of the positions each attends to.
    """
    return 2.0 * shape.matmul_parameters * tokens + 4.0 * shape.layers * shape.attention_width * attended


def rollout_flops(
    shape: ModelShape, prompt_tokens: list[int], completion_tokens: list[int], training_passes: int
) -> float:
    """Operations to generate completions once and to train on them.

    Args:
        shape: the model.
        prompt_tokens: prompt length of each row.
        completion_tokens: completion length of each row.
        training_passes: times each row goes forward and backward.
    """
    total = 0.0
    for prompt, completion in zip(prompt_tokens, completion_tokens, strict=True):
        length = prompt + completion
        total += forward_flops(shape, length, length * (length + 1) // 2) * (1 + 3 * training_passes)
    return total
