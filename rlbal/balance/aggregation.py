"""How much each row counts in a loss that averages over tokens."""

import numpy as np
import numpy.typing as npt


def prompt_level_factors(tokens_N: npt.ArrayLike, group_N: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """What to multiply advantages by so that a token-mean loss weighs every prompt alike (ScaleRL, arXiv 2510.13786).

    The factor of a row is all tokens / (P * tokens of its group). Without it a prompt counts by the tokens of all its
    rollouts, so that unequal groups change the objective and not only its noise.

    Args:
        tokens_N: completion tokens of each row that are in the loss, shape (N,).
        group_N: prompt of each row, 0..P-1, shape (N,).

    Returns:
        factors (N,). A prompt without tokens in the loss is not among the P, and its rows get 0.
    """
    tokens_N, group_N = np.asarray(tokens_N, dtype=np.float64), np.asarray(group_N)
    tokens_P = np.bincount(group_N, weights=tokens_N)
    share_P = tokens_N.sum() / max(np.count_nonzero(tokens_P), 1)
    return np.divide(share_P, tokens_P, out=np.zeros_like(tokens_P), where=tokens_P > 0)[group_N]
