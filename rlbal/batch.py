"""The one batch that everything between reward and advantage speaks of."""

from dataclasses import dataclass

import torch

from rlbal.balance.groups import constant_groups


@dataclass
class RolloutBatch:
    """One generation batch over all processes; every field is the same on every process.

    Shapes: N completions, K rewards, P prompts. Rows are in the order of the processes that hold them; groups may be of
    any size and lie anywhere.
    """

    # Which prompt each row answers: its position in the training data, and its group 0..P-1.
    prompt_index_N: torch.Tensor  # int64
    group_N: torch.Tensor  # int64

    # What the rewards said: raw, unweighted, NaN where there is none.
    rewards_NK: torch.Tensor  # float32

    # What was generated.
    completion_tokens_N: torch.Tensor  # int64
    prompt_tokens_N: torch.Tensor  # int64
    truncated_N: torch.Tensor  # bool: the token limit cut it off

    # The token budget that the prompt named and the rewards went by; None without a budget.
    budget_N: torch.Tensor | None = None  # int64

    @property
    def num_prompts(self) -> int:
        return int(self.group_N.max()) + 1

    @property
    def counts_P(self) -> torch.Tensor:
        """Rollouts of each prompt, shape (P,)."""
        return torch.bincount(self.group_N, minlength=self.num_prompts)


def group_rows(prompt_index_N: torch.Tensor) -> torch.Tensor:
    """Number the prompts of a batch 0..P-1 by value: (N,) -> (N,)."""
    return torch.unique(prompt_index_N, return_inverse=True)[1]


def prompt_mean(values_N: torch.Tensor, group_N: torch.Tensor) -> float:
    """Mean over prompts of the mean over their rows, without NaN ones; NaN if nothing is left: (N,), (N,) -> number."""
    present_N = ~values_N.isnan()
    sums_P = torch.bincount(group_N[present_N], weights=values_N[present_N].double())
    counts_P = torch.bincount(group_N[present_N])
    return (sums_P[counts_P > 0] / counts_P[counts_P > 0]).mean().item()


def batch_metrics(
    batch: RolloutBatch, weights_K: torch.Tensor, reward_names: list[str], success: int
) -> dict[str, float]:
    """What `metrics.jsonl` says of one generation batch.

    Args:
        batch: the batch.
        weights_K: weights that its rewards got, shape (K,).
        reward_names: names of the K rewards.
        success: index of the reward that says whether a rollout succeeded.

    Metrics of what is not there, such as a budget, are NaN (null in the file).
    """
    dead_PK = constant_groups(batch.rewards_NK, batch.group_N, batch.num_prompts)
    metrics: dict[str, float] = {}
    for k, name in enumerate(reward_names):
        present = batch.rewards_NK[:, k][~batch.rewards_NK[:, k].isnan()].double()
        metrics[f"reward/{name}/mean"] = present.mean().item() if len(present) else float("nan")
        metrics[f"reward/{name}/prompt_mean"] = prompt_mean(batch.rewards_NK[:, k], batch.group_N)
        metrics[f"reward/{name}/std"] = present.std().item() if len(present) > 1 else 0.0
        metrics[f"reward/{name}/none"] = 1.0 - len(present) / len(batch.rewards_NK)
        metrics[f"reward/{name}/dead_groups"] = dead_PK[:, k].double().mean().item()
        metrics[f"weight/{name}"] = weights_K[k].item()
    counts_P, lengths_N = batch.counts_P.double(), batch.completion_tokens_N.double()
    metrics |= {
        "allocation/min": counts_P.min().item(),
        "allocation/max": counts_P.max().item(),
        "allocation/mean": counts_P.mean().item(),
        # The share of rollouts whose group can teach: its rewards differ.
        "effective_gradient_ratio": (~dead_PK[batch.group_N, success]).double().mean().item(),
        "any_reward_gradient_ratio": (~dead_PK.all(dim=1)[batch.group_N]).double().mean().item(),
        "length/mean": lengths_N.mean().item(),
        "length/truncated": batch.truncated_N.double().mean().item(),
        "length/over_budget": float("nan"),
    }
    if batch.budget_N is not None:
        metrics["length/over_budget"] = (lengths_N > batch.budget_N).double().mean().item()
    return metrics
