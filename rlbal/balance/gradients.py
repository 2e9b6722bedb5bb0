"""Weights that follow the gradients of the rewards (arXiv 2509.11452, its gradient-based weighting).

With g_k the gradient of the policy objective of reward k alone (its own normalised advantages):

    G_kl = <g_k, g_l>                                          Gram matrix
    I_k  = <g_k, sum_l g_l> = sum_l G_kl                       influence: how far a step for all helps reward k
    w_k  <- w_k exp(s I_k) / sum_l w_l exp(s I_l)              exponentiated gradient; s = η/μ, the step size

The paper takes the g_k as they are (`gradient_scale: none`), so that s depends on the model and on the phase of
training. Divided by their root mean square length (`mean`), only how they compare decides. Divided by their own lengths
(`unit`), I_k is a sum of cosines, and no reward leads because its numbers are large; of two rewards neither ever does.
Weights are kept between a floor and a cap and sum to 1.

No signal: a reward whose gradient is zero (it was constant) keeps its weight, and the others share what they had
between them. A gradient that is not finite says nothing, and no weight moves. A reward of weight 0 is only logged: it
stays at 0 and has no say.

The assumption behind it is that a reward whose gradient agrees with the others' is one to follow. I_k contains |g_k|²,
so unless lengths are one, the reward with the longest gradient gains, which is the one that is easiest to move. Nothing
pulls weights back: a reward that always agrees a little more ends at the cap, and the floor is what the others keep.
"""

from typing import Any

import torch

from rlbal.balance.weighting import Weighting

# exp of it is a weight far below any floor, and not yet 0, from which a weight could not come back.
LEAST_LOG = -50.0


