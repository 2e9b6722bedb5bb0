"""Token advantages: worked out by hand, and against a loop over tokens on random ragged batches."""

import pytest
import torch

from rlbal.balance.gae import (
    estimate_advantages,
    final_values,
    masked_moments,
    mean_and_variance,
    token_rewards,
    whiten,
)

# One episode of three tokens, γ = 0.9, λ = 0.5 (γλ = 0.45), reward 1 with the last token, values 0.2, 0.5, 0.4:
#   δ_3 = 1 + 0         - 0.4 = 0.6       A_3 = 0.6                       R_3 = 0.6 + 0.4    = 1
#   δ_2 = 0 + 0.9 * 0.4 - 0.5 = -0.14     A_2 = -0.14 + 0.45 * 0.6 = 0.13 R_2 = 0.13 + 0.5   = 0.63
#   δ_1 = 0 + 0.9 * 0.5 - 0.2 = 0.25      A_1 = 0.25 + 0.45 * 0.13 = 0.3085   R_1 = 0.5085
# Cut off, and the state it was left in worth 0.8, bootstrapped: V_4 = 0.8
#   δ_3 = 1 + 0.9 * 0.8 - 0.4 = 1.32      A_3 = 1.32                      R_3 = 1.72
#   A_2 = -0.14 + 0.45 * 1.32 = 0.454     R_2 = 0.954
#   A_1 = 0.25 + 0.45 * 0.454 = 0.4543    R_1 = 0.6543
ENDED = ([0.3085, 0.13, 0.6], [0.5085, 0.63, 1.0])
BOOTSTRAPPED = ([0.4543, 0.454, 1.32], [0.6543, 0.954, 1.72])
GAMMA, LAM = 0.9, 0.5


def estimate(values_BT1, rewards_B, lengths_B, truncated_B, truncation, width):
    """Advantages and returns of completions of which the policy wrote every token."""
    values_BT1, lengths_B = torch.tensor(values_BT1, dtype=torch.float64), torch.tensor(lengths_B)
    actions_BT = torch.arange(width) < lengths_B[:, None]
    rewards_BT = token_rewards(torch.tensor(rewards_B, dtype=torch.float64), actions_BT)
    final_B = final_values(values_BT1, lengths_B, torch.tensor(truncated_B), truncation)
    return estimate_advantages(rewards_BT, values_BT1[:, :-1], final_B, actions_BT, GAMMA, LAM)


@pytest.mark.parametrize(
    ("truncated", "truncation", "expected"),
    [
        (False, "terminal", ENDED),
        (True, "terminal", ENDED),
        (False, "bootstrap", ENDED),
        (True, "bootstrap", BOOTSTRAPPED),
    ],
)
def test_an_episode_by_hand_and_cut_off(truncated, truncation, expected):
    advantages, returns = estimate([[0.2, 0.5, 0.4, 0.8]], [1.0], [3], [truncated], truncation, 3)
    assert advantages[0].tolist() == pytest.approx(expected[0], rel=1e-12)
    assert returns[0].tolist() == pytest.approx(expected[1], rel=1e-12)


def test_rows_of_a_ragged_batch_do_not_see_each_other_nor_their_padding():
    # The second row is the episode above, padded by two columns in which anything may stand.
    values = [[1.0, -1.0, 2.0, 0.3, 0.1, 7.0], [0.2, 0.5, 0.4, 0.8, 9.0, 9.0]]
    advantages, returns = estimate(values, [0.0, 1.0], [5, 3], [True, True], "bootstrap", 5)
    assert advantages[1].tolist() == pytest.approx([*BOOTSTRAPPED[0], 0, 0], rel=1e-12)
    assert returns[1].tolist() == pytest.approx([*BOOTSTRAPPED[1], 0, 0], rel=1e-12)


def test_lambda_one_compares_with_the_whole_future_and_zero_with_the_next_state():
    values, actions = torch.tensor([[0.2, 0.5, 0.4]]), torch.ones(1, 3, dtype=torch.bool)
    rewards, final = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1)
    advantages, returns = estimate_advantages(rewards, values, final, actions, 1.0, 1.0)
    assert returns[0].tolist() == pytest.approx([1, 1, 1])
    assert advantages[0].tolist() == pytest.approx([0.8, 0.5, 0.6])
    advantages, returns = estimate_advantages(rewards, values, final, actions, 1.0, 0.0)
    assert returns[0].tolist() == pytest.approx([0.5, 0.4, 1])


