"""What is known of each prompt: how often the policy succeeds at it, when it was last tried, how long answers get.

The belief about the success probability p of a prompt is Beta(a0 + s, b0 + f). s and f are its successes and failures,
a graded success counting in part; each policy update makes them count less by the factor 1 - forgetting. (a0, b0) is
the prior of its stratum (`rlbal.prompts.prior`). Assumed is that p moves slowly against 1 / forgetting updates. Without
a signal (never tried, or never scored) the belief is the prior.

Forgetting is applied when a prompt is read or tried again, from the step at which it was last tried, so that an update
touches the prompts of its batch alone. M prompts are in the data, P of them in a batch of N rows.
"""

from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rlbal.errors import DataError, RunError
from rlbal.prompts.prior import MEMORY, PromptPrior
from rlbal.run import write_whole

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
NEVER = -1
# What is counted of a prompt, side by side since a batch reads and writes all of it. Rows are all rows, scored or not.
SUCCESSES, FAILURES, ROWS, TOKENS = range(4)
MOST_STRATA = 1000
# Adding this and taking it away again leaves multiples of 2^-32, whose sums are exact in any order of the rows.
ROUND = 1.5 * 2.0**20


class PromptLedger:
    """Beliefs about M prompts, the same on every process that observes the same batches.

    Args:
        num_prompts: M.
        forgetting: share of a prompt's counts that a policy update takes away: 0 keeps everything, 1 leaves the last
            visit alone.
        strata: a number for each prompt, equal for prompts that are alike, shape (M,); None if all are.

    Raises:
        DataError: there are too many strata.
        ValueError: the forgetting or the shape is wrong.
    """

    def __init__(self, num_prompts: int, forgetting: float, strata: npt.ArrayLike | None = None) -> None:
        if not 0 <= forgetting <= 1:
            raise ValueError(f"forgetting is a share from 0 to 1, not {forgetting}")
        values_M = np.zeros(num_prompts, dtype=np.int64) if strata is None else np.asarray(strata)
        if values_M.shape != (num_prompts,):
            raise ValueError(f"{num_prompts} prompts need as many strata, not the shape {values_M.shape}")
        self.stratum_values, stratum_M = np.unique(values_M, return_inverse=True)
        if len(self.stratum_values) > MOST_STRATA:
            raise DataError(
                f"`allocation.strata` divides the prompts into {len(self.stratum_values)} kinds",
                why=f"a kind is known by its prompts, and {MOST_STRATA} kinds are the most",
                fix="name a column with few values, such as a level or a source",
            )
        self.forgetting = forgetting
        self.stratum_M = stratum_M.astype(np.int16)
        self.counts_MC = np.zeros((num_prompts, 4), dtype=np.float32)  # as of the step of `last_seen_M`
        self.last_seen_M = np.full(num_prompts, NEVER, dtype=np.int32)
        self.prior = PromptPrior(len(self.stratum_values))
        self.recent_rows_tokens = np.zeros(2)  # of the last batches, as the prior
        self.retired_M = np.zeros(num_prompts, dtype=bool)
        self._place_M = np.zeros(num_prompts, dtype=np.int32)  # for `_group` alone: it need not sort the rows
        self._seen, self._drift = 0, float("nan")

    def observe(
        self, indices_N: npt.ArrayLike, successes_N: npt.ArrayLike, lengths_N: npt.ArrayLike, step: int
    ) -> None:
        """Take in one batch over all processes, its rows in any order.

        Args:
            indices_N: the prompt of each row, 0..M-1.
            successes_N: how far it succeeded, 0 to 1, NaN where it was not scored.
            lengths_N: completion tokens.
            step: policy updates before the batch was generated.

        Raises:
            ValueError: an index or a success out of range, or a step before the prompt's last.
        """
        indices_N = self._checked(indices_N)
        if not len(indices_N):
            return
        success_N, length_N = np.asarray(successes_N, dtype=np.float64), np.asarray(lengths_N, dtype=np.float64)
        scored_N = ~np.isnan(success_N)
        success_N = (np.where(scored_N, success_N, 0.0) + ROUND) - ROUND
        if success_N.min() < 0 or success_N.max() > 1:
            raise ValueError("the success of a row lies in [0, 1]")
        square_N = (success_N**2 + ROUND) - ROUND

        prompts_P, group_N = self._group(indices_N)
        rows_P = np.bincount(group_N).astype(np.float64)
        count_P, success_P, square_P, tokens_P = (
            np.bincount(group_N, weights=values_N).astype(np.float64)
            for values_N in (scored_N, success_N, square_N, length_N)
        )
        old_PC = self._counts(prompts_P, step)
        # With nothing but the last visit kept, it is what was believed.
        known_PC = self._stored(prompts_P) if self.forgetting == 1.0 else old_PC
        self._compare(prompts_P, known_PC, count_P, success_P, square_P)
        self.counts_MC[prompts_P] = old_PC + np.stack([success_P, count_P - success_P, rows_P, tokens_P], axis=1)
        self._seen += int((self.last_seen_M[prompts_P] == NEVER).sum())
        self.last_seen_M[prompts_P] = step
        self.recent_rows_tokens = MEMORY * self.recent_rows_tokens + [rows_P.sum(), tokens_P.sum()]

    def _group(self, indices_N: Ints) -> tuple[Ints, Ints]:
        """The prompts of a batch in ascending order, and which of them each row has: (N,) -> (P,), (N,)."""
        rows_N = np.arange(len(indices_N))
        self._place_M[indices_N] = rows_N  # of the rows of a prompt, one remains
        prompts_P = np.sort(indices_N[self._place_M[indices_N] == rows_N])
        self._place_M[prompts_P] = rows_N[: len(prompts_P)]
        return prompts_P, self._place_M[indices_N].astype(np.int64)

    def _compare(self, prompts_P: Ints, old_PC: Floats, count_P: Floats, success_P: Floats, square_P: Floats) -> None:
        """See how far the scored prompts are from what was believed of them, and move the prior."""
        a_P, b_P = self._posterior(prompts_P, old_PC)
        scored_P = count_P > 0
        rate_P = success_P / np.maximum(count_P, 1)
        again_P = scored_P & (self.last_seen_M[prompts_P] != NEVER)
        self._drift = float((rate_P - a_P / (a_P + b_P))[again_P].mean()) if again_P.any() else float("nan")
        variance_P = np.maximum(square_P - count_P * rate_P**2, 0.0) / np.maximum(count_P - 1, 1)
        stratum_P = self.stratum_M[prompts_P]
        self.prior.observe(stratum_P[scored_P], count_P[scored_P], rate_P[scored_P], variance_P[scored_P])

    def belief(self, indices_P: npt.ArrayLike, step: int | Ints) -> tuple[Floats, Floats]:
        """The a and b of the Beta beliefs, as of a number of policy updates: (P,) -> (P,), (P,).

        Args:
            indices_P: prompts.
            step: policy updates so far, or for each prompt the number as of which it is meant, shape (P,).

        Raises:
            ValueError: an index out of range, or a step before the prompt's last.
        """
        indices_P = self._checked(indices_P)
        return self._posterior(indices_P, self._counts(indices_P, step))

    def outcomes(self, indices_P: npt.ArrayLike, step: int | Ints) -> tuple[Floats, Floats]:
        """The successes and failures behind `belief`, as far as they still count: (P,) -> (P,), (P,).

        Raises:
            ValueError: as `belief`.
        """
        counts_PC = self._counts(self._checked(indices_P), step)
        return counts_PC[:, SUCCESSES], counts_PC[:, FAILURES]

    def success_rates(self, indices_P: npt.ArrayLike) -> Floats:
        """Mean success of each prompt's counts, NaN where there are none: (P,) -> (P,).

        Forgetting does not change it until the prompt is tried again; with forgetting 1 it is that of the last visit.
        """
        counts_PC = self._stored(self._checked(indices_P))
        scored_P = counts_PC[:, SUCCESSES] + counts_PC[:, FAILURES]
        return np.divide(counts_PC[:, SUCCESSES], scored_P, out=np.full_like(scored_P, np.nan), where=scored_P > 0)

    def expected_lengths(self, indices_P: npt.ArrayLike) -> Floats:
        """Mean completion tokens of each prompt; for one never tried, of the last batches: (P,) -> (P,).

        Before the first batch they are all 0.
        """
        counts_PC = self._stored(self._checked(indices_P))
        rows, tokens = self.recent_rows_tokens
        recent_P = np.full(len(counts_PC), tokens / rows if rows else 0.0)
        return np.divide(counts_PC[:, TOKENS], counts_PC[:, ROWS], out=recent_P, where=counts_PC[:, ROWS] > 0)

    def solved(self, indices_P: npt.ArrayLike, at: float, rollouts: float = 8) -> npt.NDArray[np.bool_]:
        """Whether the posterior mean of a prompt is `at` or more, with so many counts at least: (P,) -> (P,) bool.

        Its counts are those of when it was last tried, the prior is the present one.
        """
        indices_P = self._checked(indices_P)
        counts_PC = self._stored(indices_P)
        a_P, b_P = self._posterior(indices_P, counts_PC)
        return (a_P / (a_P + b_P) >= at) & (counts_PC[:, SUCCESSES] + counts_PC[:, FAILURES] >= rollouts)

    def retire(self, indices_P: npt.ArrayLike, at: float) -> None:
        """Decide which of the prompts just tried leave the pool (`retired_M`): those that are `solved`.

        It is decided when a prompt is tried and then stands. Otherwise prompts would come back untried, since the prior
        falls as the easy ones leave.
        """
        self.retired_M[self._checked(indices_P)] = self.solved(indices_P, at)

    def metrics(self) -> dict[str, float]:
        """Share of prompts tried so far, the prior of all prompts (`prior_fitted` 0: Beta(1/2, 1/2) for want of data).

        `drift` is the mean success less the mean believed before, over the prompts of the last batch that had been
        tried earlier: how far the policy has moved on; NaN without such prompts.
        """
        a, b = self.prior.population()
        return {
            "ledger/seen": self._seen / max(len(self.last_seen_M), 1),
            "ledger/prior_a": a,
            "ledger/prior_b": b,
            "ledger/prior_fitted": float(self.prior.fitted),
            "ledger/drift": self._drift,
        }

    def _checked(self, indices: npt.ArrayLike) -> Ints:
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self.last_seen_M):
            raise ValueError(f"prompts are numbered 0 to {len(self.last_seen_M) - 1}")
        return indices

    def _counts(self, indices_P: Ints, step: int | Ints) -> Floats:
        """What is left of the counts of each prompt at a step: (P, C)."""
        last_P = self.last_seen_M[indices_P]
        if (last_P > step).any():
            raise ValueError(f"step {step} is before step {last_P.max()}, at which one of the prompts was tried")
        return np.power(1.0 - self.forgetting, step - last_P)[:, None] * self._stored(indices_P)

    def _stored(self, indices_P: Ints) -> Floats:
        """The counts of each prompt as of its last step: (P, C). `take` is several times faster than brackets."""
        return self.counts_MC.take(indices_P, axis=0).astype(np.float64)

    def _posterior(self, indices_P: Ints, counts_PC: Floats) -> tuple[Floats, Floats]:
        a_H, b_H = self.prior.strata()
        stratum_P = self.stratum_M[indices_P]
        return a_H[stratum_P] + counts_PC[:, SUCCESSES], b_H[stratum_P] + counts_PC[:, FAILURES]

    def state_dict(self) -> dict[str, npt.NDArray]:
        """Everything but the recipe's part, as arrays."""
        return {
            "counts": self.counts_MC,
            "last_seen": self.last_seen_M,
            "stratum": self.stratum_M,
            "prior": self.prior.sums_HS,
            "recent_rows_tokens": self.recent_rows_tokens,
            "retired": self.retired_M,
        }

    def load_state_dict(self, state: dict[str, npt.NDArray]) -> None:
        """Go on from `state_dict`.

        Raises:
            RunError: the state is of other prompts or strata, or no state of a ledger.
        """
        fix = "resume with the data of the run, or start a new one"
        for name, mine in self.state_dict().items():
            least = NEVER if name == "last_seen" else 0
            if name not in state or state[name].dtype != mine.dtype or not _sound(state[name], least):
                raise RunError(f"the checkpoint's ledger has no usable `{name}`", fix="resume from another checkpoint")
            if state[name].shape != mine.shape:
                why = f"`{name}` has the shape {state[name].shape}, not {mine.shape}"
                raise RunError("the checkpoint's ledger is of other data", why, fix)
        if not np.array_equal(state["stratum"], self.stratum_M):
            raise RunError("the checkpoint's ledger divides the prompts otherwise (`allocation.strata`)", fix=fix)
        self.counts_MC, self.last_seen_M = state["counts"].copy(), state["last_seen"].copy()
        self.prior.sums_HS = state["prior"].copy()
        self.recent_rows_tokens, self.retired_M = state["recent_rows_tokens"].copy(), state["retired"].copy()
        self._seen, self._drift = int((self.last_seen_M != NEVER).sum()), float("nan")

    def save(self, path: Path) -> None:
        """Write the ledger as safetensors, whole or not at all."""
        write_whole(path, save(self.state_dict()))

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            RunError: the file cannot be read, or is of other prompts or strata.
        """
        self.load_state_dict(_read(path))

    @classmethod
    def open(cls, path: Path, forgetting: float) -> Self:
        """What `save` wrote, without the data: strata go by their numbers.

        Raises:
            RunError: the file cannot be read, or is no ledger.
        """
        state = _read(path)
        stratum_M = state.get("stratum")
        if stratum_M is None or stratum_M.ndim != 1 or len(np.unique(stratum_M)) > MOST_STRATA:
            raise RunError(f"{path} is not a ledger")
        ledger = cls(len(stratum_M), forgetting, stratum_M)
        ledger.load_state_dict(state)
        return ledger


def _sound(values: npt.NDArray, least: int) -> bool:
    return bool(np.isfinite(values).all() and (values >= least).all())


def _read(path: Path) -> dict[str, npt.NDArray]:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot read the ledger {path}", str(error), "resume from another checkpoint") from None
    except KeyError as error:  # a number format that NumPy does not have, such as BF16
        raise RunError(f"{path} is not a ledger", f"it holds numbers of the kind {error}") from None
