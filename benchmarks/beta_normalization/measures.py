"""What makes one normaliser of advantages better than another, with the success probabilities known exactly.

A prompt's rollouts succeed with probability p, p is Beta(a, b) over prompts, and A = (r - p) / f(p). A rollout's score
(the gradient of its log-probability) is

    s = lambda(p) (r - p) u + noise          u: a direction that all prompts share

with noise that does not depend on the reward. A completion's score is a sum over hundreds of tokens and the reward is
one bit, so the noise makes the variance: Var = E[A^2] |noise|^2 = E[p(1-p) / f(p)^2] |noise|^2, which is the paper's
quantity (its assumption is that the score's norm is uncorrelated with the advantage).

variance         E[p(1-p) / f(p)^2] among densities f. Scale is fixed by the integral of f over [0, 1] being 1, without
                 which a larger f would always win. Minimised by alpha = 1 + a/3, beta = 1 + b/3: the paper's theorem.
                 (By Lagrange, f^3 is proportional to p(1-p) times the density of p: best among all densities.)
log_odds         E[A^2] / E[A (r - p)]^2, that is lambda = 1: a step along u moves the log-odds of all prompts alike.
correlation      The same with lambda = 1 / sqrt(p(1-p)): score and reward correlate alike at every p.

The last two are the variance over the squared length of the expected gradient, the number of prompts it takes for a
gradient of a given relative error. Whatever multiplies all A cancels, so they need no convention about the scale. By
Cauchy and Schwarz the least they can be is reached by A proportional to lambda(p) (r - p): by REINFORCE (f = 1) for
log_odds, and by GRPO (f ~ sqrt(p(1-p))) for correlation.
"""

import numpy as np
from scipy.special import betainc, betaln

MEASURES = ("variance", "log_odds", "correlation")


def moment(a: float, b: float, x: float, y: float) -> float:
    """E[p^x (1-p)^y] for p ~ Beta(a, b); infinite where the integral is."""
    if a + x <= 0 or b + y <= 0:
        return float("inf")
    return float(np.exp(betaln(a + x, b + y) - betaln(a, b)))


def exact(a: float, b: float, alpha: float, beta: float) -> dict[str, float]:
    """The three measures of the density Beta(alpha, beta) for prompts with p ~ Beta(a, b)."""
    normaliser = float(np.exp(betaln(alpha, beta)))
    square = normaliser**2 * moment(a, b, 3 - 2 * alpha, 3 - 2 * beta)
    log_odds = normaliser * moment(a, b, 2 - alpha, 2 - beta)
    correlation = normaliser * moment(a, b, 1.5 - alpha, 1.5 - beta)
    return {"variance": square, "log_odds": square / log_odds**2, "correlation": square / correlation**2}


def divisor_integral(a: np.ndarray, b: np.ndarray, rollouts: int) -> np.ndarray:
    """Integral over sampled means p of f at their posterior mean (a + n p) / (a + b + n).

    Taken at another point, f is no density of p any more; dividing by this makes it one, so that `variance` compares
    like with like.
    """
    size, alpha, beta = a + b, 1 + a / 3, 1 + b / 3
    inside = betainc(alpha, beta, (a + rollouts) / (size + rollouts)) - betainc(alpha, beta, a / (size + rollouts))
    return inside * (size + rollouts) / rollouts