class GradientWeighting(Weighting):
    """Weights on the simplex that learn from the Gram matrix of the rewards' gradients.

    Args:
        weights: where they start, at least one of them positive, none negative; scaled to sum to 1.
        names: of the rewards.
        step_size: s above.
        floor, cap: bounds of every weight that is not 0; with K such weights, K floor <= 1 <= K cap.
        gradient_scale: none, mean or unit, as above.
    """

    def __init__(
        self,
        weights: list[float],
        names: list[str],
        step_size: float,
        floor: float = 0.0,
        cap: float = 1.0,
        gradient_scale: str = "none",
    ) -> None:
        start_K = torch.tensor(weights, dtype=torch.float64)
        self.names, self.step_size, self.floor, self.cap = names, step_size, floor, cap
        self.gradient_scale = gradient_scale
        self.used_K = start_K > 0
        self.weights_K = bounded(start_K / start_K.sum(), self.used_K, floor, cap)
        self.influence_K = torch.full_like(start_K, torch.nan)
        self.gram_KK = torch.full((len(weights), len(weights)), torch.nan, dtype=torch.float64)

    def weights(self, progress: float) -> torch.Tensor:
        del progress
        return self.weights_K

    def observe(self, gram_KK: torch.Tensor) -> None:
        """Move the weights once.

        Args:
            gram_KK: inner products of the rewards' gradients, shape (K, K); a zero on the diagonal means no signal.
        """
        self.gram_KK = gram_KK.double().cpu()
        self.influence_K = influence(self.gram_KK, self.used_K, self.gradient_scale)
        active_K = self.used_K & (self.gram_KK.diagonal() > 0)
        self.weights_K = exponentiated_gradient(
            self.weights_K, self.influence_K, active_K, self.step_size, self.floor, self.cap
        )

    def metrics(self) -> dict[str, float]:
        return {f"influence/{name}": value for name, value in zip(self.names, self.influence_K.tolist(), strict=True)}

    def tables(self) -> dict[str, Any]:
        return {"gradient/gram": self.gram_KK.tolist()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights_K.tolist(),
            "influence": self.influence_K.tolist(),
            "gram": self.gram_KK.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The recipe of the resumed run may have another floor, or a reward that is now only logged.
        found_K = _tensor(state["weights"])
        if found_K[~self.used_K].any():
            found_K = torch.where(self.used_K, found_K, 0.0) / found_K[self.used_K].sum()
        self.weights_K = bounded(found_K, self.used_K, self.floor, self.cap)
        self.influence_K, self.gram_KK = _tensor(state["influence"]), _tensor(state["gram"])


def _tensor(values: list[Any]) -> torch.Tensor:
    """Saved numbers; JSON has null for NaN."""

    def number(value: Any) -> Any:
        return [number(one) for one in value] if isinstance(value, list) else float("nan") if value is None else value

    return torch.tensor(number(values), dtype=torch.float64)


def add_projection_gradients(
    sums_KHI: torch.Tensor, inputs_NI: torch.Tensor, output_gradients_NH: torch.Tensor, coefficients_NK: torch.Tensor
) -> None:
    """Add the gradients of K objectives with respect to one linear layer, from one backward pass.

    Where tokens are independent of each other after the layer, the objective sum_t c_tk log π_t has the gradient
    sum_t c_tk u_t ⊗ x_t, with u_t that of log π_t alone.

    Args:
        sums_KHI: what is added to, float32.
        inputs_NI: x, what the layer was given, for N tokens.
        output_gradients_NH: u, the gradient of each token's log-probability with respect to what the layer returned.
        coefficients_NK: c, one column for each objective.
    """
    u_NH = output_gradients_NH.float()
    # A product per objective: side by side, their left factors would take K times the memory.
    for sum_HI, c_N in zip(sums_KHI, coefficients_NK.float().unbind(1), strict=True):
        left_NH = c_N[:, None] * u_NH
        # The weight of one token among many is below what half precision holds; a power of two rounds nothing.
        scale = torch.frexp(left_NH.abs().amax()).exponent if left_NH.numel() else torch.zeros((), dtype=torch.int32)
        product_HI = torch.ldexp(left_NH, -scale).to(inputs_NI.dtype).T @ inputs_NI
        sum_HI += torch.ldexp(product_HI.float(), scale)


def gram_matrix(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Inner products of K gradients given as tensors of shape (K, ...), one for each parameter: (K, K), float64."""
    flat = [one.flatten(1) for one in gradients]
    return torch.stack([(one @ one.T).double() for one in flat]).sum(dim=0)


def influence(gram_KK: torch.Tensor, used_K: torch.Tensor, gradient_scale: str) -> torch.Tensor:
    """I_k = sum over used l of G_kl, of gradients scaled as the top of this file says; 0 for one that is zero: (K,)."""
    gram_KK = gram_KK * (used_K[:, None] & used_K[None, :])
    squares_K = gram_KK.diagonal()
    if gradient_scale == "mean":
        active = (squares_K > 0).sum().clamp(min=1)
        squares_K = (squares_K.sum() / active).expand_as(squares_K)
    if gradient_scale != "none":
        lengths_K = torch.where(squares_K == 0, 1.0, squares_K).sqrt()
        gram_KK = gram_KK / lengths_K[:, None] / lengths_K[None, :]
    return gram_KK.sum(dim=1)


def exponentiated_gradient(
    weights_K: torch.Tensor,
    influence_K: torch.Tensor,
    active_K: torch.Tensor,
    step_size: float,
    floor: float = 0.0,
    cap: float = 1.0,
) -> torch.Tensor:
    """The update at the top of this file among the active rewards, whose weights keep their sum: (K,), float64.

    An influence that is not finite moves nothing.
    """
    if not influence_K.isfinite().all() or active_K.sum() < 2:
        return weights_K
    mass = weights_K[active_K].sum()
    logs = weights_K[active_K].log() + step_size * influence_K[active_K]
    shares = (logs - logs.max()).clamp(min=LEAST_LOG).exp()
    moved_K = weights_K.clone()
    moved_K[active_K] = mass * shares / shares.sum()
    return bounded(moved_K, active_K, floor, cap)


def bounded(weights_K: torch.Tensor, active_K: torch.Tensor, floor: float, cap: float) -> torch.Tensor:
    """Active weights scaled by a common factor and clipped to [floor, cap], so that their sum stays.

    Bisection on the factor; the clipped sum rises with it. Where the bounds leave no such weights (the others hold too
    much or too little of the sum), they are scaled to it from what is nearest.
    """
    active, result_K = weights_K[active_K], weights_K.clone()
    mass = active.sum()
    if ((active >= floor) & (active <= cap)).all():
        return result_K
    low, high = 0.0, 1.0
    while (active * high).clamp(floor, cap).sum() < mass and high < 1e300:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2
        if (active * middle).clamp(floor, cap).sum() < mass:
            low = middle
        else:
            high = middle
    clipped = (active * high).clamp(floor, cap)
    result_K[active_K] = clipped * (mass / clipped.sum())
    return result_K
