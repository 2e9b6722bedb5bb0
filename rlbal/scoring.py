"""Samples of prompts and their raw scores, gathered over processes. What they mean, `rlbal.evaluation` says."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from rlbal.rewards.loading import MEAN_LENGTH
from rlbal.rewards.outcomes import Failure, Reason
from rlbal.scoring_stats import Array

Prompt = str | list[dict[str, Any]]
Table = dict[str, list[Any]]  # rows as columns, `prompt` among them
# One process's rows -> the rows of all processes, in order of process.
Gather = Callable[[Array], Array]

EXAMPLES = 4


class Sample(NamedTuple):
    """One completion: token ids with the end token if there is one, the text without special tokens."""

    ids: list[int]
    text: str
    truncated: bool


class Suite(Protocol):
    """What evaluation needs of `rlbal.rewards.RewardSuite`."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the K rewards."""

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: dict[str, list[Any]]
    ) -> NDArray[np.floating[Any]]:
        """(N, K) raw rewards, NaN where a reward is missing."""

    def take_failures(self) -> list[Failure]:
        """What failed in this process since the last call."""


class Share:
    """One process's share of the rows: every `num_processes`-th, wrapping round so that all have equally many.

    Args:
        count: P, the rows of all processes.
        gather: collects rows over processes; None on a single one.

    Attributes:
        positions: of this process's rows among all.
    """

    def __init__(self, count: int, gather: Gather | None = None, process_index: int = 0, num_processes: int = 1):
        self.count, self.num_processes = count, num_processes
        self.gather: Gather = gather or (lambda rows: rows)
        per_process = math.ceil(count / num_processes)
        self.positions = [(process_index + turn * num_processes) % count for turn in range(per_process)]

    def in_order(self, local: Array) -> Array:
        """All processes' rows, each at its position; rows that pad a share fall on their twins.

        Args:
            local: this process's rows, first axis as `positions`.

        Returns:
            The same with a first axis of P.
        """
        position_P1 = np.array(self.positions, dtype=float)[:, None]
        gathered = self.gather(np.concatenate([position_P1, local.reshape(len(self.positions), -1)], axis=1))
        scores = np.full((self.count, gathered.shape[1] - 1), np.nan)
        scores[gathered[:, 0].astype(int)] = gathered[:, 1:]
        return scores.reshape(self.count, *local.shape[1:])

    def failures(self, suite: Suite) -> list[Failure]:
        """Failures over all processes, from counts alone; the examples are this process's own."""
        found = {(failure.reward, failure.reason): failure for failure in suite.take_failures()}
        kinds = [(name, reason) for name in suite.names for reason in get_args(Reason)]
        counts = np.array([[found[kind].count if kind in found else 0 for kind in kinds]], dtype=float)
        return [
            Failure(*kind, int(total), found[kind].example if kind in found else "failed on another process")
            for kind, total in zip(kinds, self.gather(counts).sum(axis=0), strict=True)
            if total
        ]


def score_texts(
    suite: Suite, table: Table, texts: list[str], ids: list[list[int]], mean_length: float | None = None
) -> Array:
    """Score completions outside TRL, in one call, so that rewards relative to the batch see all of it.

    Args:
        suite: the K rewards.
        table: P rows as columns, `prompt` among them.
        texts: P x S completions, the S of a row one after another.
        ids: their tokens.
        mean_length: mean completion length in tokens over all processes; default over these.

    Returns:
        (P * S, K) raw rewards, NaN where missing.
    """
    per_row = len(texts) // len(table["prompt"])
    columns = {name: [value for value in values for _ in range(per_row)] for name, values in table.items()}
    prompts = columns.pop("prompt")
    completions: list[Any] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    if mean_length is None:
        mean_length = sum(map(len, ids)) / len(ids)
    columns[MEAN_LENGTH] = [mean_length] * len(texts)
    return np.asarray(suite.score(prompts, completions, ids, columns), dtype=float)


def score_samples(
    suite: Suite, table: Table, samples: list[list[Sample]], share: Share
) -> tuple[Array, list[dict[str, Any]]]:
    """Score this process's samples; rewards see the mean length over all processes.

    Args:
        suite: the K rewards.
        table: this process's rows as columns.
        samples: S samples of each row.
        share: which rows these are.

    Returns:
        (rows, S, K + 2): rewards, length in tokens, 1 if truncated; and the first sample of the first rows to show.
    """
    flat = [sample for row in samples for sample in row]
    lengths = np.array([[len(sample.ids), sample.truncated] for sample in flat], dtype=float)
    mean_length = share.in_order(lengths[:, 0].reshape(len(samples), -1)).mean()
    rewards_NK = score_texts(
        suite, table, [sample.text for sample in flat], [sample.ids for sample in flat], float(mean_length)
    )
    scores_PSK = np.concatenate([rewards_NK, lengths], axis=1).reshape(len(samples), len(samples[0]), -1)
    examples = [
        {
            "prompt": table["prompt"][row],
            "completion": samples[row][0].text,
            "rewards": dict(zip(suite.names, scores_PSK[row, 0, :-2].tolist(), strict=True)),
            "truncated": samples[row][0].truncated,
        }
        for row in range(min(EXAMPLES, len(samples)))
    ]
    return scores_PSK, examples
