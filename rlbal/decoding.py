"""Decoding without waste: what transformers' `generate` does for every row to the very end, for the rows that need it.

`generate` computes finished rows until the last one is done, computes a prompt once for each of its rollouts, and
copies the whole cache for every token. Here finished rows leave the batch and the cache, a prompt is computed once, and
keys and values are written into a buffer with room to grow (`rlbal.growing_cache`). All else is `generate`'s own, since
this is a decoding method for its public argument `custom_generate`: logits processors (temperature, top-k, top-p,
min-p, penalties …), stopping criteria and position ids are what the generation config and the model say.

Each row draws its tokens from uniform numbers of its own, through the inverse of the cumulative distribution. So a
completion depends on the model, the prompt and these numbers, and not on the rows that happen to be in its batch.

Shapes: R rows, U different prompts among them, A rows still active, L tokens so far, T completion tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from rlbal.errors import RunError
from rlbal.growing_cache import GrowingLayer

# Dropping rows copies the cache, so it waits until this share of them is done.
DROP_SHARE = 1 / 8
# Looking which rows are done makes an accelerator wait for its work; a CPU has done it anyway.
STEPS_BETWEEN_LOOKS = {"cpu": 1, "other": 16}
OnFinished = Callable[[list[int], list[list[int]]], None]


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    uniforms_RT: npt.NDArray[np.float64] | None,
    *,
    on_finished: OnFinished = lambda rows, completions: None,
    device: torch.device | None = None,
    synced: bool = False,
) -> list[list[int]]:
    """Complete R prompts at once.

    Args:
        model: an unwrapped causal LM, or a PEFT model around one; `rlbal.decodable.unsupported` must find nothing.
        prompts: R lists of tokens; equal ones are computed once.
        config: settings of `generate`; `max_new_tokens` at least 1, `pad_token_id` set.
        uniforms_RT: numbers in [0, 1) for R rows and `max_new_tokens` tokens; None for the likeliest tokens.
        on_finished: called with rows that are done, and their completions, while others go on; every row once.
        device: default the model's.
        synced: the weights lie in parts on several processes, so that each must call the model as often as the others.

    Returns:
        R completions with their end token, at least one token each.

    Raises:
        RunError: the probabilities are not finite.
    """
    place: dict[tuple[int, ...], int] = {}
    prompt_of_row = [place.setdefault(tuple(prompt), len(place)) for prompt in prompts]
    width, device = max(map(len, place)), device or model.device
    pad = config.pad_token_id
    ids_UL = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in place], device=device)
    mask_UL = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in place], device=device)
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    rows = _Rows(
        torch.tensor(prompt_of_row, device=device),
        None if uniforms_RT is None else torch.from_numpy(uniforms_RT).to(device, precision(device)),
        on_finished,
        synced,
    )
    # Not inference_mode: buffers that a model caches in its forward must stay usable for training.
    with torch.no_grad():
        model.generate(
            input_ids=ids_UL,
            attention_mask=mask_UL,
            past_key_values=cache,
            generation_config=config,
            custom_generate=_decode,
            rows=rows,
        )
    return [rows.completions[row] for row in range(len(prompts))]


def precision(device: torch.device) -> torch.dtype:
    """Over 150,000 tokens a float32 sum is off by more than the rarest tokens weigh; but Apple's GPUs have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class _Rows:
    """The rows of one call, and what has become of them."""

    prompt_of_row: torch.Tensor  # (R,), int64
    uniforms_RT: torch.Tensor | None
    on_finished: OnFinished
    synced: bool
    completions: dict[int, list[int]] = field(default_factory=dict)


