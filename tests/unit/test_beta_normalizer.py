"""The Beta normalizer over batches: by hand, at the edges, and through a checkpoint."""

import json
import math

import pytest
import torch

from rlbal.balance.normalization import BetaNormalizer
from rlbal.errors import RunError

NAN = math.nan
ESTIMATORS = ["moments", "beta_binomial"]


def batch(*rewards):
    """Rewards (N, K) and groups (N,) from a list per reward of a list per prompt."""
    columns = [torch.tensor([value for group in groups for value in group], dtype=torch.float64) for groups in rewards]
    return torch.stack(columns, dim=1), torch.tensor([number for number, group in enumerate(rewards[0]) for _ in group])


def normalizer(estimator="moments", names=("correct",), smoothing=0.0, cap=10.0):
    return BetaNormalizer(list(names), estimator, smoothing, cap)


def with_moments(mean, variance, estimator="moments", cap=10.0):
    """A normalizer that has seen these m and v."""
    one = normalizer(estimator, cap=cap)
    states = {"mean": mean, "variance": variance}
    one.load_state_dict(
        {"rewards": one.names, "capped": [0.0]}
        | {name: {"total": [value], "weight": [1.0]} for name, value in states.items()}
    )
    return one


def centred(unit_NK, group_N):
    """Rewards less the mean of their group, as plain loops."""
    result = torch.zeros_like(unit_NK)
    for i in range(len(unit_NK)):
        for k in range(unit_NK.shape[1]):
            mates = unit_NK[group_N == group_N[i], k]
            mates = mates[~mates.isnan()]
            if not unit_NK[i, k].isnan() and len(set(mates.tolist())) > 1:
                result[i, k] = unit_NK[i, k] - mates.mean()
    return result


def normalized(one, unit_NK, group_N):
    return one.normalize(centred(unit_NK, group_N), unit_NK, group_N)


def column(tensor_NK, k=0):
    return tensor_NK[:, k].tolist()


GROUPS = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1], [0]]


def test_moments_by_hand():
    # m = 1/2, v = 10/64 (test_normalization): 16/10 - 1 = 0.6, a = b = 0.3, alpha = beta = 1.1.
    # f(3/4) = f(1/4) = (3/16)^0.1 / B(1.1, 1.1); the last two prompts have p = 1 and 0.
    one, (unit_NK, group_N) = normalizer(), batch(GROUPS)
    one.observe(unit_NK, group_N)
    f = (3 / 16) ** 0.1 * math.gamma(2.2) / math.gamma(1.1) ** 2
    assert column(one.densities(unit_NK, group_N)) == pytest.approx([f] * 8 + [math.inf] * 3)
    expected = [*[0.25 / f] * 3, -0.75 / f, 0.75 / f, *[-0.25 / f] * 3, 0, 0, 0]
    assert column(normalized(one, unit_NK, group_N)) == pytest.approx(expected)
    assert one.metrics() == {
        "beta/alpha/correct": pytest.approx(1.1),
        "beta/beta/correct": pytest.approx(1.1),
        "beta/m/correct": pytest.approx(0.5),
        "beta/v/correct": pytest.approx(10 / 64),
        "beta/fallback/correct": 0.0,
        "beta/capped/correct": 0.0,
    }


def test_beta_binomial_by_hand():
    # m = 1/2, v = 5/48 (test_normalization): 12/5 - 1 = 1.4, a = b = 0.7, alpha = beta = 1 + 7/30.
    # Posterior means: (0.7 + 3) / (1.4 + 4) = 37/54 and (0.7 + 1) / (1.4 + 4) = 17/54 = 1 - 37/54.
    one, (unit_NK, group_N) = normalizer("beta_binomial"), batch(GROUPS)
    one.observe(unit_NK, group_N)
    alpha = 1 + 7 / 30
    f = (37 / 54 * 17 / 54) ** (7 / 30) * math.gamma(2 * alpha) / math.gamma(alpha) ** 2
    expected = [*[0.25 / f] * 3, -0.75 / f, 0.75 / f, *[-0.25 / f] * 3, 0, 0, 0]
    assert column(normalized(one, unit_NK, group_N)) == pytest.approx(expected)
    metrics = one.metrics()
    assert metrics["beta/v/correct"] == pytest.approx(5 / 48)
    assert metrics["beta/alpha/correct"] == pytest.approx(alpha) == metrics["beta/beta/correct"]


def test_the_paper_takes_the_density_at_the_sampled_mean():
    one = with_moments(2 / 7, 10 / 392)  # Beta(2, 5): alpha = 5/3, beta = 8/3
    unit_NK, group_N = batch([[1, 0, 0, 0]])
    f = 0.25 ** (2 / 3) * 0.75 ** (5 / 3) * math.gamma(13 / 3) / math.gamma(5 / 3) / math.gamma(8 / 3)
    assert column(one.densities(unit_NK, group_N)) == pytest.approx([f] * 4)


