"""Larger steps while the scores reach new ground.

After the hypervolume-guided weighting of arXiv 2509.11452, changed where that does nothing. Each observation is one
score per objective, mapped to s in [0, 1]^M by the objective's declared range, 1 best. A buffer keeps the scores that
no other score dominates, and the hypervolume HV is the volume of the union of their boxes [0, s]:

    dHV      = HV(buffer + s) - HV(buffer)             the part of s's box that the buffer does not cover
    relative = dHV / mean of every dHV so far, this one included           (0 / 0 counts as 0)
    factor   = 0.5 + 1.5 tanh(relative)                in [0.5, 2); s joins the buffer when dHV > 0

The rewards' weights stay as they are; the factor says how large this step should be. Three ways for it to do nothing:

1. The paper multiplies the rewards by it, and GRPO's division by the group's deviation cancels any common factor.
2. On the advantages, Adam cancels a constant factor and nearly cancels a slow one, and so does gradient clipping.
   Hence `weighting.apply: learning_rate`, where it acts in full.
3. With raw scores in [0, 1], the first score as the reference point and no division by the mean, the gains are so small
   that the factor stays at 0.500; raw token counts have gains so large that it sticks at 2. Hence ranges, the worst
   corner as the reference, and gains relative to their mean.

With no signal: before the first observation, and after it (nothing to compare with), the factor is 1. Scores that reach
nothing new, constant ones among them, give 0.5. A score at the worst end of any range has a box without volume.
"""

import math
from collections.abc import Mapping
from typing import Any

import moocore
import numpy as np

from rlbal.balance.weighting import FixedWeighting
from rlbal.errors import RewardError, RunError

ROUNDING = 1e-12  # a gain below this is rounding: HV is at most 1 and exact to about 1e-15 for each point


def hypervolume(points_SM: np.ndarray) -> float:
    """Volume of the union of the boxes from the worst corner 0…0 to each point.

    Args:
        points_SM: S points of M objectives scaled to [0, 1] with 1 best, shape (S, M); S may be 0.
    """
    return float(moocore.hypervolume(points_SM, ref=0.0, maximise=True)) if len(points_SM) else 0.0


def nondominated(points_SM: np.ndarray) -> np.ndarray:
    """The points that no other point equals or exceeds in every objective, each once: (S, M) -> (≤ S, M)."""
    return points_SM[moocore.is_nondominated(points_SM, maximise=True)] if len(points_SM) else points_SM


def hypervolume_gain(points_SM: np.ndarray, score_M: np.ndarray) -> float:
    """HV(points + score) − HV(points), 0 where it is rounding.

    Within the box of the score, each point covers the box of their minimum; the gain is what is left. This is cheaper
    and more exact than the difference of two hypervolumes, most of all with many points of 5 or 6 objectives.
    """
    covered = hypervolume(nondominated(np.minimum(points_SM, score_M)))
    gain = float(score_M.prod()) - covered
    return gain if gain > ROUNDING else 0.0


