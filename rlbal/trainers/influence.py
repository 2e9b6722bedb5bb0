"""The gradient of each reward, taken from the backward pass that training does anyway.

After the last attention, tokens do not see each other. So with x_t what the last projection of the last block is given
and y_t what it returns, log π_t depends on no other token's y, and the gradient of reward k's objective with respect to
that projection is

    g_k = sum_t c_t A_tk u_t ⊗ x_t          u_t = ∂ log π_t / ∂ y_t,   c_t: the token's weight in TRL's loss

The backward pass of the training loss L passes through y_t with the gradient ∂L/∂y_t = (∂L/∂ log π_t) u_t, and both are
caught by hooks, so that u_t is their quotient: no extra forward or backward pass, whatever the depth of the model, and
under DDP, DeepSpeed and gradient checkpointing alike. What it costs is one matrix product per reward.

A token that training gives no gradient would be lost. So a row whose advantages cancel to zero though a reward of its
own does not gets `NEXT_TO_NOTHING` for an advantage (see `teach_all`). And the quotient is u_t only where the loss is a
function of the log π_t: entropy bonuses and routers' auxiliary losses are refused.

`GradientProbe` does this; `WideProbe` compares any parameters by a backward pass per reward, which is what the paper
does and what the cheap one is measured against. Both see a batch only while the policy is the one that sampled it,
where every loss of TRL has the gradient c_t A_t of log π_t.

Shapes: B rows of a micro-batch, T completion tokens, K rewards, H outputs and I inputs of the projection.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from rlbal.balance.gradients import add_projection_gradients
from rlbal.balance_sections import GradientWeights
from rlbal.errors import RecipeError
from rlbal.speed import GLOBAL_TOKEN_LOSSES
from rlbal.trainers.microbatch import REWARD_ADVANTAGES, MicroBatch, in_loss

# Small enough to change no parameter beyond its last digit, large enough to divide by.
NEXT_TO_NOTHING = 1e-18


def teach_all(advantages_N: torch.Tensor, reward_advantages_NK: torch.Tensor) -> torch.Tensor:
    """Advantages in which no row is 0 that one of the rewards would train on: (N,)."""
    cancelled_N = (advantages_N == 0) & (reward_advantages_NK != 0).any(dim=1)
    return torch.where(cancelled_N, NEXT_TO_NOTHING, advantages_N)


def token_weights(args: Any, inputs: MicroBatch, max_length: int, accumulation: int, processes: int) -> torch.Tensor:
    """c_t, what a token's advantage times its log-probability counts in TRL's loss of a micro-batch: (B, T).

    Args:
        args: TRL's settings.
        inputs: the micro-batch.
        max_length: `max_completion_length`.
        accumulation: micro-batches of an optimizer step.
        processes: how many take the mean of their gradients.
    """
    mask_BT = in_loss(inputs).float()
    tokens_B1 = mask_BT.sum(dim=1, keepdim=True).clamp(min=1.0)
    rows = len(mask_BT)
    if args.loss_type in GLOBAL_TOKEN_LOSSES:
        share = accumulation / args.steps_per_generation
        weights_BT = mask_BT * processes / (inputs["num_items_in_batch"].clamp(min=1.0) * share)
        if args.loss_type == "cispo":
            highest_ratio = args.epsilon if args.epsilon_high is None else args.epsilon_high
            weights_BT = weights_BT * min(1.0, highest_ratio)  # the ratio is 1 here
    elif args.loss_type == "bnpo":
        weights_BT = mask_BT / mask_BT.sum().clamp(min=1.0) / accumulation
    elif args.loss_type == "dr_grpo":
        weights_BT = mask_BT / (rows * max_length) / accumulation
    elif args.loss_type == "luspo":
        weights_BT = mask_BT / rows / accumulation
    else:  # grpo, sapo
        weights_BT = mask_BT / tokens_B1 / rows / accumulation
    ratio = inputs.get("importance_sampling_ratio")
    return weights_BT if ratio is None or args.loss_type == "vespo" else weights_BT * ratio


class GradientProbe:
    """Sums the rewards' gradients over the micro-batches of an optimizer step.

    Args:
        model: the policy, not wrapped by an engine.
        weigh: gives c_t of a micro-batch, (B, T).
    """

    def __init__(self, model: Any, weigh: Callable[[MicroBatch], torch.Tensor]) -> None:
        self.weigh = weigh
        self.gradients: list[torch.Tensor] = []
        self._coefficients_BTK: torch.Tensor | None = None
        self._loss_gradient_BT: torch.Tensor | None = None
        self.name, module = last_projection(model)
        module.register_forward_hook(self._watch)

    def before_loss(self, inputs: MicroBatch) -> None:
        """A micro-batch is about to be trained on; without `REWARD_ADVANTAGES` it passes unseen."""
        per_reward = inputs.get(REWARD_ADVANTAGES)
        self._coefficients_BTK = None
        if per_reward is not None:
            self._coefficients_BTK = self.weigh(inputs)[:, :, None] * per_reward[:, None, :]

    def after_forward(self, logps_BT: torch.Tensor) -> None:
        """The log-probabilities that the loss is made of."""
        if self._coefficients_BTK is not None:
            logps_BT.register_hook(self._keep_loss_gradient)

    def take(self) -> list[torch.Tensor]:
        """The gradients so far, each of shape (K, ...), and begin anew."""
        taken, self.gradients = self.gradients, []
        return taken

    def _keep_loss_gradient(self, gradient_BT: torch.Tensor) -> None:
        self._loss_gradient_BT = gradient_BT

    def _watch(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if self._coefficients_BTK is not None and output.requires_grad:
            inputs, (B, T, _) = args[0].detach(), self._coefficients_BTK.shape
            tokens = output.shape[:-1].numel()
            if tokens % B or tokens // B <= T:
                raise RecipeError(
                    f"`weighting.probe: last_projection` needs a layer that sees all tokens; `{self.name}` does not",
                    fix="set `weighting.probe: last_blocks`",
                )
            output.register_hook(lambda gradient: self._collect(inputs, gradient))

    def _collect(self, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        coefficients_BTK, loss_gradient_BT = self._coefficients_BTK, self._loss_gradient_BT
        if coefficients_BTK is None or loss_gradient_BT is None:
            return
        B, T, K = coefficients_BTK.shape
        seen_BT = (loss_gradient_BT != 0) & (coefficients_BTK != 0).any(dim=2)
        # What the model returns at a place is the next token's.
        x_NI, gradient_NH = (
            tokens.reshape(B, -1, tokens.shape[-1])[:, -T - 1 : -1][seen_BT] for tokens in (inputs, gradient)
        )
        u_NH = gradient_NH.float() / loss_gradient_BT[seen_BT].float()[:, None]
        if not self.gradients:
            self.gradients = [u_NH.new_zeros(K, u_NH.shape[1], x_NI.shape[1])]
        add_projection_gradients(self.gradients[0], x_NI, u_NH, coefficients_BTK[seen_BT])
        self._coefficients_BTK = self._loss_gradient_BT = None


class WideProbe(GradientProbe):
    """The same for any parameters, by a backward pass per reward.

    Args:
        parameters: those whose gradients are compared; all need gradients.
        weigh: gives c_t of a micro-batch, (B, T).
    """

    def __init__(self, parameters: list[torch.nn.Parameter], weigh: Callable[[MicroBatch], torch.Tensor]) -> None:
        self.weigh, self.parameters = weigh, parameters
        self.gradients = []
        self._coefficients_BTK = None

    def after_forward(self, logps_BT: torch.Tensor) -> None:
        if self._coefficients_BTK is None:
            return
        each = [
            torch.autograd.grad(logps_BT, self.parameters, column.to(logps_BT), retain_graph=True, allow_unused=True)
            for column in self._coefficients_BTK.unbind(2)
        ]
        found = [
            torch.stack([torch.zeros_like(parameter) if one is None else one for one in some]).float()
            for parameter, some in zip(self.parameters, zip(*each, strict=True), strict=True)
        ]
        if self.gradients:
            for old, new in zip(self.gradients, found, strict=True):
                old += new
        else:
            self.gradients = found
        self._coefficients_BTK = None


def blocks_of(model: Any) -> torch.nn.ModuleList:
    """The decoder blocks of a language model.

    Raises:
        RecipeError: it has no list of as many modules as its configuration has layers.
    """
    layers = model.config.get_text_config().num_hidden_layers
    for _, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return module
    raise RecipeError(
        f"`weighting.method: gradient` finds no blocks in {type(model).__name__}",
        why=f"it has no list of {layers} modules, as many as its configuration has layers",
        fix="set `weighting.probe: trainable`, or another `weighting.method`",
    )


def last_projection(model: Any) -> tuple[str, torch.nn.Module]:
    """Name and module of the last linear layer of the last block that writes as many numbers as a block passes on.

    That is the down-projection of its MLP; in a mixture of experts, that of the shared expert, or without one the
    attention's output projection, after which tokens are just as independent. A layer with LoRA counts as one.

    Raises:
        RecipeError: there is none.
    """
    width, found, inside = model.config.get_text_config().hidden_size, None, None
    for name, module in blocks_of(model)[-1].named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, BaseTunerLayer) else None
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        outputs = base.nf if isinstance(base, Conv1D) else getattr(base, "out_features", None)
        if outputs == width:
            found = name, module
    if found is None:
        raise RecipeError(
            f"`weighting.probe: last_projection` finds no linear layer in the last block of {type(model).__name__}",
            fix="set `weighting.probe: trainable`",
        )
    return found


def make_probe(trainer: Any) -> GradientProbe | None:
    """The probe of the recipe's `weighting:`, or None.

    Raises:
        RecipeError: the model has no such parameters, or this engine allows no backward pass but training's.
    """
    section = trainer.recipe.weighting
    if not isinstance(section, GradientWeights):
        return None
    accelerator, args = trainer.accelerator, trainer.args

    def weigh(inputs: MicroBatch) -> torch.Tensor:
        steps = trainer.current_gradient_accumulation_steps
        return token_weights(args, inputs, trainer.max_completion_length, steps, accelerator.num_processes)

    model = accelerator.unwrap_model(trainer.model)
    if section.probe == "last_projection":
        if trainer.aux_loss_enabled:
            raise RecipeError(
                "`weighting.probe: last_projection` cannot tell the rewards' gradients from that of the auxiliary loss "
                "of a mixture of experts",
                fix="set `trainer.router_aux_loss_coef: 0`, or `weighting.probe: last_blocks`",
            )
        return GradientProbe(model, weigh)
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise RecipeError(
            f"`weighting.probe: {section.probe}` needs backward passes of its own, which DeepSpeed and FSDP take for "
            "training's",
            fix="set `weighting.probe: last_projection`, or launch with DDP (multi_gpu)",
        )
    where = model if section.probe == "trainable" else blocks_of(model)[-section.blocks :]
    parameters = [parameter for parameter in where.parameters() if parameter.requires_grad]
    if not parameters:
        raise RecipeError(
            f"`weighting.probe: {section.probe}` finds nothing to train in the last {section.blocks} blocks",
            why="LoRA has no matrices there",
            fix="set `weighting.probe: trainable` or `last_projection`",
        )
    return WideProbe(parameters, weigh)
