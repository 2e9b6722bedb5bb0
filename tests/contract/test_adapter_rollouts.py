"""The rollouts of step n come from the adapter as it is after n steps, whichever engine generates.

A penalty for every completion drives the policy away from what it would say, so that it says something else after each
step. All rollouts are of the likeliest tokens, and are worked out again from weights that were put aside after each
step: the adapter merged into an ordinary model, one token at a time, without a cache.

vLLM itself does not run on a CPU. Here TRL's side of it does, which merges the adapter and hands over the weights, and
a stand-in that has nothing but the weights it was given.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback
from trl.generation import vllm_generation

from rlbal.model import lora_config
from rlbal.recipe import Recipe
from rlbal.rewards.suite import RewardSuite
from rlbal.trainer_args import training_args
from rlbal.trainers.grpo import BalancedGRPOTrainer
from rlbal.trainers.ppo import BalancedPPOTrainer
from tests.support import make_model, make_recipe, make_uneven_rows

STEPS, TOKENS = 3, 6
# Not the same for all, since then a batch would teach nothing.
PENALTY = "def penalty(prompts, **kwargs):\n    return [-1.0 - row % 2 for row in range(len(prompts))]\n"
ENGINES: dict[str, dict[str, Any]] = {
    "rlbal": {},
    "transformers": {"speed__generation": "transformers"},
    "continuous batching": {
        "trainer__use_transformers_continuous_batching": True,
        "trainer__transformers_continuous_batching_config": {
            "num_blocks": 512,  # the default cache takes gigabytes
            "max_batch_tokens": 1024,
            "page_size": 16,
        },
    },
    "vllm": {"trainer__use_vllm": True, "trainer__vllm_mode": "colocate"},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"},
    "dora": {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
}
GRPO = {"algorithm": {"name": "reinforce", "rollouts_per_prompt": 4}}
PPO = {"algorithm": {"name": "ppo", "rollouts_per_prompt": 4}, "ppo": {"whiten": False}}

Weights = dict[str, torch.Tensor]


def adapter_of(model: Any) -> Weights:
    return {name: one.detach().clone() for name, one in model.named_parameters() if "lora_" in name}


class Witness(TrainerCallback):
    """Puts the adapter aside after each step: `adapters[n]` is that of n steps."""

    def __init__(self) -> None:
        self.adapters: list[Weights] = []

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.adapters.append(adapter_of(model))

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.adapters.append(adapter_of(model))


class Heard:
    """Keeps the prompts and completions of each generation batch, and the step it was for."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> torch.Tensor:
        self.heard = [*getattr(self, "heard", []), (self.state.global_step, prompts, ids)]
        return super()._calculate_rewards(inputs, prompts, completions, ids)


class HeardGRPO(Heard, BalancedGRPOTrainer):
    pass


class HeardPPO(Heard, BalancedPPOTrainer):
    pass


class StandIn:
    """Where TRL finds vLLM's model: `load_weights` takes weights by the names of a whole model, and no others."""

    def __init__(self, recipe: Recipe) -> None:
        self.model, self.tokenizer = make_model(recipe)
        with torch.no_grad():
            for one in self.model.parameters():
                one.zero_()  # whatever is not handed over stays nothing
        self.given: set[str] = set()
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        places = dict(self.model.named_parameters())
        for name, tensor in named:
            places[name].data.copy_(tensor)
            self.given.add(name)

    def reset_prefix_cache(self) -> None:
        assert self.given == {name for name, _ in self.model.named_parameters()}
        self.given = set()

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        def answer(ids: list[int]) -> Any:
            tokens, logps = likeliest(self.model, ids, self.tokenizer.eos_token_id)
            said = [{token: SimpleNamespace(rank=1, logprob=logp)} for token, logp in zip(tokens, logps, strict=True)]
            return SimpleNamespace(prompt_token_ids=ids, outputs=[SimpleNamespace(token_ids=tokens, logprobs=said)])

        return [answer(prompt["prompt_token_ids"]) for prompt in prompts]


def likeliest(model: Any, prompt: list[int], end: int) -> tuple[list[int], list[float]]:
    """The likeliest completion, one token after the other, and the log-probabilities of its tokens."""
    tokens: list[int] = []
    logps: list[float] = []
    while len(tokens) < TOKENS and end not in tokens:
        with torch.no_grad():
            logits_V = model(torch.tensor([prompt + tokens])).logits[0, -1]
        tokens.append(int(logits_V.argmax()))
        logps.append(logits_V.log_softmax(dim=-1).max().item())
    return tokens, logps


def trained(folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Witness]:
    """A run of a few steps with the recipe's own engine."""

    def stand_in(engine: Any) -> None:
        engine.llm = StandIn(recipe)

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "_init_vllm", stand_in)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr("rlbal.trainer_args.find_spec", lambda name: object())
    args, plan = training_args(recipe, 1)
    model, tokenizer = make_model(recipe)
    witness = Witness()
    with RewardSuite(recipe.rewards) as suite:
        suite.start()
        trainer = (HeardGRPO if recipe.ppo is None else HeardPPO)(
            recipe=recipe,
            plan=plan,
            suite=suite,
            rows=make_uneven_rows(),
            eval_rows=None,
            tokenizer=tokenizer,
            model=model,
            args=args,
            peft_config=lora_config(recipe),
            callbacks=[witness],
        )
        trainer.train()
    return trainer, witness


def merged(recipe: Recipe, adapter: Weights) -> Any:
    """An ordinary model with this adapter in its weights."""
    model = get_peft_model(make_model(recipe)[0], lora_config(recipe))
    missing, unexpected = model.load_state_dict(adapter, strict=False)
    assert not unexpected and not [name for name in missing if "lora_" in name]
    return model.merge_and_unload().eval()


@pytest.mark.parametrize(
    ("engine", "adapter", "algorithm"),
    [
        *[pytest.param(engine, "lora", GRPO, id=f"{engine}-lora-grpo") for engine in ENGINES],
        *[pytest.param(engine, "lora", PPO, id=f"{engine}-lora-ppo") for engine in ("rlbal", "vllm")],
        *[pytest.param(engine, "dora", GRPO, id=f"{engine}-dora-grpo") for engine in ("transformers", "vllm")],
    ],
)
def test_rollouts_of_step_n_come_from_the_adapter_of_step_n(
    engine: str, adapter: str, algorithm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "penalty.py").write_text(PENALTY)
    recipe = make_recipe(
        tmp_path,
        **algorithm,
        **ENGINES[engine],
        lora=ADAPTERS[adapter],
        rewards__functions={"penalty": {"function": f"{tmp_path / 'penalty.py'}:penalty"}},
        trainer__max_steps=STEPS,
        trainer__max_completion_length=TOKENS,
        trainer__top_k=1,
        trainer__optim="adamw_torch",
        trainer__learning_rate=0.1,
    )
    trainer, witness = trained(tmp_path, recipe, monkeypatch)
    assert [step for step, _, _ in trainer.heard] == list(range(STEPS)) and len(witness.adapters) == STEPS + 1

    tokenizer, end = trainer.tokenizer, trainer.tokenizer.eos_token_id
    for step, prompts, completions in trainer.heard:
        said = dict(zip(prompts, completions, strict=True))
        assert all(said[prompt] == ids for prompt, ids in zip(prompts, completions, strict=True))
        own, previous = (
            {prompt: likeliest(model, tokenizer(prompt)["input_ids"], end)[0] for prompt in said}
            for model in (merged(recipe, witness.adapters[index]) for index in (step, max(step - 1, 0)))
        )
        assert said == own
        assert step == 0 or said != previous, "the step changed nothing, so this proves nothing"