class HypervolumeWeighting(FixedWeighting):
    """The module's factor, from the scores that `observe` is given. The weights are fixed.

    Args:
        weights: the recipe's weight of each reward.
        objectives: name of each objective to `max` or `min`, 2 to 6 of them.
        ranges: [low, high] of every objective's raw score.
        smoothing: share of the old in the moving average of the scaled scores, for scores of training batches;
            0 takes each score as it is.
    """

    def __init__(
        self,
        weights: list[float],
        objectives: dict[str, str],
        ranges: dict[str, tuple[float, float]],
        smoothing: float,
    ) -> None:
        super().__init__(weights)
        self.objectives, self.ranges, self.smoothing = objectives, ranges, smoothing
        self.averages = {name: _Average(smoothing) for name in objectives}
        self.buffer_SM = np.empty((0, len(objectives)))
        self.observed = False
        self.value = self.gain = self.total_gain = 0.0
        self.num_gains = 0
        self._factor = 1.0

    @property
    def factor(self) -> float:
        """0.5 to 2, and 1 until there are two observations. It stays until the next one."""
        return self._factor

    def observe(self, scores: Mapping[str, float | None]) -> None:
        """Compare the newest scores with the buffer and set `factor`.

        Args:
            scores: raw mean score of each objective, None or NaN where every row is missing. Such an objective keeps
                its last (averaged) score.

        Raises:
            RewardError: an objective that has never had a score.
        """
        present = {name: score for name, score in scores.items() if score is not None and not math.isnan(score)}
        for name, average in self.averages.items():
            if name not in present and average.weight == 0:
                raise RewardError(
                    f"the objective `{name}` of `weighting.objectives` was never scored: every score is missing",
                    why="the hypervolume needs a score of every objective",
                    fix=f"find out why the reward `{name}` returns None, or take it out of `weighting.objectives`",
                )
        for name, average in self.averages.items():
            if name in present:
                average.add(self._scaled(name, present[name]))
        score_M = np.array([average.value for average in self.averages.values()])
        self.gain = hypervolume_gain(self.buffer_SM, score_M)
        self.value += self.gain
        if self.observed:
            self.total_gain += self.gain
            self.num_gains += 1
            relative = self.gain / (self.total_gain / self.num_gains) if self.gain else 0.0
            self._factor = 0.5 + 1.5 * math.tanh(relative)
        if self.gain or not self.observed:
            self.buffer_SM = nondominated(np.vstack([self.buffer_SM, score_M]))
        self.observed = True

    def _scaled(self, name: str, score: float) -> float:
        low, high = self.ranges[name]
        scaled = (score - low) / (high - low)
        return min(1.0, max(0.0, scaled if self.objectives[name] == "max" else 1.0 - scaled))

    def metrics(self) -> dict[str, float]:
        numbers = {
            "hypervolume/value": self.value,
            "hypervolume/delta": self.gain,
            "hypervolume/factor": self.factor,
            "hypervolume/points": float(len(self.buffer_SM)),
        }
        scored = {name: average.value for name, average in self.averages.items() if self.observed}
        return numbers | {f"hypervolume/score/{name}": score for name, score in scored.items()}

    def tables(self) -> dict[str, Any]:
        """The buffer when it has changed: one row per point, its columns in the order of the objectives."""
        changed = self.gain > 0 or (self.observed and self.num_gains == 0)
        return {"hypervolume/buffer": self.buffer_SM.tolist()} if changed else {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "objectives": list(self.objectives),
            "buffer": self.buffer_SM.tolist(),
            "averages": [[average.total, average.weight] for average in self.averages.values()],
            "observed": self.observed,
            "value": self.value,
            "gain": self.gain,
            "total_gain": self.total_gain,
            "num_gains": self.num_gains,
            "factor": self._factor,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            RunError: the state is of another method or of other objectives.
        """
        if state.get("objectives") != list(self.objectives):
            raise RunError(
                f"the checkpoint's weighting has the objectives {state.get('objectives')}, and "
                f"`weighting.objectives` has {list(self.objectives)}",
                why="its buffer of scores cannot be continued with others",
                fix="resume with the recipe the run was started with, or start afresh with --overwrite",
            )
        self.buffer_SM = np.array(state["buffer"], dtype=float).reshape(-1, len(self.objectives))
        for average, saved in zip(self.averages.values(), state["averages"], strict=True):
            average.total, average.weight = saved
        self.observed, self.value, self.gain = state["observed"], state["value"], state["gain"]
        self.total_gain, self.num_gains, self._factor = state["total_gain"], state["num_gains"], state["factor"]


class _Average:
    """Exponential moving average without the pull of its start at 0: total / weight, both decayed alike."""

    def __init__(self, smoothing: float) -> None:
        self.smoothing, self.total, self.weight = smoothing, 0.0, 0.0

    def add(self, value: float) -> None:
        self.total = self.smoothing * self.total + (1.0 - self.smoothing) * value
        self.weight = self.smoothing * self.weight + (1.0 - self.smoothing)

    @property
    def value(self) -> float:
        return self.total / self.weight
