"""PPO on the seams of `rlbal.trainers.grpo`: rewards become token advantages through a critic.

One generation batch, and the steps that train on it:

    _get_per_token_logps_and_entropies  the pass over the rollouts that gives old log-probabilities also gives values
    _take_advantages                    rewards, values and penalty -> advantages and returns of every token; these and
                                        the old values travel with their rows through `rlbal.trainers.microbatch`
    _compute_loss                       the critic listens to the policy's forward pass; its loss is added
    training_step                       the end of the critic's warm-up
    create_optimizer                    the critic's own learning rate
    create_scheduler                    whether the warm-up leaves the policy any steps
    _save, _load_from_checkpoint        the critic beside the policy
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing

from rlbal.balance.advantages import AdvantageRule, reward_advantages
from rlbal.balance.gae import (
    estimate_advantages,
    final_values,
    masked_moments,
    mean_and_variance,
    token_rewards,
    whiten,
)
from rlbal.balance.value_loss import clipped_value_loss, explained_variance
from rlbal.batch import RolloutBatch
from rlbal.errors import RunError
from rlbal.ppo_sections import PPOSection
from rlbal.trainers.grpo import BalancedGRPOTrainer
from rlbal.trainers.influence import NEXT_TO_NOTHING
from rlbal.trainers.microbatch import REWARD_ADVANTAGES, MicroBatch, forward_in_parts, in_loss
from rlbal.trainers.value import CRITIC, Critic, load_critic, save_critic, split_state

# Under PPO a reward's own gradient is that of the reward less its batch mean, for every token of a row.
OWN_RULE = AdvantageRule(baseline="batch", scale="none", order="normalize_then_sum")


class BalancedPPOTrainer(BalancedGRPOTrainer):
    """BalancedGRPOTrainer with a critic.

    Args:
        critic_model: a second model like the policy, for `ppo.critic: separate`.
        kwargs: as for BalancedGRPOTrainer.
    """

    def __init__(self, *, critic_model: PreTrainedModel | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        assert self.recipe.ppo is not None
        self.ppo: PPOSection = self.recipe.ppo
        model: Any = self.model
        backbone = None if critic_model is None else critic_model.base_model
        self.critic = Critic(model.config.get_text_config().hidden_size, self.recipe.seed, backbone)
        self.critic.to(next(model.parameters()).device).join(model)
        if self._compaction is not None:
            # Every row teaches the critic, also one without advantages.
            self._compaction = replace(self._compaction, keep_all=True)
        if self.use_vllm:
            hide_critic(self.vllm_generation)
        self._awaiting_values = False
        self._old_logps_BT = self._values_BT1 = torch.empty(0)
        self._judged: dict[str, float] = {}
        self._learned_3 = torch.zeros(3)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._awaiting_values = True
        output = super()._generate_and_score_completions(inputs)
        self._report |= self._judged
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any, **rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not self._awaiting_values or model is not self.model:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **rest
            )
        self._judge(input_ids, attention_mask, logits_to_keep)
        return self._old_logps_BT, None, None

    def _judge(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> None:
        """Log-probabilities (B, T) and values (B, T + 1) of this process's rollouts, from one pass over them."""
        self._awaiting_values = False

        def forward(ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
            with self.critic.listening(keep + 1) as heard:
                logps = super(BalancedPPOTrainer, self)._get_per_token_logps_and_entropies(self.model, ids, mask, keep)
            return torch.stack([torch.nn.functional.pad(logps[0], (0, 1)), heard[0]], dim=2)

        if self._compaction is None:
            rows = self.args.per_device_train_batch_size
            chunks = zip(input_ids.split(rows), attention_mask.split(rows), strict=True)
            both_BT2 = torch.cat([forward(ids, mask, width) for ids, mask in chunks])
        else:
            gather, index = self.accelerator.gather, self.accelerator.process_index
            both_BT2 = forward_in_parts(forward, input_ids, attention_mask, width, self._compaction, gather, index)
        self._old_logps_BT, self._values_BT1 = both_BT2[:, :-1, 0], both_BT2[:, :, 1]

    def _take_advantages(self, batch: RolloutBatch, output: dict[str, Any], mine: slice) -> torch.Tensor:
        """Put advantages, returns and old values of this process's tokens into `output`; mean advantages of all rows,
        (N,)."""
        if "old_per_token_logps" not in output:  # the pass that gave values, if any, was that of the reference
            ids, mask = (
                torch.cat([output[f"prompt_{kind}"], output[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")
            )
            model, checkpointing = cast(Any, self.model), cast(Any, self.args.gradient_checkpointing_kwargs)
            with torch.no_grad(), disable_gradient_checkpointing(model, checkpointing):
                self._judge(ids, mask, output["completion_ids"].shape[1])
        rewards_N = self.balance.returns(batch, self._progress)
        factors_N = self._prompt_factors(batch)
        advantages_BT = self._estimate(batch, rewards_N, output, mine) * factors_N[mine][:, None]
        device, tokens_BT = self.accelerator.device, in_loss(output).cpu().bool()
        if self.balance.probe_is_due:
            own_NK = reward_advantages(batch.rewards_NK.double(), batch.group_N, OWN_RULE, None, None)
            own_NK = own_NK * (self.balance.weights_K > 0) * factors_N[:, None]
            advantages_BT = torch.where(tokens_BT & (advantages_BT == 0), NEXT_TO_NOTHING, advantages_BT)
            output[REWARD_ADVANTAGES] = own_NK[mine].to(device, torch.float32)
        output["advantages"] = advantages_BT.to(device, torch.float32)
        means_B = advantages_BT.sum(dim=1) / tokens_BT.sum(dim=1).clamp(min=1)
        return self.accelerator.gather(means_B.to(device, torch.float32)).cpu()

    def _estimate(
        self, batch: RolloutBatch, rewards_N: torch.Tensor, output: dict[str, Any], mine: slice
    ) -> torch.Tensor:
        """Advantages (B, T) in float64 on the CPU; returns and old values into `output`."""
        # A row that no reward could score has nothing to teach: returns of NaN leave it out of the critic's loss.
        scored_B = ~batch.rewards_NK[mine].isnan().all(dim=1)
        actions_BT = in_loss(output).cpu().bool() & scored_B[:, None]
        values_BT1 = self._values_BT1.double().cpu()
        log_ratio_BT = None
        if (reference_BT := output.get("ref_per_token_logps")) is not None:
            log_ratio_BT = (self._old_logps_BT - reference_BT).double().cpu()
        lengths_B = output["completion_mask"].sum(dim=1).cpu()
        rewards_BT = token_rewards(rewards_N[mine].double(), actions_BT, log_ratio_BT, self.ppo.kl_penalty)
        final_B = final_values(values_BT1, lengths_B, batch.truncated_N[mine], self.ppo.truncation)
        values_BT = values_BT1[:, :-1]
        advantages_BT, returns_BT = estimate_advantages(
            rewards_BT, values_BT, final_B, actions_BT, self.ppo.gamma, self.ppo.lam
        )
        returns_BT = torch.where(scored_B[:, None], torch.where(actions_BT, returns_BT, values_BT), torch.nan)
        kinds = [advantages_BT, returns_BT, returns_BT - values_BT, values_BT]
        kinds += [log_ratio_BT] if log_ratio_BT is not None else []
        moments_X3 = torch.stack([masked_moments(one, actions_BT) for one in kinds]).to(self.accelerator.device)
        moments_X3 = self.accelerator.reduce(moments_X3, reduction="sum").cpu()
        self._describe(moments_X3)
        device = self.accelerator.device
        output["returns"], output["old_values"] = returns_BT.to(device, torch.float32), self._values_BT1[:, :-1]
        return whiten(advantages_BT, actions_BT, moments_X3[0]) if self.ppo.whiten else advantages_BT

    def _describe(self, moments_X3: torch.Tensor) -> None:
        """What metrics.jsonl says of a batch of advantages, returns, errors, values and log-ratios."""
        pairs = [mean_and_variance(moments_3) for moments_3 in moments_X3]
        means, deviations = [mean.item() for mean, _ in pairs], [variance.sqrt().item() for _, variance in pairs]
        self._judged = {
            "ppo/advantage_std": deviations[0],
            "ppo/return_mean": means[1],
            "ppo/return_std": deviations[1],
            "ppo/value_mean": means[3],
            "ppo/explained_variance": explained_variance(moments_X3[1], moments_X3[2]),
        }
        if len(means) > 4:
            self._judged["ppo/kl"] = means[4]

    def _compute_loss(self, model: Any, inputs: MicroBatch) -> torch.Tensor:
        warming_up = self.state.global_step < self.ppo.critic_warmup_steps
        self.critic.detached = self.ppo.detach or warming_up
        penalty, self.beta = self.beta, 0.0  # it is in the rewards
        try:
            with self.critic.listening(inputs["completion_ids"].shape[1] + 1) as heard:
                loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = penalty
        returns_BT = inputs["returns"]
        mask_BT = in_loss(inputs).bool() & ~returns_BT.isnan()
        # As TRL has it for the policy's loss: the tokens of an optimizer step, a process's share.
        share = self.current_gradient_accumulation_steps / (self.args.steps_per_generation or 1)
        num_tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes * share
        value_loss, clipped = clipped_value_loss(
            heard[0][:, :-1], inputs["old_values"], returns_BT.nan_to_num(), mask_BT, self.ppo.value_clip, num_tokens
        )
        total = torch.stack([value_loss.detach() * num_tokens, clipped, mask_BT.sum()])
        self._learned_3 = self._learned_3.to(total) + total
        # Multiplied by 0 rather than left out: every engine expects a gradient of every parameter.
        return (0.0 * loss if warming_up else loss) + self.ppo.value_coef * value_loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if 0 < self.ppo.critic_warmup_steps == self.state.global_step:
            self._forget_warmup()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            total, clipped, count = self.accelerator.reduce(self._learned_3, reduction="sum").tolist()
            self._report |= {"ppo/value_loss": total / max(count, 1.0), "ppo/value_clipped": clipped / max(count, 1.0)}
            self._learned_3 = torch.zeros(3)
        return loss

    def _forget_warmup(self) -> None:
        """Start the policy's moments anew: Adam would take the zeros of the warm-up for tiny gradients, and make the
        first steps after it several times too large. DeepSpeed's flat states cannot be told apart, and stay."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        own = {id(parameter) for parameter in self.critic.parameters()}
        if self.engine in ("plain", "fsdp"):
            for parameter in [one for one in optimizer.state if id(one) not in own]:
                del optimizer.state[parameter]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if num_training_steps <= self.ppo.critic_warmup_steps:
            raise RunError(
                f"`ppo.critic_warmup_steps` ({self.ppo.critic_warmup_steps}) leaves none of the {num_training_steps} "
                "steps to the policy",
                fix="lower it, or train longer",
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.ppo.critic_learning_rate is not None:
            own = {id(parameter) for parameter in self.critic.parameters()}
            for group in list(optimizer.param_groups):
                theirs = [one for one in group["params"] if id(one) in own]
                group["params"] = [one for one in group["params"] if id(one) not in own]
                if theirs:
                    optimizer.add_param_group({**group, "params": theirs, "lr": self.ppo.critic_learning_rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        model: Any = self.model
        policy, critic = split_state(model.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, policy)
        if self.args.should_save and critic:
            save_critic(critic, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # which has loaded it with the rest
            load_critic(self.critic, Path(resume_from_checkpoint))


def hide_critic(generation: Any) -> None:
    """Keep the critic's weights from vLLM, which has no place for them; every process still gathers them."""
    everything = generation._iter_named_params
    generation._iter_named_params = lambda: (one for one in everything() if not one[0].startswith(f"{CRITIC}."))
