"""What the gradient probe costs, and how well it follows the full gradient. For a machine that does nothing else.

    python benchmarks/balance_rewards/probe.py            # about 15 minutes on 2 cores
    python benchmarks/balance_rewards/probe.py --quick    # does it all work: a few steps; writes nothing
    python benchmarks/balance_rewards/probe.py --only cost

Cost: in one run with `weighting.interval: 2`, every other step is probed, so that both kinds of step meet the same
machine; a probed step is compared with the mean of the steps before and after it. On the recipe's own rollouts (from
the base model that run.py builds), and on scripted ones, equal in every step, with 3, 6 and 12 blocks.

Quality: runs of the recipe steered by the last projection, where each step also takes the full gradient, one backward
pass per reward through the same batch. Spearman's rank correlation over steps of a reward's influence by one and the
other; how often they order the rewards alike; where the weights would be had the full gradient steered on the same
batches; and where they are in a run of the same seed that it did steer.

Writes probe.json beside this file and its tables into README.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from probe_runs import ROOT, StepTimes, recipe_with, scripted, train
from report import LESS_MEAN, fill_probe, write_result
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from rlbal.balance.gradients import GradientWeighting, gram_matrix, influence
from rlbal.prompts.data import load_data
from rlbal.quiet import quiet_libraries
from rlbal.recipe import Recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.trainers.balance import make_weighting
from rlbal.trainers.influence import GradientProbe, WideProbe

FOLDER = Path(__file__).parent
BASE = ROOT / "runs/balance_rewards/base/warm_start"
PROBES = {"last projection": "last_projection", "full gradient, a backward pass per reward": "trainable"}
LAYERS = (3, 6, 12)
# Scripted tokens make no sums, so these have something to tell apart; what a reward says makes no difference to cost.
SCRIPTED_REWARDS = [
    'rewards.functions.correct={function: "benchmarks/overhead/rewards.py:even_share", weight: 1, range: [0, 1]}',
    'rewards.functions.format={function: "benchmarks/overhead/rewards.py:short", weight: 1, range: [0, 1]}',
]


class BothProbes:
    """Steers by the narrow probe and keeps what both find.

    The wide one goes first: its backward passes must be over before the narrow one listens for training's.
    """

    def __init__(self, narrow: GradientProbe, wide: WideProbe) -> None:
        self.narrow, self.wide = narrow, wide
        self.grams: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before_loss(self, inputs: Any) -> None:
        self.wide.before_loss(inputs)
        self.narrow.before_loss(inputs)

    def after_forward(self, logps_BT: torch.Tensor) -> None:
        self.wide.after_forward(logps_BT)
        self.narrow.after_forward(logps_BT)

    def take(self) -> list[torch.Tensor]:
        narrow, wide = self.narrow.take(), self.wide.take()
        if narrow and wide:
            self.grams.append((gram_matrix(narrow), gram_matrix(wide)))
        return narrow


def median_interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Median with its 95 % bootstrap interval."""
    draws = np.random.default_rng(seed).choice(values, (5000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def step_cost(probe: str, steps: int, layers: int | None) -> dict[str, Any]:
    """Probed steps against those beside them.

    Args:
        probe: the recipe's `weighting.probe`.
        layers: blocks of a random model on scripted rollouts; None for the base model on its own rollouts.
    """
    # The policy must stay as it is, or its completions would change in length.
    overrides = [f"weighting.probe={probe}", "weighting.interval=2", f"trainer.max_steps={steps}"]
    overrides += ["trainer.learning_rate=1e-9", "trainer.lr_scheduler_type=constant"]
    if layers is not None:
        overrides += [f"model.tiny.layers={layers}", *SCRIPTED_REWARDS]
    recipe, times = recipe_with(*overrides), StepTimes()
    options: dict[str, Any] = {"callbacks": [times]} | ({} if layers is None else {"rollout_func": scripted})
    with RewardSuite(recipe.rewards) as suite:
        train(recipe, suite, load_data(recipe.data, recipe.seed).train, BASE if layers is None else None, **options)
    seconds = np.array(times.seconds)
    probed = np.arange(2, len(seconds) - 1, 2)  # the first step warms up; batches are counted from 0
    without = (seconds[probed - 1] + seconds[probed + 1]) / 2
    return {
        "step_ms": float(np.median(without)) * 1e3,
        "extra_ms": median_interval((seconds[probed] - without) * 1e3),
        "ratio": median_interval(seconds[probed] / without),
        "pairs": len(probed),
    }


def cost(quick: bool) -> dict[str, Any]:
    """Costs of both probes on the recipe's rollouts and on scripted ones by depth."""
    sampled, fixed = (12, 12) if quick else (240, 80)
    found: dict[str, Any] = {}
    for label, probe in PROBES.items():
        found[label] = {"recipe": step_cost(probe, sampled, None)}
        found[label] |= {f"{layers} blocks, scripted": step_cost(probe, fixed, layers) for layers in LAYERS}
    return found


def replay(recipe: Recipe, grams: list[torch.Tensor]) -> list[float]:
    """The weights that a run's gradient weighting ends with, given these Gram matrices."""
    weighting = make_weighting(recipe, 1)
    assert isinstance(weighting, GradientWeighting)
    for gram in grams:
        weighting.observe(gram)
    return weighting.weights(1.0).tolist()


def agreement(recipe: Recipe, grams: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """How alike the influences by both gradients are over the steps of a run."""
    names, used_K = list(recipe.rewards.functions), torch.ones(len(recipe.rewards.functions), dtype=torch.bool)
    scale = recipe.weighting.gradient_scale  # type: ignore[union-attr]
    narrow_TK, wide_TK = (
        torch.stack([influence(pair[which], used_K, scale) for pair in grams]).numpy() for which in (0, 1)
    )
    # A common shift of all influences moves no weight, so this is what the weights see of them.
    apart = [values - values.mean(axis=1, keepdims=True) for values in (narrow_TK, wide_TK)]
    orders = [np.argsort(values, axis=1) for values in (narrow_TK, wide_TK)]
    return {
        "influence": _correlations(names, narrow_TK, wide_TK),
        LESS_MEAN: _correlations(names, *apart),
        "same order of all rewards": float((orders[0] == orders[1]).all(axis=1).mean()),
        "same first reward": float((orders[0][:, -1] == orders[1][:, -1]).mean()),
        "steps": len(grams),
    }


def _correlations(names: list[str], one_TK: np.ndarray, other_TK: np.ndarray) -> dict[str, float]:
    columns = zip(names, one_TK.T, other_TK.T, strict=True)
    return {name: float(spearmanr(one, other).statistic) for name, one, other in columns}


def quality(seed: int, quick: bool) -> dict[str, Any]:
    """Both probes over one run, and a run of the same seed that the full gradient steers."""
    common = [f"seed={seed}", *(["trainer.max_steps=6"] if quick else [])]
    recipe, full = recipe_with(*common), recipe_with(*common, "weighting.probe=trainable")
    both: list[BothProbes] = []

    def watch(trainer: Any) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        both.append(BothProbes(trainer._probe, WideProbe(trainable, trainer._probe.weigh)))
        trainer._probe = both[0]

    with RewardSuite(recipe.rewards) as suite:
        rows = load_data(recipe.data, recipe.seed).train
        train(recipe, suite, rows, BASE, watch)
        other = train(full, suite, rows, BASE).balance.weighting.weights(1.0)
    grams = both[0].grams
    return {
        **agreement(recipe, grams),
        "final weights": {
            "last projection": replay(recipe, [narrow for narrow, _ in grams]),
            "full gradient, same batches": replay(recipe, [wide for _, wide in grams]),
            "full gradient, a run of its own": other.tolist(),
        },
    }


def show(found: dict[str, Any]) -> None:
    """Print costs and agreement."""
    costs = Table("probe", "steps", "step", "extra", "ratio", "95 % interval", title="Cost of a probed step")
    for probe, settings in found.get("cost", {}).items():
        for setting, one in settings.items():
            extra, ratio = one["extra_ms"]["median"], one["ratio"]
            costs.add_row(
                probe,
                setting,
                f"{one['step_ms']:.0f} ms",
                f"{extra:.1f} ms",
                f"{ratio['median']:.3f}",
                f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            )
    Console().print(costs)
    for seed, one in found.get("quality", {}).items():
        Console(highlight=False).print(f"seed {seed}:", json.dumps(one, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="runs for quality")
    parser.add_argument("--only", choices=["cost", "quality"], help="the other is kept as it is in probe.json")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    if not (BASE / "config.json").is_file():
        parser.error("there is no base model yet: run.py builds it first (`run.py --base-only` does nothing else)")
    file = FOLDER / "probe.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    found["threads"] = torch.get_num_threads()
    if options.only != "quality":
        found["cost"] = cost(options.quick)
    if options.only != "cost":
        seeds = range(1 if options.quick else options.seeds)
        found["quality"] = {str(seed): quality(seed, options.quick) for seed in seeds}
    if not options.quick:
        write_result(file, found)
        if {"cost", "quality"} <= set(found):
            fill_probe()
    show(found)


if __name__ == "__main__":
    main()
