"""The gain of one more rollout: against numerical integration, exact fractions, and the values they are gains of."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import betaln

from rlbal.prompts.allocation import beta_moment, mean_gains, posterior_gains

GAINS = {
    "knapsack": lambda n, p: p ** (n + 1) * (1 - p) ** 3 + p**2 * (1 - p) ** (n + 2),
    "variance": lambda n, p: p * (1 - p) * (1 / n - 1 / (n + 1)),
    "nonzero": lambda n, p: p**n * (1 - p) + (1 - p) ** n * p,
}
# The values of n rollouts that these are the differences of.
WORTH = {
    "knapsack": lambda n, p: (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2,
    "variance": lambda n, p: -p * (1 - p) / n,
    "nonzero": lambda n, p: 1 - p**n - (1 - p) ** n,
}
AT = [1, 2, 3, 8, 30, 127]


def table(gains, last):
    """Gains at n = 1..last: (last, P)."""
    rows = []
    for _ in range(last):
        rows.append(gains.now())
        gains.advance()
    return np.array(rows)


@pytest.mark.parametrize("value", GAINS)
def test_gains_at_known_rates_are_differences_of_values(value):
    p_P = np.array([0.0, 0.125, 0.5, 0.9, 1.0])
    gain_NP = table(mean_gains(value, p_P), 127)
    for n in AT:
        np.testing.assert_allclose(gain_NP[n - 1], GAINS[value](n, p_P), rtol=1e-13, atol=1e-300)
        np.testing.assert_allclose(gain_NP[n - 1], WORTH[value](n + 1, p_P) - WORTH[value](n, p_P), atol=1e-15)


@pytest.mark.parametrize("value", GAINS)
@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.1, 7.0), (8.5, 0.5), (3.0, 4.0), (120.0, 80.0), (0.5, 40.5)])
def test_expected_gains_are_integrals_over_the_belief(value, a, b):
    gain_N = table(posterior_gains(value, np.array([a]), np.array([b])), 127)[:, 0]
    for n in AT:
        # With p = sin(x)^2 the density's poles at 0 and 1 are gone for a, b of 1/2, and milder below.
        def integrand(x, n=n):
            log_density = (2 * a - 1) * math.log(math.sin(x)) + (2 * b - 1) * math.log(math.cos(x))
            return 2 * math.exp(log_density - betaln(a, b)) * GAINS[value](n, math.sin(x) ** 2)

        integral, _ = quad(integrand, 0, math.pi / 2, epsabs=0, epsrel=1e-10, limit=400)
        assert gain_N[n - 1] == pytest.approx(integral, rel=1e-7)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (3.25, 7.5), (1e6, 2e6)])
def test_expected_gains_are_exact_to_the_last_digits(a, b):
    """Against the closed form [B(a+n+1, b+3) + B(a+2, b+n+2)] / B(a, b) in exact fractions."""

    def moment(i, j):
        x, y = Fraction(a), Fraction(b)
        upper = math.prod([x + k for k in range(i)]) * math.prod([y + k for k in range(j)])
        return upper / math.prod([x + y + k for k in range(i + j)])

    gain_N = table(posterior_gains("knapsack", np.array([a]), np.array([b])), 127)[:, 0]
    for n in AT:
        assert gain_N[n - 1] == pytest.approx(float(moment(n + 1, 3) + moment(2, n + 2)), rel=1e-13)
    assert beta_moment(np.array([a]), np.array([b]), 2, 3)[0] == pytest.approx(float(moment(2, 3)), rel=1e-14)


@pytest.mark.parametrize("value", GAINS)
def test_a_sure_belief_gains_what_its_mean_does(value):
    gain_N = table(posterior_gains(value, np.array([3e14]), np.array([7e14])), 127)[:, 0]
    np.testing.assert_allclose(gain_N, table(mean_gains(value, np.array([0.3])), 127)[:, 0], rtol=1e-10)


@pytest.mark.parametrize("value", GAINS)
def test_gains_never_rise(value):
    generator = np.random.default_rng(0)
    a_P, b_P = 10.0 ** generator.uniform(-6, 9, (2, 2000))
    for gains in (posterior_gains(value, a_P, b_P), mean_gains(value, generator.random(2000))):
        gain_NP = table(gains, 300)
        assert (gain_NP >= 0).all() and (np.diff(gain_NP, axis=0) <= 0).all()
        assert np.isfinite(gain_NP).all()


@pytest.mark.parametrize("value", GAINS)
def test_prompts_that_are_let_go_leave_the_others_as_they_were(value):
    a_P, b_P = np.array([0.5, 2.0, 5.0]), np.array([0.5, 3.0, 1.0])
    whole, part = posterior_gains(value, a_P, b_P), posterior_gains(value, a_P, b_P)
    for _ in range(3):
        whole.advance()
        part.advance()
    part.keep(np.array([True, False, True]))
    for _ in range(3):
        whole.advance()
        part.advance()
    np.testing.assert_array_equal(part.now(), whole.now()[[0, 2]])
