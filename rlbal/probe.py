"""A few real rollouts with the training settings, before training starts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlbal.check_report import figure
from rlbal.gold import means
from rlbal.recipe import EvaluationSection, Recipe
from rlbal.scoring import Table, score_texts

if TYPE_CHECKING:
    from trl import GRPOConfig

    from rlbal.rewards.suite import RewardSuite

PROMPTS, ROLLOUTS = 8, 8


@dataclass(frozen=True)
class ProbeResult:
    """What the rollouts were like.

    Attributes:
        prompts, rollouts: how many in all.
        truncated: share of rollouts without an end.
        dead_groups: share of prompts whose rollouts all have the same success reward, or none.
        means: reward -> mean, NaN where it scored nothing.
    """

    prompts: int
    rollouts: int
    truncated: float
    dead_groups: float
    means: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        means = {name: figure(mean) for name, mean in self.means.items()}
        shares = {"truncated": self.truncated, "dead_groups": self.dead_groups}
        return {"prompts": self.prompts, "rollouts": self.rollouts, **shares, "means": means}


def probe(
    recipe: Recipe, args: "GRPOConfig", suite: "RewardSuite", table: Table, limit: int, model: Any, tokenizer: Any
) -> ProbeResult:
    """Sample and score rollouts.

    Args:
        table: rows as columns, with the budget that they are to have.
        limit: longest completion in tokens.

    Raises:
        RlbalError: the model cannot generate for them.
    """
    from rlbal.sampling import generate_samples
    from rlbal.trainer_args import chat_options

    count = min(ROLLOUTS, max(2, recipe.algorithm.rollouts_per_prompt))
    settings = EvaluationSection(
        samples_per_prompt=count, temperature=args.temperature, top_p=args.top_p, top_k=max(args.top_k, 0)
    )
    samples = generate_samples(
        model,
        tokenizer,
        table["prompt"],
        settings,
        max_new_tokens=limit,
        seed=recipe.seed,
        progress=True,
        chat_template_kwargs=chat_options(args),
    )
    flat = [sample for row in samples for sample in row]
    rewards_NK = score_texts(suite, table, [one.text for one in flat], [one.ids for one in flat])
    success_PG = rewards_NK[:, suite.names.index(recipe.rewards.success_name)].reshape(len(samples), count)
    spread_P = np.fmax.reduce(success_PG, axis=1) - np.fmin.reduce(success_PG, axis=1)
    return ProbeResult(
        prompts=len(samples),
        rollouts=len(flat),
        truncated=float(np.mean([one.truncated for one in flat])),
        dead_groups=float(np.mean(~(spread_P > 0))),
        means=dict(zip(suite.names, means(rewards_NK), strict=True)),
    )
