"""Samples for evaluation that depend only on the model, the seed and the prompt.

One uniform number per token is drawn in advance from a generator of each sample's own, and the token is read off the
cumulative distribution at that number (`rlbal.decoding`). So a sample does not change with the batch it lands in, the
batch size or the number of processes (but for rounding in the logits), and the random state that training draws from is
never touched.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import TemplateError
from rich.console import Console
from rich.progress import track
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlbal.decodable import unsupported
from rlbal.decoding import check_finite, decode, draw, precision
from rlbal.errors import DataError, RecipeError
from rlbal.recipe import EvaluationSection
from rlbal.scoring import Prompt, Sample


class InverseCdf(LogitsProcessor):
    """Leaves only the token that `draw` gives, for models that only transformers' own decoding can handle.

    Args:
        uniforms_BT: numbers in [0, 1), one per row and completion token.
        prompt_length: tokens before the completion, padding included.
    """

    def __init__(self, uniforms_BT: torch.Tensor, prompt_length: int) -> None:
        self.uniforms_BT, self.prompt_length = uniforms_BT, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token_B, finite = draw(scores, self.uniforms_BT[:, input_ids.shape[1] - self.prompt_length])
        check_finite(finite)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """All tokens that end a completion: those of the model's generation config and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})


def prompt_token_ids(
    tokenizer: Any, prompts: Sequence[Prompt], chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """Tokenize prompts as TRL's trainer does: chat messages through the chat template, text as it is.

    Raises:
        RecipeError: chat messages, but the tokenizer has no chat template.
        DataError: the chat template refuses a prompt, or a prompt has no tokens.
    """
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        ids = tokenizer(text=list(prompts))["input_ids"]
    elif not tokenizer.chat_template:
        raise RecipeError(
            "the prompts are chat messages, but the model's tokenizer has no chat template",
            fix="set `data.conversational: false` and leave out `data.system`, or use an instruction-tuned model",
        )
    else:
        try:
            encoded = tokenizer.apply_chat_template(
                conversation=list(prompts),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(chat_template_kwargs or {}),
            )
        except TemplateError as error:
            raise DataError(
                "the model's chat template refuses a prompt",
                why=str(error),
                fix="some templates allow no system message: move `data.system` into `data.prompt`",
            ) from None
        ids = encoded["input_ids"]
    for index, row in enumerate(ids):
        if not row:
            raise DataError(f"prompt {index} has no tokens", fix="look at `data.prompt` and that row's columns")
    return ids


@contextmanager
def _only_for_generation(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and `config` in place of the model's own, from which `generate` would fill every unset field."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own_config, training = owner.generation_config, [module for module in model.modules() if module.training]
    model.eval()
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = own_config
        for module in training:
            module.training = True


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _decode_all_rows(
    model: Any,
    rows: list[list[int]],
    config: GenerationConfig,
    uniforms_BT: npt.NDArray[np.float64] | None,
    device: torch.device,
) -> list[list[int]]:
    """As `rlbal.decoding.decode`, by transformers, which has a decoding loop for every model there is."""
    inputs = _left_padded(rows, int(config.pad_token_id), device)
    width, processors = inputs["input_ids"].shape[1], LogitsProcessorList()
    if uniforms_BT is not None:
        processors += [TemperatureLogitsWarper(config.temperature)] if config.temperature != 1.0 else []
        processors += [TopKLogitsWarper(config.top_k)] if config.top_k else []
        processors += [TopPLogitsWarper(config.top_p)] if config.top_p < 1.0 else []
        processors.append(InverseCdf(torch.from_numpy(uniforms_BT).to(device, precision(device)), width))
    likeliest = GenerationConfig(**{**config.to_dict(), "do_sample": False})  # what InverseCdf leaves
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=likeliest, logits_processor=processors)
    ends = config.eos_token_id or []
    return [_until_end(row, ends) for row in output[:, width:].tolist()]


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    """Tokens up to the first end token, which is kept as TRL keeps it."""
    stop = next((index for index, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: stop + 1]


def _batches(
    lengths: list[int], samples: int, batch_size: int, greedy: bool, progress: bool
) -> Iterable[list[tuple[int, int]]]:
    """(prompt, sample) pairs in batches, behind a progress bar if there is a terminal to show it on.

    Longest prompts first: rows of a batch are alike in length, and a lack of memory shows at once.
    """
    pairs = [(prompt, sample) for prompt in range(len(lengths)) for sample in range(samples)]
    pairs.sort(key=lambda pair: -lengths[pair[0]])
    console = Console(stderr=True)
    return track(
        [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)],
        "Evaluating (greedy)" if greedy else "Evaluating",
        console=console,
        transient=True,
        disable=not (progress and console.is_terminal),
    )


def _config(
    tokenizer: Any, ends: list[int], settings: EvaluationSection, max_new_tokens: int, greedy: bool
) -> GenerationConfig:
    drawn = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    return GenerationConfig(
        do_sample=not greedy,
        **({} if greedy else drawn),
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
        disable_compile=True,
    )


def generate_samples(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: EvaluationSection,
    *,
    max_new_tokens: int,
    seed: int,
    greedy: bool = False,
    positions: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    synced: bool = False,
) -> list[list[Sample]]:
    """Sample completions with the evaluation's own settings, whatever the model's generation config asks for.

    Sample s of the prompt at position p depends on (seed, p, s) and the model alone. The model's mode and generation
    config are as before when this returns. Under ZeRO-3 or FSDP every process needs the same number of prompts.

    Args:
        model: an unwrapped causal LM, or a PEFT model around one.
        prompts: texts, or lists of chat messages.
        settings: `samples_per_prompt`, `temperature`, `top_p`, `top_k` and `batch_size` are used.
        max_new_tokens: longest completion, in tokens, end token included.
        greedy: one completion of the likeliest tokens per prompt instead.
        positions: where each prompt stands in the whole evaluation; default 0, 1, 2, …
        device: default the model's.
        progress: show a bar on standard error if that is a terminal.
        chat_template_kwargs: passed to the chat template, as in TRL.
        synced: as in `rlbal.decoding.decode`.

    Returns:
        For each prompt, in the order given, its samples.

    Raises:
        RecipeError, DataError: a prompt cannot be tokenized (see `prompt_token_ids`).
        RunError: the model gives NaN.
    """
    device = torch.device(device or model.device)
    ends = end_tokens(model, tokenizer)
    config = _config(tokenizer, ends, settings, max_new_tokens, greedy)
    ids = prompt_token_ids(tokenizer, prompts, chat_template_kwargs)
    positions = range(len(ids)) if positions is None else positions
    samples = 1 if greedy else settings.samples_per_prompt
    results: dict[tuple[int, int], Sample] = {}
    with _only_for_generation(model, config):
        by_rows = unsupported(model, {}) is None
        for batch in _batches([len(row) for row in ids], samples, settings.batch_size, greedy, progress):
            prompts_of_batch = [ids[prompt] for prompt, _ in batch]
            generators = [np.random.default_rng((seed, positions[prompt], sample)) for prompt, sample in batch]
            uniforms_BT = None if greedy else np.stack([one.random(max_new_tokens) for one in generators])
            if by_rows:
                rows = decode(model, prompts_of_batch, config, uniforms_BT, device=device, synced=synced)
            else:
                rows = _decode_all_rows(model, prompts_of_batch, config, uniforms_BT, device)
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            for pair, row, text in zip(batch, rows, texts, strict=True):
                results[pair] = Sample(row, text, truncated=row[-1] not in ends)
    return [[results[prompt, sample] for sample in range(samples)] for prompt in range(len(ids))]