def test_more_rollouts_pull_the_posterior_mean_to_the_sampled_one():
    # Beta(2, 5) and p = 1/4 from 4 and from 400 rows: (2 + 1) / (7 + 4) and (2 + 100) / (7 + 400).
    one = with_moments(2 / 7, 10 / 392, "beta_binomial")
    unit_NK, group_N = batch([[1, 0, 0, 0], [1, 0, 0, 0] * 100])
    values = column(one.densities(unit_NK, group_N))
    normaliser = math.gamma(13 / 3) / math.gamma(5 / 3) / math.gamma(8 / 3)
    for value, p in ((values[0], 3 / 11), (values[-1], 102 / 407)):
        assert value == pytest.approx(p ** (2 / 3) * (1 - p) ** (5 / 3) * normaliser)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("groups", "fallback"),
    [
        ([[1, 0, 0]], 1.0),  # one prompt
        ([[1, 0, 0], [1, 0, 0, 1, 0, 0]], 1.0),  # v = 0 or negative
        ([[0, 0], [0, 0]], 1.0),  # m = 0
        ([[1, 1], [1, 1]], 1.0),  # m = 1
        ([[1, 1], [0, 0], [1, 1]], 0.0),  # always or never: v >= m (1 - m)
        ([[1, 1], [1, 1, 1], [0, 0], [0, 0, 0]], 0.0),
    ],
)
def test_alpha_and_beta_are_one_without_a_prior_and_the_metrics_say_why(estimator, groups, fallback):
    one, (unit_NK, group_N) = normalizer(estimator), batch(groups)
    one.observe(unit_NK, group_N)
    metrics = one.metrics()
    assert metrics["beta/alpha/correct"] == pytest.approx(1.0, abs=1e-9)
    assert metrics["beta/beta/correct"] == pytest.approx(1.0, abs=1e-9)
    assert metrics["beta/fallback/correct"] == fallback
    expected = column(centred(unit_NK, group_N))
    assert column(normalized(one, unit_NK, group_N)) == pytest.approx(expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_prompt_with_one_row_gets_nothing(estimator):
    one, (unit_NK, group_N) = normalizer(estimator), batch([[0.3], [1, 0], [1, 0, 0]])
    one.observe(unit_NK, group_N)
    values = column(normalized(one, unit_NK, group_N))
    assert values[0] == 0 and all(math.isfinite(value) and value != 0 for value in values[1:])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_reward_that_is_never_there_is_a_fallback_without_moments(estimator):
    one = normalizer(estimator, ("correct", "style"))
    unit_NK, group_N = batch([[1, 0, 1], [1, 0, 0]], [[NAN] * 3] * 2)
    one.observe(unit_NK, group_N)
    assert column(normalized(one, unit_NK, group_N), 1) == [0.0] * 6
    metrics = one.metrics()
    assert math.isnan(metrics["beta/m/style"]) and math.isnan(metrics["beta/v/style"])
    assert (metrics["beta/alpha/style"], metrics["beta/beta/style"], metrics["beta/fallback/style"]) == (1.0, 1.0, 1.0)
    assert metrics["beta/capped/style"] == 0.0
    assert metrics["beta/m/correct"] == pytest.approx(0.5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_constant_reward_leaves_the_others_as_they_are(estimator):
    groups = [[1, 1, 0, 0], [1, 0, 0], [1, 1, 1, 0]]
    alone, both = normalizer(estimator), normalizer(estimator, ("correct", "style"))
    (one_N1, group_N), (two_NK, _) = batch(groups), batch(groups, [[0.4] * len(group) for group in groups])
    alone.observe(one_N1, group_N)
    both.observe(two_NK, group_N)
    values_NK = normalized(both, two_NK, group_N)
    assert column(values_NK) == column(normalized(alone, one_N1, group_N))
    assert column(values_NK, 1) == [0.0] * 11
    assert {name: value for name, value in both.metrics().items() if name.endswith("correct")} == alone.metrics()


# The cap


def test_the_cap_and_the_share_of_rows_that_it_touched():
    # Beta(30, 30) has v = 1 / (4 * 61); alpha = beta = 11. At p = 1/8: f = 21! / (10! 10!) (7/64)^10 = 0.00095,
    # so 7/8 becomes 921 and is cut off at 500, and -1/8 becomes -132 and stays. At p = 1/2: f = 21! / (10! 10!) / 4^10.
    one = with_moments(0.5, 1 / 244, cap=500.0)
    unit_NK, group_N = batch([[1, 0, 0, 0, 0, 0, 0, 0], [1, 0], [NAN, NAN]])
    times = math.factorial(21) / math.factorial(10) ** 2
    low, half = -1 / 8 / (times * (7 / 64) ** 10), 1 / 2 / (times / 4**10)
    assert column(normalized(one, unit_NK, group_N)) == pytest.approx([500, *[low] * 7, half, -half, 0, 0])
    assert low == pytest.approx(-131.5, abs=0.1)
    # One of the ten rows that have the reward.
    assert one.metrics()["beta/capped/correct"] == pytest.approx(0.1)


def test_a_density_that_underflows_gives_the_cap():
    # a = b = 1e6: the density of Beta(333,334, 333,334) at 1/8 is 0 in any float.
    one = with_moments(0.5, 0.25 / (2e6 + 1), cap=3.0)
    unit_NK, group_N = batch([[1, 0, 0, 0, 0, 0, 0, 0], [0.125] * 3])
    assert column(one.densities(unit_NK, group_N)) == [0.0] * 11
    assert column(normalized(one, unit_NK, group_N)) == [3.0, *[-3.0] * 7, 0, 0, 0]
    assert one.metrics()["beta/capped/correct"] == pytest.approx(8 / 11)


def test_the_posterior_mean_does_not_need_the_cap_there():
    one = with_moments(0.5, 0.25 / (2e6 + 1), "beta_binomial", cap=3.0)
    unit_NK, group_N = batch([[1, 0, 0, 0, 0, 0, 0, 0]])
    values = column(normalized(one, unit_NK, group_N))
    assert 0 < values[0] < 1 and one.metrics()["beta/capped/correct"] == 0.0


# Over batches


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_m_and_v_are_averaged_and_not_alpha_and_beta(estimator):
    one = normalizer(estimator, smoothing=0.5)
    batches = [batch([[1, 0, 0, 0], [1, 1, 1, 0]]), batch([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])]
    seen = []
    for unit_NK, group_N in batches:
        alone = normalizer(estimator)
        alone.observe(unit_NK, group_N)
        seen.append((alone.metrics()["beta/m/correct"], alone.metrics()["beta/v/correct"]))
        one.observe(unit_NK, group_N)
    # The old has the weight 1/2 * 1/2, the new 1/2: of 3/4.
    m, v = ((first + 2 * second) / 3 for first, second in zip(*seen, strict=True))
    size = m * (1 - m) / v - 1
    metrics = one.metrics()
    assert (metrics["beta/m/correct"], metrics["beta/v/correct"]) == pytest.approx((m, v))
    assert size > 0
    assert metrics["beta/alpha/correct"] == pytest.approx(1 + size * m / 3)
    assert metrics["beta/beta/correct"] == pytest.approx(1 + size * (1 - m) / 3)


def test_negative_variances_count_in_the_average():
    one = normalizer("beta_binomial", smoothing=0.5)
    one.observe(*batch([[1, 0], [0, 1]]))  # v = -0.25, see test_normalization
    one.observe(*batch([[1, 1], [0, 0]]))  # v = 0.5
    assert one.metrics()["beta/v/correct"] == pytest.approx((-0.25 + 2 * 0.5) / 3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_without_a_reward_leaves_its_averages_alone(estimator):
    one = normalizer(estimator, ("correct", "style"), smoothing=0.9)
    one.observe(*batch([[1, 0], [1, 1]], [[0.1, 0.3], [0.5, 0.6]]))
    before = one.metrics()
    one.observe(*batch([[1, 0], [0, 1]], [[NAN, NAN], [NAN, NAN]]))
    after = one.metrics()
    assert {name: value for name, value in after.items() if name.endswith("style")} == {
        name: value for name, value in before.items() if name.endswith("style")
    }
    assert after["beta/m/correct"] != before["beta/m/correct"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_prompt_moves_m_and_leaves_v(estimator):
    one = normalizer(estimator, smoothing=0.5)
    one.observe(*batch([[1, 0, 0, 0], [1, 1, 1, 0]]))
    before = one.metrics()
    one.observe(*batch([[1, 1, 1, 0]]))
    after = one.metrics()
    assert after["beta/v/correct"] == before["beta/v/correct"]
    assert after["beta/m/correct"] > before["beta/m/correct"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_normalizing_again_changes_nothing(estimator):
    one = normalizer(estimator, smoothing=0.9)
    unit_NK, group_N = batch([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]])
    one.observe(unit_NK, group_N)
    first = normalized(one, unit_NK, group_N)
    state, metrics = one.state_dict(), one.metrics()
    assert torch.equal(normalized(one, unit_NK, group_N), first)
    assert (one.state_dict(), one.metrics()) == (state, metrics)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_resumed_normalizer_goes_on_exactly(estimator):
    names = ("correct", "style")
    batches = [
        batch([[1, 0, 1], [0, 0, 1]], [[0.1, 0.9, 0.3], [0.2, NAN, 0.3]]),
        batch([[1, 1, 1], [0, 1, 1], [0, 0]], [[NAN] * 3, [0.3, 0.3, 0.8], [NAN, 0.5]]),
        batch([[1, 0], [1, 1]], [[NAN, NAN], [NAN, NAN]]),
    ]
    through = normalizer(estimator, names, smoothing=0.9)
    stopped = normalizer(estimator, names, smoothing=0.9)
    for unit_NK, group_N in batches[:2]:
        through.observe(unit_NK, group_N)
        stopped.observe(unit_NK, group_N)
    resumed = normalizer(estimator, names, smoothing=0.9)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.observed
    for one in (through, resumed):
        one.observe(*batches[2])
        normalized(one, *batches[2])
    assert resumed.metrics() == through.metrics()


def test_the_state_of_other_rewards_is_refused():
    with pytest.raises(RunError, match=r"rewards \['correct'\], and the recipe has \['correct', 'style'\]"):
        normalizer(names=("correct", "style")).load_state_dict(normalizer().state_dict())
