"""FLOPs: by hand for small shapes, and against PyTorch's own counter on a real model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlbal.scaling.compute import ModelShape, forward_flops, rollout_flops
from rlbal.trainers.totals import Totals, model_shape

SHAPE = ModelShape(matmul_parameters=100, layers=2, attention_width=8)


def test_a_forward_pass_by_hand():
    # 3 tokens through 100 weights: 2 * 100 * 3 = 600. Attending to 1 + 2 + 3 = 6 positions: q.k and p.v, each 2 * 8
    # operations per position and layer: 4 * 2 * 8 * 6 = 384.
    assert forward_flops(SHAPE, tokens=3, attended=6) == 600 + 384


def test_rollouts_by_hand():
    # Row 1: 1 + 2 = 3 tokens: 984 as above. Row 2: 2 + 0 = 2 tokens: 2 * 100 * 2 + 4 * 2 * 8 * (1 + 2) = 592.
    # Generating is one forward pass; each training pass is three (one forward, two for the gradients).
    assert rollout_flops(SHAPE, [1, 2], [2, 0], training_passes=0) == 984 + 592
    assert rollout_flops(SHAPE, [1, 2], [2, 0], training_passes=2) == 7 * (984 + 592)


def qwen(**changes):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = Qwen2Config(**sizes, **heads, **changes, attn_implementation="eager")
    return Qwen2ForCausalLM(config)


def test_the_shape_of_a_model():
    # Per layer: q and o 64 x 64, k and v 64 x 32 (two key heads of 16), q, k, v biases 64 + 32 + 32, three 64 x 192
    # in the MLP and two norms of 64: 2 * 4096 + 2 * 2048 + 128 + 3 * 12288 + 128 = 49,408. Last norm 64, head 300 x 64.
    expected = ModelShape(3 * 49_408 + 64 + 300 * 64, layers=3, attention_width=64)
    assert model_shape(qwen(tie_word_embeddings=True)) == expected
    assert model_shape(qwen(tie_word_embeddings=False)) == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [8, 100])
def test_a_forward_pass_as_pytorch_counts_it(tokens, tied):
    model = qwen(tie_word_embeddings=tied)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, tokens, dtype=torch.long))
    # Eager attention computes every pair, also those that the causal mask hides.
    ours = forward_flops(model_shape(model), tokens=2 * tokens, attended=2 * tokens * tokens)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_totals_go_on_after_a_resume():
    before = Totals(rollouts=8, tokens_generated=100, flops=5.0, gpu_seconds_before=60.0)
    after = Totals()
    after.load(before.metrics(num_processes=2))
    assert (after.rollouts, after.tokens_generated, after.flops) == (8, 100, 5.0)
    assert after.gpu_seconds(2) >= before.gpu_seconds_before