@dataclass
class _Active:
    """The rows that are being decoded. All but the cache have an entry per row; L counts prompt and completion."""

    row_A: torch.Tensor  # which of the R rows it is
    ids_AL: torch.Tensor  # room for the longest completion
    mask_AL: torch.Tensor | None  # 1 also where tokens are still to come; None if no prompt is padded
    position_A1: torch.Tensor | None  # of the next token
    length_A: torch.Tensor  # tokens of its completion once it is done, until then 0
    settled_A: torch.Tensor  # whether its completion has been handed over
    cache: DynamicCache
    settled: int = 0  # how many have been handed over

    @classmethod
    def after_prefill(cls, input_ids: torch.Tensor, rows: _Rows, T: int, model_kwargs: dict[str, Any]) -> Self:
        """Every row starts as a copy of its prompt's."""
        index_R = rows.prompt_of_row
        room = input_ids.new_ones(len(index_R), T)
        mask, position, cache = (model_kwargs.get(key) for key in ("attention_mask", "position_ids", "past_key_values"))
        assert isinstance(cache, DynamicCache)
        cache.batch_select_indices(index_R)
        if position is not None:
            position = position[:, -1:].expand(len(input_ids), 1)[index_R] + 1
        return cls(
            torch.arange(len(index_R), device=index_R.device),
            torch.cat([input_ids[index_R], room], dim=1),
            None if mask is None else torch.cat([mask[index_R], room.to(mask)], dim=1),
            position,
            torch.zeros_like(index_R),
            torch.zeros_like(index_R, dtype=torch.bool),
            cache,
        )

    def keep(self, indices: torch.Tensor) -> None:
        """Go on with these rows alone, none of which is done."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, torch.Tensor):
                setattr(self, one.name, value[indices])
        self.cache.batch_select_indices(indices)
        self.settled = 0

    def settle(self, rows: _Rows, prompt_length: int) -> int:
        """Hand over the completions that are done since the last call; how many."""
        before, self.settled = self.settled, int(self.length_A.count_nonzero())
        if self.settled == before:
            return 0
        new = ((self.length_A > 0) & ~self.settled_A).nonzero()[:, 0]
        self.settled_A[new] = True
        names, lengths = self.row_A[new].tolist(), self.length_A[new].tolist()
        tokens = self.ids_AL[new, prompt_length : prompt_length + max(lengths)].tolist()
        done = [some[:length] for some, length in zip(tokens, lengths, strict=True)]
        rows.completions |= dict(zip(names, done, strict=True))
        rows.on_finished(names, done)
        return len(done)


def _decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    rows: _Rows,
    **model_kwargs: Any,
) -> torch.Tensor:
    """The decoding method; the arguments are those that `generate` gives its own."""
    P, T, device = input_ids.shape[1], generation_config.max_new_tokens, input_ids.device
    look_every = STEPS_BETWEEN_LOOKS["cpu" if device.type == "cpu" else "other"]
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    logits_AV = model(**inputs, return_dict=True).logits[rows.prompt_of_row, -1]
    active, finite = _Active.after_prefill(input_ids, rows, T, model_kwargs), torch.tensor(True, device=device)
    _tell_padding(logits_processor, active)
    left = len(active.row_A)
    for step in range(T):
        L = P + step
        scores_AV = logits_processor(active.ids_AL[:, :L], logits_AV.float())  # type: ignore[arg-type]
        if rows.uniforms_RT is None:
            token_A = scores_AV.argmax(dim=-1)
        else:
            token_A, ok = draw(scores_AV, rows.uniforms_RT[active.row_A, step])
            finite &= ok
        active.ids_AL[:, L] = token_A
        over_A = stopping_criteria(active.ids_AL[:, : L + 1], None)
        active.length_A += (step + 1) * (over_A & (active.length_A == 0))
        if (step + 1) % look_every == 0 or step + 1 == T:
            left -= active.settle(rows, P)
            if not _anyone_left(left, rows.synced, device):
                break
            if 0 < left <= (1 - DROP_SHARE) * len(active.row_A):
                active.keep((active.length_A == 0).nonzero()[:, 0])
                _tell_padding(logits_processor, active)
                token_A = active.ids_AL[:, L]
        model_kwargs["attention_mask"] = None if active.mask_AL is None else active.mask_AL[:, : L + 1]
        model_kwargs["position_ids"] = active.position_A1
        inputs = model.prepare_inputs_for_generation(token_A[:, None], **model_kwargs)
        logits_AV = model(**inputs, return_dict=True).logits[:, -1]
        if active.position_A1 is not None:
            active.position_A1 = active.position_A1 + 1
    check_finite(finite)
    return input_ids


def _tell_padding(processors: LogitsProcessorList, active: _Active) -> None:
    """The penalty on repetitions knows how much padding each row has, and got it for prompts."""
    for one in processors:
        if isinstance(getattr(one, "prompt_ignore_length", None), torch.Tensor) and active.mask_AL is not None:
            one.prompt_ignore_length = active.mask_AL.int().argmax(dim=1)


def _anyone_left(left: int, synced: bool, device: torch.device) -> bool:
    """Whether the model is to be called again; with weights in parts, as long as any process has rows left."""
    if synced:
        everywhere = torch.tensor(float(left), device=device)
        torch.distributed.all_reduce(everywhere)
        return bool(everywhere > 0)
    return left > 0


def draw(scores_AV: torch.Tensor, uniform_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row by the inverse of its cumulative distribution.

    Args:
        scores_AV: log-probabilities up to a constant.
        uniform_A: numbers in [0, 1).

    Returns:
        The tokens, shape (A,), and whether all probabilities were finite; if not, the tokens mean nothing.
    """
    cdf_AV = scores_AV.softmax(dim=-1).cumsum(dim=-1, dtype=uniform_A.dtype)
    total_A1 = cdf_AV[:, -1:]
    token_A1 = torch.searchsorted(cdf_AV, uniform_A[:, None] * total_A1, right=True)
    return token_A1.clamp(max=scores_AV.shape[-1] - 1)[:, 0], total_A1.isfinite().all()


def check_finite(finite: torch.Tensor) -> None:
    """Raise RunError unless all probabilities were finite."""
    if not finite:
        raise RunError(
            "the policy's token probabilities are not finite, so nothing can be sampled from it",
            why="its weights or logits hold NaN or infinity; training has most likely diverged",
            fix="go back to an earlier checkpoint and lower `trainer.learning_rate` or `trainer.max_grad_norm`",
        )
