"""What is trained in each measurement: model, prompts, completion lengths, batch.

Completions are really sampled, but a random model's lengths mean nothing. So a hook on the model's output decides by a
coin, row by row and token by token, whether the next token is the end token. The coin's probability is the hazard of
the wanted length distribution. The sampler and everything after it see ordinary logits.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from rlbal.recipe import TinySection
from rlbal.tiny import build_model, build_tokenizer

SHORTEST = 4  # tokens, the end token included
ROLLOUTS_PER_PROMPT = 8


@dataclass(frozen=True)
class Lengths:
    """Distribution of completion lengths in tokens, the end token included.

    Args:
        kind: `normal` (centre and spread are mean and standard deviation) or `lognormal` (median and sigma).
        cap: longest; what would be longer is cut there and has no end token.
    """

    kind: Literal["normal", "lognormal"]
    centre: float
    spread: float
    cap: int

    def cdf_T(self) -> np.ndarray:
        """P(length <= t + 1) for t = 0 … cap − 1, with the cap not yet applied."""
        upper = np.arange(1, self.cap + 1) + 0.5
        away = upper - self.centre if self.kind == "normal" else np.log(upper / self.centre)
        cdf = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in away / self.spread])
        cdf[: SHORTEST - 1] = 0.0
        return cdf

    def hazards_T(self) -> np.ndarray:
        """P(completion token t is the end token | none before it was)."""
        cdf = self.cdf_T()
        before = np.concatenate([[0.0], cdf[:-1]])
        return (cdf - before) / np.maximum(1.0 - before, 1e-12)

    def draw(self, count: int, dice: np.random.Generator) -> list[tuple[int, bool]]:
        """(length, whether it ends with the end token) of `count` completions."""
        ranks = np.searchsorted(self.cdf_T(), dice.random(count))
        return [(min(int(rank) + 1, self.cap), bool(rank < self.cap)) for rank in ranks]


@dataclass(frozen=True)
class Setting:
    """One thing to measure."""

    name: str
    lengths: Lengths
    dead_share: float = 0.0
    slow_reward: bool = False
    rollouts: int = 256
    micro_batch: int = 32
    prompt_tokens: int = 12  # as in the quickstart
    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    vocabulary: int = 0  # 0: the byte tokenizer's own
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def prompts(self) -> int:
        return self.rollouts // ROLLOUTS_PER_PROMPT

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def workloads(device: Literal["cpu", "cuda"], quick: bool) -> list[Setting]:
    """The four workloads, small enough for a CPU or worth a GPU."""
    if device == "cuda":
        # 0.28 B parameters.
        size: dict[str, Any] = {"hidden_size": 1024, "layers": 20, "heads": 16, "vocabulary": 32_768}
        size |= {"rollouts": 256, "prompt_tokens": 128, "device": device}
        cap, long_cap = (64, 128) if quick else (512, 1024)
    else:
        size = {"rollouts": 32, "micro_batch": 8} if quick else {}
        cap, long_cap = (24, 48) if quick else (96, 384)
    varied = Setting("varied", Lengths("normal", cap * 40 / 96, cap * 20 / 96, cap), **size)
    return [
        varied,
        replace(varied, name="long_tail", lengths=Lengths("lognormal", long_cap * 40 / 384, 1.0, long_cap)),
        replace(varied, name="late", dead_share=0.6),
        replace(varied, name="verifier", slow_reward=True),
    ]


def growth(varied: Setting, quick: bool) -> dict[str, list[Setting]]:
    """Settings that grow from `varied` in one direction each; the name says the value that grows."""

    def longer(cap: int) -> Lengths:
        return Lengths("normal", cap * 40 / 96, cap * 20 / 96, cap)

    cap, rollouts = varied.lengths.cap, varied.rollouts
    caps = (cap // 2, cap, cap * 2) if varied.device == "cuda" else (cap // 2, cap, cap * 2, cap * 4)
    prompts = (128, 512, 1024) if varied.device == "cuda" else (12, 32, 96)
    sizes = [(1024, 20, 16), (1280, 24, 20)] if varied.device == "cuda" else [(96, 3, 4), (160, 4, 4), (256, 4, 4)]
    groups = {
        "rollouts": [replace(varied, name=str(n), rollouts=n) for n in (rollouts // 4 * 2**step for step in range(4))],
        "length cap": [replace(varied, name=str(n), lengths=longer(n)) for n in caps],
        "prompt tokens": [replace(varied, name=str(n), prompt_tokens=n) for n in prompts],
        "hidden size": [
            replace(varied, name=str(hidden), hidden_size=hidden, layers=layers, heads=heads)
            for hidden, layers, heads in sizes
        ],
        "micro-batch": [
            replace(varied, name=str(rows), micro_batch=rows) for rows in (varied.micro_batch, varied.micro_batch * 4)
        ],
    }
    return {name: settings[:2] for name, settings in groups.items()} if quick else groups


class EndTokens:
    """Forward hook that sets the end token's logit, from the position of the token that comes next.

    Needs prompts of one length. TRL's training forward returns log-probabilities and no logits: it is left alone.
    """

    def __init__(self, setting: Setting, eos: int) -> None:
        self.prompt_tokens, self.eos = setting.prompt_tokens, eos
        self.hazards_T = torch.tensor(setting.lengths.hazards_T(), dtype=torch.float32, device=setting.device)

    def __call__(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        logits_BSV = getattr(output, "logits", None)
        if logits_BSV is None:
            return
        keep = kwargs.get("logits_to_keep", 0)
        kept = slice(-keep, None) if isinstance(keep, int) else keep
        place_BS = kwargs["position_ids"][:, kept] + 1 - self.prompt_tokens
        hazard_BS = self.hazards_T[place_BS.clamp(0, len(self.hazards_T) - 1)]
        ends_BS = torch.rand_like(hazard_BS) < hazard_BS
        # Certain, or out of the question, at any temperature and in any dtype.
        logits_BSV[..., self.eos] = torch.where(ends_BS, 1e4, -1e4).to(logits_BSV.dtype)


def make_model(setting: Setting, dtype: torch.dtype, seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A random Qwen3 whose completions have the setting's lengths, and a byte tokenizer."""
    tokenizer = build_tokenizer([])
    tiny = TinySection(hidden_size=setting.hidden_size, layers=setting.layers, heads=setting.heads)
    model = build_model(tiny, tokenizer, seed)
    if setting.vocabulary:
        model.resize_token_embeddings(setting.vocabulary, mean_resizing=False)
    assert isinstance(tokenizer.eos_token_id, int)
    model = model.to(setting.device, dtype)
    model.register_forward_hook(EndTokens(setting, tokenizer.eos_token_id), with_kwargs=True)
    return model, tokenizer


def make_rows(setting: Setting, steps: int) -> Dataset:
    """Prompts for so many steps, all of one length, with the same share of dead ones in each step."""
    count = setting.prompts * steps
    dead = [index % setting.prompts < round(setting.dead_share * setting.prompts) for index in range(count)]
    prompts = [f"{index:06d}".ljust(setting.prompt_tokens, ".") for index in range(count)]
    return Dataset.from_dict({"prompt": prompts, "prompt_index": list(range(count)), "dead": dead})


def scripted_rollouts(setting: Setting) -> Any:
    """A TRL `rollout_func` whose completions depend on the prompt and the rollout's number only."""

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer, seen, completions = trainer.processing_class, dict.fromkeys(prompts, 0), []
        for prompt in prompts:
            dice = np.random.default_rng([int(prompt.partition(".")[0]), seen[prompt]])
            seen[prompt] += 1
            [(length, ends)] = setting.lengths.draw(1, dice)
            ids = dice.integers(40, 120, length).tolist()
            completions.append([*ids[:-1], tokenizer.eos_token_id] if ends else ids)
        return {"prompt_ids": tokenizer(text=prompts)["input_ids"], "completion_ids": completions, "logprobs": None}

    return rollouts
