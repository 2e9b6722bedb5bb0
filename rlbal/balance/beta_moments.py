"""The Beta distribution with a given mean and variance: the one formula that rewards and prompts share.

`rlbal.balance.normalization` divides rewards by a density that follows from it, and `rlbal.prompts.prior` begins the
belief about a prompt with it. It takes arrays of NumPy and tensors of torch alike.
"""

from typing import Any

# A variance up to this is rounding: equal means can differ in their last bit, which would make a + b about 1e30.
NO_VARIANCE = 1e-12


def beta_concentration(mean: Any, variance: Any) -> Any:
    """a + b of the Beta(a, b) with these moments, m (1 - m) / v - 1; not above 0 where no Beta spreads so far."""
    return mean * (1.0 - mean) / variance - 1.0
