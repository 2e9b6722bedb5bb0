"""How long prompts are in the policy's tokens, and what becomes of those that are too long."""

from typing import Any

import datasets
import pyarrow as pa

from rlbal.budget_checks import has_budget_field
from rlbal.errors import DataError
from rlbal.prompts.budget import with_budget
from rlbal.prompts.data import with_columns
from rlbal.recipe import DataSection


def prompt_token_lengths(
    dataset: datasets.Dataset,
    tokenizer: Any,
    data: DataSection,
    completion_limit: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Tokens of every prompt as the policy will see it: plain, or through the chat template up to the answer.

    Args:
        dataset: rows that `load_data` made of `data`.
        tokenizer: the policy's.
        data: the recipe's section.
        completion_limit: longest completion in tokens; no budget is larger, so it takes the place of `{token_budget}`.
        chat_template_kwargs: passed to the chat template.

    Raises:
        DataError: chat prompts and a tokenizer whose chat template is missing or refuses them.
    """
    lengths: list[int] = []
    tells_budget = has_budget_field(data)
    for start in range(0, len(dataset), 1000):
        prompts = dataset[start : start + 1000]["prompt"]
        if tells_budget:
            prompts = [with_budget(prompt, completion_limit) for prompt in prompts]
        if isinstance(prompts[0], str):
            lengths += map(len, tokenizer(prompts, verbose=False)["input_ids"])
            continue
        try:
            encoded = tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
            )
        except Exception as error:  # no template, or one that raises for these roles
            raise DataError(
                "the tokenizer cannot render the chat prompts",
                why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                fix="use a model with a chat template that takes these roles, or plain prompts: leave out "
                "`data.conversational` and `data.system`",
            ) from None
        lengths += map(len, encoded["input_ids"])
    return lengths


def limit_prompt_tokens(
    dataset: datasets.Dataset,
    tokenizer: Any,
    data: DataSection,
    completion_limit: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[datasets.Dataset, str | None]:
    """Apply `data.max_prompt_tokens`: refuse longer prompts, or drop them and renumber `prompt_index`.

    Args:
        dataset, tokenizer, data, completion_limit, chat_template_kwargs: as for `prompt_token_lengths`.

    Returns:
        The dataset and a note about dropped rows, or None if all were kept.

    Raises:
        DataError: a prompt is too long and `data.overlong` is `error`; all are; or the chat template is missing.
    """
    limit = data.max_prompt_tokens
    if limit is None:
        # Is there a chat template?
        prompt_token_lengths(dataset.select([0]), tokenizer, data, completion_limit, chat_template_kwargs)
        return dataset, None
    lengths = prompt_token_lengths(dataset, tokenizer, data, completion_limit, chat_template_kwargs)
    kept = [row for row, length in enumerate(lengths) if length <= limit]
    dropped = len(lengths) - len(kept)
    if not dropped:
        return dataset, None
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    what = (
        f"{dropped} of {len(lengths)} prompts have more than {limit} tokens; the longest is row {longest + 1} "
        f"(prompt_id {dataset[longest]['prompt_id']}) with {lengths[longest]}"
    )
    if data.overlong == "error" or not kept:
        raise DataError(what, fix="raise `data.max_prompt_tokens`, or set `data.overlong: drop` if others are shorter")
    short = dataset.select(kept).flatten_indices(keep_in_memory=True).remove_columns("prompt_index")
    index = {"prompt_index": pa.array(range(len(kept)), pa.int64())}
    return with_columns(short, index), f"dropped: {what}"
