"""Which process generates which rollout."""

import numpy as np
import numpy.typing as npt


def deal(expected_P: npt.ArrayLike, counts_P: npt.ArrayLike, processes: int) -> npt.NDArray[np.int64]:
    """Deal rollouts to processes: equally many each, and about equally many expected tokens.

    Rollouts are dealt by falling expected length, to and fro over the processes. So the expected tokens of any two
    processes differ by no more than the longest and the shortest rollout do. Rollouts of one prompt may lie on several
    processes; on each they are next to one another.

    Args:
        expected_P: expected tokens of one rollout of each prompt, shape (P,).
        counts_P: rollouts of each prompt, shape (P,).
        processes: number of processes.

    Returns:
        prompts (N,), 0..P-1, the rows of the first process first.

    Raises:
        ValueError: the rollouts do not divide over the processes, or an expected length is NaN.
    """
    expected_P, counts_P = np.asarray(expected_P, dtype=np.float64), np.asarray(counts_P)
    total = int(counts_P.sum())
    if total % processes:
        raise ValueError(f"{total} rollouts do not divide over {processes} processes")
    if np.isnan(expected_P).any():
        raise ValueError("the expected length of a prompt is NaN")
    longest_first_P = np.argsort(-expected_P, kind="stable")
    rounds = np.repeat(longest_first_P, counts_P[longest_first_P]).reshape(-1, processes)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return np.sort(rounds.T, axis=1).reshape(-1)
