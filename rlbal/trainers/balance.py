"""How the rewards of a batch become its advantages, and what is learned from doing so: the recipe's `weighting` and
`advantage` sections at work.

    scores -> hypervolume factor      prompts' means -> Beta density      weights of this step      -> advantages
    (all of it pure, in rlbal.balance; here it is put together and its state kept)
"""

from typing import Any

import torch

from rlbal.balance.advantages import AdvantageRule, compute_advantages, reward_advantages
from rlbal.balance.gradients import GradientWeighting
from rlbal.balance.hypervolume import HypervolumeWeighting
from rlbal.balance.normalization import BetaNormalizer, to_unit_interval
from rlbal.balance.weighting import FixedWeighting, ScheduledWeighting, Weighting
from rlbal.balance_sections import TOKENS, GradientWeights, HypervolumeWeights, ScheduledWeights
from rlbal.batch import RolloutBatch, prompt_mean
from rlbal.errors import RunError
from rlbal.recipe import Recipe


class RewardBalance:
    """Weights, normalization and advantages of one run.

    Args:
        recipe: the run's recipe.
        max_length: longest completion in tokens, the range of the objective `tokens`.
    """

    def __init__(self, recipe: Recipe, max_length: int) -> None:
        functions, advantage = recipe.rewards.functions, recipe.advantage
        self.names, self.section = list(functions), recipe.weighting
        self.rule = AdvantageRule(**advantage.model_dump(exclude={"beta", "aggregation"}))
        ranges = [spec.range for spec in functions.values()]
        self.ranges_K2 = torch.tensor(ranges).double() if all(ranges) else None
        self.weighting = make_weighting(recipe, max_length)
        self.by_prompt = advantage.aggregation == "prompt"
        self.weights_K = self.weighting.weights(0.0)
        self.batches = 0
        self.beta: BetaNormalizer | None = None
        if advantage.beta is not None:
            settings = advantage.beta
            self.beta = BetaNormalizer(self.names, settings.estimator, settings.resolved_smoothing, settings.cap)

    def advantages(self, batch: RolloutBatch, progress: float) -> torch.Tensor:
        """Advantages of a generation batch with the weights of this moment, shape (N,).

        Args:
            batch: over all processes.
            progress: share of the run that is done, 0 to 1.

        Raises:
            RewardError: an objective of hypervolume weighting has never been scored.
        """
        self._begin(batch, progress)
        if self.beta is not None:
            assert self.ranges_K2 is not None  # the recipe has seen to it
            self.beta.observe(to_unit_interval(batch.rewards_NK.double(), self.ranges_K2), batch.group_N)
        rewards_NK = batch.rewards_NK.double() * self.factor_on("rewards")
        advantages_N = compute_advantages(
            rewards_NK, batch.group_N, self.weights_K, self.rule, self.ranges_K2, self.beta
        )
        return advantages_N * self.factor_on("advantages")

    def returns(self, batch: RolloutBatch, progress: float) -> torch.Tensor:
        """Rewards as they are, weighed and summed with the weights of this moment, shape (N,): what a critic learns to
        expect.

        A missing reward counts as that reward's mean over the batch, so that it says nothing; as 0 if none is there.
        """
        self._begin(batch, progress)
        rewards_NK = batch.rewards_NK.double()
        means_K = rewards_NK.nanmean(dim=0).nan_to_num(0.0)
        return (torch.where(rewards_NK.isnan(), means_K, rewards_NK) * self.weights_K).sum(dim=1)

    def _begin(self, batch: RolloutBatch, progress: float) -> None:
        """Count the batch, and settle the weights of this moment."""
        self.batches += 1
        if isinstance(self.section, HypervolumeWeights) and self.section.source == "train":
            self._observe_scores(_training_scores(batch, self.names, self.by_prompt))
        self.weights_K = self.weighting.weights(progress)

    def reward_advantages(self, batch: RolloutBatch) -> torch.Tensor:
        """What the advantages would be for each reward alone, 0 for rewards of weight 0: (N, K)."""
        own_NK = reward_advantages(batch.rewards_NK.double(), batch.group_N, self.rule, self.ranges_K2, self.beta)
        return own_NK * (self.weights_K > 0)

    @property
    def probe_is_due(self) -> bool:
        """Whether the batch whose advantages were computed last is one to compare gradients on."""
        section = self.section
        return isinstance(section, GradientWeights) and (self.batches - 1) % section.interval == 0

    def observe_gram(self, gram_KK: torch.Tensor) -> None:
        """Inner products of the rewards' gradients over an optimizer step, shape (K, K)."""
        assert isinstance(self.weighting, GradientWeighting)
        self.weighting.observe(gram_KK)

    def observe_evaluation(self, metrics: dict[str, float]) -> None:
        """The metrics of an evaluation of the policy as it is (see `rlbal.evaluation.Evaluation`)."""
        if isinstance(self.section, HypervolumeWeights) and self.section.source == "validation":
            rewards = {name: metrics[f"reward/{name}"] for name in self.names}
            self._observe_scores({TOKENS: metrics["length/mean"], **rewards})

    def _observe_scores(self, scores: dict[str, float]) -> None:
        assert isinstance(self.weighting, HypervolumeWeighting) and isinstance(self.section, HypervolumeWeights)
        self.weighting.observe({name: scores[name] for name in self.section.objectives})

    def factor_on(self, what: str) -> float:
        """The factor of hypervolume weighting if `what` is what it multiplies, else 1."""
        return self.weighting.factor if getattr(self.section, "apply", None) == what else 1.0

    def metrics(self) -> dict[str, float]:
        return self.weighting.metrics() | (self.beta.metrics() if self.beta is not None else {})

    def tables(self) -> dict[str, Any]:
        """What metrics.jsonl says beyond single numbers."""
        return self.weighting.tables()

    def state_dict(self) -> dict[str, Any]:
        beta = self.beta.state_dict() if self.beta is not None else {}
        learned = {"weighting": self.weighting.state_dict(), "beta": beta}
        return {"learned_with": self._learned_with(), "batches": self.batches, **learned}

    def _learned_with(self) -> dict[str, Any]:
        """The recipe keys without which the state means something else."""
        keys: dict[str, Any] = {"weighting.method": self.section.method, "rewards.functions": self.names}
        keys["advantage.scale"] = "beta" if self.beta is not None else "not beta"
        if isinstance(self.weighting, HypervolumeWeighting):
            keys["weighting.objectives"] = dict(self.weighting.objectives)
            keys["the ranges of the objectives"] = {name: list(ends) for name, ends in self.weighting.ranges.items()}
        return keys

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            RunError: the recipe has changed in what the state depends on.
        """
        for key, now in self._learned_with().items():
            if (then := state["learned_with"].get(key)) != now:
                raise RunError(
                    f"the run cannot be resumed: its checkpoint was written with `{key}` {then}, and now it is {now}",
                    why="what was learned about the rewards would mean something else",
                    fix="resume with the recipe in the run's directory, or start afresh with --overwrite",
                )
        self.batches = state["batches"]
        self.weighting.load_state_dict(state["weighting"])
        if self.beta is not None:
            self.beta.load_state_dict(state["beta"])


def make_weighting(recipe: Recipe, max_length: int) -> Weighting:
    """The recipe's `weighting:`."""
    functions, section = recipe.rewards.functions, recipe.weighting
    weights = [spec.weight for spec in functions.values()]
    if isinstance(section, ScheduledWeights):
        return ScheduledWeighting(weights, [section.points.get(name) for name in functions])
    if isinstance(section, GradientWeights):
        return GradientWeighting(
            weights, list(functions), section.step_size, section.floor, section.cap, section.gradient_scale
        )
    if isinstance(section, HypervolumeWeights):
        ranges = {name: spec.range for name, spec in functions.items()}
        ranges = {TOKENS: (0.0, float(max_length)), **ranges}
        return HypervolumeWeighting(
            weights,
            dict(section.objectives),
            {name: found for name in section.objectives if (found := ranges[name]) is not None},
            section.resolved_smoothing,
        )
    return FixedWeighting(weights)


def _training_scores(batch: RolloutBatch, names: list[str], by_prompt: bool) -> dict[str, float]:
    """Mean of every reward over the rows that have it (NaN if none has), and of the completions' lengths.

    By prompt where prompts weigh alike: otherwise the scores would fall when hard prompts get more rows.
    """
    if by_prompt:
        columns = {TOKENS: batch.completion_tokens_N.double(), **dict(zip(names, batch.rewards_NK.T, strict=True))}
        return {name: prompt_mean(values_N, batch.group_N) for name, values_N in columns.items()}
    means = batch.rewards_NK.double().nanmean(dim=0).tolist()
    tokens = batch.completion_tokens_N.double().mean().item()
    return {TOKENS: tokens, **dict(zip(names, means, strict=True))}