def test_tokens_that_were_injected_are_passed_over():
    # Actions 1 and 4, an injected pair in between: an episode of two tokens, γ = 0.9, γλ = 0.45, reward 1 at token 4.
    #   A_4 = 1 - 0.4 = 0.6      A_1 = (0.9 * 0.4 - 0.2) + 0.45 * 0.6 = 0.16 + 0.27 = 0.43
    actions = torch.tensor([[True, False, False, True, False]])
    rewards = token_rewards(torch.tensor([1.0]), actions)
    assert rewards.tolist() == [[0, 0, 0, 1, 0]]
    values = torch.tensor([[0.2, 8.0, 9.0, 0.4, 7.0]])
    advantages, returns = estimate_advantages(rewards, values, torch.zeros(1), actions, GAMMA, LAM)
    assert advantages[0].tolist() == pytest.approx([0.43, 0, 0, 0.6, 0])
    assert returns[0].tolist() == pytest.approx([0.63, 0, 0, 1.0, 0])


def test_the_penalty_is_paid_at_every_token():
    actions = torch.tensor([[True, True, False]])
    log_ratio = torch.tensor([[0.5, -0.2, float("nan")]])
    rewards = token_rewards(torch.tensor([2.0]), actions, log_ratio, kl_penalty=0.1)
    # -0.1 * 0.5 = -0.05 and 2 + 0.1 * 0.2 = 2.02
    assert rewards[0].tolist() == pytest.approx([-0.05, 2.02, 0.0])


def slow(rewards, values, final, actions, gamma, lam):
    """The recursion as it is written, one token after the other."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for row in range(len(values)):
        own = [t for t in range(values.shape[1]) if actions[row, t]]
        after, advantage = final[row].item(), 0.0
        for t in reversed(own):
            delta = rewards[row, t].item() + gamma * after - values[row, t].item()
            advantage = delta + gamma * lam * advantage
            after = values[row, t].item()
            advantages[row, t], returns[row, t] = advantage, advantage + after
    return advantages, returns


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("gaps", [False, True])
def test_random_ragged_batches_equal_the_loop(seed, gaps):
    generator = torch.Generator().manual_seed(seed)
    B, T = 7, [1, 2, 3, 8, 13, 31, 32, 33][seed]
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    actions = torch.arange(T) < lengths[:, None]
    if gaps:
        actions &= torch.rand(B, T, generator=generator) < 0.6
    values, rewards = (torch.randn(B, T, generator=generator, dtype=torch.float64) for _ in range(2))
    final = torch.randn(B, generator=generator, dtype=torch.float64)
    rewards = torch.where(actions, rewards, 0.0)
    gamma, lam = [1.0, 0.97][seed % 2], [0.0, 0.5, 0.95, 1.0][seed % 4]
    found, expected = (one(rewards, values, final, actions, gamma, lam) for one in (estimate_advantages, slow))
    for some, others in zip(found, expected, strict=True):
        torch.testing.assert_close(some, others, rtol=1e-12, atol=1e-12)


def test_a_critic_that_is_right_leaves_nothing_to_learn():
    # γ = 1: the value of every state is the reward to come.
    advantages, returns = estimate_advantages(
        torch.tensor([[0.0, 0.0, 0.7]]), torch.full((1, 3), 0.7), torch.zeros(1), torch.ones(1, 3).bool(), 1.0, 0.95
    )
    assert advantages.abs().max() < 1e-6 and returns[0].tolist() == pytest.approx([0.7] * 3)


def test_a_row_without_tokens_has_no_advantage():
    advantages, returns = estimate([[3.0, 4.0, 5.0]], [1.0], [0], [True], "bootstrap", 2)
    assert advantages.tolist() == returns.tolist() == [[0, 0]]


# Whitening: 1, 2, 3, 6 have the mean 3 and the variance (4 + 1 + 0 + 9) / 4 = 3.5.


def test_whitening_counts_what_is_in_the_mask():
    values = torch.tensor([[1.0, 2.0, 50.0], [3.0, 6.0, float("nan")]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]] * 2)
    moments = masked_moments(values, mask)
    assert moments.tolist() == [4, 12, 50]
    expected = [(value - 3) / 3.5**0.5 for value in (1, 2, 3, 6)]
    assert whiten(values, mask, moments)[mask].tolist() == pytest.approx(expected, rel=1e-7)
    assert whiten(values, mask, moments)[~mask].tolist() == [0, 0]


def test_processes_that_add_their_moments_up_whiten_as_one():
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 0, 2, 4])[:, None]
    moments = masked_moments(values[:2], mask[:2]) + masked_moments(values[2:], mask[2:])
    apart = torch.cat([whiten(values[:2], mask[:2], moments), whiten(values[2:], mask[2:], moments)])
    torch.testing.assert_close(apart, whiten(values, mask, masked_moments(values, mask)), rtol=1e-12, atol=1e-12)
    assert apart[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert apart[mask].var(correction=0).item() == pytest.approx(1, rel=1e-6)


def test_without_signal_whitening_makes_none():
    same = torch.full((3, 4), 0.1, dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert mean_and_variance(masked_moments(same, mask))[1] == 0
    assert whiten(same, mask, masked_moments(same, mask)).abs().max() < 1e-6
    nothing = torch.zeros_like(mask)
    assert whiten(same, nothing, masked_moments(same, nothing)).tolist() == [[0] * 4] * 3
