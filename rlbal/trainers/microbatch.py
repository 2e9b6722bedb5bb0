"""Micro-batches without waste, at the same gradient.

TRL trains on every rollout at the width of the longest one. A row whose advantage is zero has no gradient, and neither
has padding. So the rows that optimizer steps share (never those of different steps) are taken together, rows without
advantage are left out, the rest is sorted by length and cut into *parts* that are padded to their own longest row only.

Why this is exact. Each loss of TRL averages a micro-batch over its rows or its tokens. A row that moves from a
micro-batch with D rows (or tokens) to a part with D' of them would count D / D' times as much, so its advantage is
multiplied by D' / D; every loss is proportional to a row's advantage (its sign alone decides about clipping):

    grpo, sapo, luspo, dr_grpo   D = rows
    bnpo                         D = tokens in the loss
    dapo, cispo, vespo           D = tokens of the generation batch, which no row moves out of: D' / D = 1

Terms without an advantage in front would lose rows, or weigh them differently: see `rlbal.speed.inexact`.

On several processes every part has as many rows on each of them, since some losses gather one number per row, and
there are as many parts: a process with fewer rows fills up with masked ones.

Shapes: R rows of a process, P prompt tokens, T completion tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rlbal.speed import GLOBAL_TOKEN_LOSSES

MicroBatch = dict[str, torch.Tensor]
Lengths = npt.NDArray[np.int64]

PROMPT_KEYS = ("prompt_ids", "prompt_mask")
PER_TOKEN_KEYS = (
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "advantages",
    "old_values",
    "returns",
)
REWARD_ADVANTAGES = "reward_advantages"  # (B, K): what the advantages would be for each reward alone

# What a forward and a backward pass cost apart from their tokens, in tokens: 70 to 140 with one CPU thread, more where
# dispatch weighs more. Step times are the same from 128 to 1,024.
PART_TOKENS = 256


@dataclass(frozen=True)
class Compaction:
    """How a recipe's micro-batches may be compacted.

    Args:
        loss_type: TRL's.
        rows: of one of TRL's micro-batches; a part holds as many tokens as these do with padding, so that it needs no
            more memory.
        max_tokens: tokens of a part, padding included, instead; a single row may exceed it.
        keep_all: a term of the loss needs every row, also those without advantage.
        cut_prompts: padding left of the prompts may go; not with absolute position embeddings, which it shifts.
        multiple_of: parts are padded to a multiple of it (`pad_to_multiple_of`).
    """

    loss_type: str
    rows: int
    max_tokens: int | None = None
    keep_all: bool = False
    cut_prompts: bool = True
    multiple_of: int = 1


def rules(trainer: Any, max_tokens: int | None) -> Compaction:
    """The rules for a GRPOTrainer whose loss allows it."""
    args, config = trainer.args, trainer.model.config.get_text_config()
    return Compaction(
        loss_type=args.loss_type,
        rows=args.per_device_train_batch_size,
        max_tokens=max_tokens,
        keep_all=args.beta != 0.0,
        cut_prompts=getattr(config, "rope_parameters", None) is not None,
        multiple_of=args.pad_to_multiple_of or 1,
    )


def compact(
    micro_batches: list[MicroBatch],
    block: int,
    how: Compaction,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    process_index: int = 0,
) -> list[list[MicroBatch]] | None:
    """Replace the micro-batches of a generation batch by parts.

    Args:
        micro_batches: this process's, as TRL buffers them, each of B rows.
        block: so many consecutive micro-batches always belong to one optimizer step.
        how: the rules.
        gather: concatenates a tensor over all processes.
        process_index: this process's place in what `gather` gives.

    Returns:
        For each micro-batch the parts that take its place. That may be none, but the last of a block, with which
        gradients are synchronised, has at least one. None if the batch holds what cannot be cut, such as images.
    """
    present = {key for key, value in micro_batches[0].items() if value is not None}
    if not present <= {*PROMPT_KEYS, *PER_TOKEN_KEYS, REWARD_ADVANTAGES, "num_items_in_batch"}:
        return None
    lengths_SB3 = torch.stack([_lengths(one, how) for one in micro_batches])
    lengths_WSB3 = gather(lengths_SB3).view(-1, *lengths_SB3.shape).cpu().numpy()
    result: list[list[MicroBatch]] = []
    for start in range(0, len(micro_batches), block):
        lengths_WR3 = lengths_WSB3[:, start : start + block].reshape(len(lengths_WSB3), -1, 3)
        orders, sizes = plan_parts(lengths_WR3, how)
        group = [{key: one[key] for key in present} for one in micro_batches[start : start + block]]
        parts = _cut(group, orders[process_index], sizes, lengths_WR3[process_index, :, 1:], how)
        shares = [len(parts) * step // block for step in range(block + 1)]
        result += [parts[low:high] for low, high in pairwise(shares)]
    return result


def _lengths(micro_batch: MicroBatch, how: Compaction) -> torch.Tensor:
    """Whether a row is kept, and the columns that its prompt and its completion need: (B, 3)."""
    advantages = micro_batch["advantages"]
    teaches_BT = (advantages if advantages.dim() == 2 else advantages[:, None]) != 0
    kept_B = (teaches_BT & in_loss(micro_batch).bool()).any(dim=1) | how.keep_all
    needed_B2 = columns_needed(micro_batch["prompt_mask"], micro_batch["completion_mask"], how)
    return torch.cat([kept_B.long()[:, None], needed_B2], dim=1)


def columns_needed(prompt_mask: torch.Tensor, completion_mask: torch.Tensor, how: Compaction) -> torch.Tensor:
    """Columns of the prompts and of the completions without padding that may go: (B, 2)."""
    prompt_B, completion_B = prompt_mask.sum(dim=1), completion_mask.sum(dim=1)
    if not how.cut_prompts:
        prompt_B = torch.full_like(prompt_B, prompt_mask.shape[1])
    return -(-torch.stack([prompt_B, completion_B.clamp(min=1)], dim=1) // how.multiple_of) * how.multiple_of


def in_loss(micro_batch: MicroBatch) -> torch.Tensor:
    """The mask of the tokens that TRL's losses count: (B, T)."""
    mask_BT = micro_batch["completion_mask"]
    return mask_BT * micro_batch["tool_mask"] if "tool_mask" in micro_batch else mask_BT


def plan_parts(lengths_WR3: Lengths, how: Compaction) -> tuple[list[Lengths], list[int]]:
    """Decide which rows make up which part, from what every process knows of all processes.

    Args:
        lengths_WR3: for each of W processes, whether a row is kept, and its prompt and completion lengths.
        how: the rules.

    Returns:
        Each process's kept rows, longest first, and the sizes of the parts that all of them cut these into. The sizes
        sum to the largest number of kept rows. If no process keeps any, each keeps a short one: its gradient is zero as
        it should be, and what TRL logs of it is true.
    """
    orders, nothing = [], not lengths_WR3[:, :, 0].any()
    for lengths_R3 in lengths_WR3:
        kept = np.flatnonzero(lengths_R3[:, 0])
        if nothing:
            kept = lengths_R3[:, 1:].sum(axis=1).argmin(keepdims=True)
        orders.append(kept[np.argsort(-lengths_R3[kept, 1:].sum(axis=1), kind="stable")])
    longest_R2 = np.ones((max(len(order) for order in orders), 2), dtype=np.int64)
    for order, lengths_R3 in zip(orders, lengths_WR3, strict=True):
        longest_R2[: len(order)] = np.maximum(longest_R2[: len(order)], lengths_R3[order, 1:])
    widest = int(lengths_WR3[:, :, 1:].max(axis=(0, 1)).sum())
    return orders, _sizes(longest_R2, how.max_tokens or how.rows * widest)


def _sizes(lengths_R2: Lengths, max_tokens: int) -> list[int]:
    """Sizes of consecutive parts that cost least together, by dynamic programming from the last row.

    A part of n rows costs `PART_TOKENS` and n times its width, which is its longest prompt plus its longest completion.
    """
    R = len(lengths_R2)
    limit = max(1, max_tokens // int(lengths_R2.sum(axis=1).min()))
    least_R, size_R = np.zeros(R + 1), np.zeros(R, dtype=np.int64)
    for first in range(R - 1, -1, -1):
        widths = np.maximum.accumulate(lengths_R2[first : first + limit], axis=0).sum(axis=1)
        tokens = widths * np.arange(1, len(widths) + 1)
        cost = PART_TOKENS + tokens + least_R[first + 1 : first + 1 + len(widths)]
        cost[1:][tokens[1:] > max_tokens] = np.inf
        size_R[first] = 1 + int(cost.argmin())
        least_R[first] = cost.min()
    sizes: list[int] = []
    while sum(sizes) < R:
        sizes.append(int(size_R[sum(sizes)]))
    return sizes


def _cut(
    group: list[MicroBatch], order: Lengths, sizes: list[int], lengths_R2: Lengths, how: Compaction
) -> list[MicroBatch]:
    """Parts of the given sizes from the rows in `order`; where these do not suffice, from masked copies of a row."""
    device = group[0]["prompt_ids"].device
    filler = int(lengths_R2[:, 0].argmin())
    padded = np.concatenate([order, np.full(sum(sizes) - len(order), filler)])
    index_of_part = [torch.from_numpy(rows).to(device) for rows in np.split(padded, np.cumsum(sizes)[:-1])]
    parts: list[MicroBatch] = [{} for _ in sizes]
    # Masked rows are cut to the width of the others.
    columns_R2 = np.concatenate([lengths_R2[order], np.full((sum(sizes) - len(order), 2), how.multiple_of)])
    columns_of_part = [some.max(axis=0).tolist() for some in np.split(columns_R2, np.cumsum(sizes)[:-1])]
    for key in group[0]:
        scalar = group[0][key].dim() == 0
        whole = group[0][key] if scalar else torch.cat([one[key] for one in group])
        for part, index, columns in zip(parts, index_of_part, columns_of_part, strict=True):
            part[key] = whole if scalar else _narrow(key, whole, *columns).index_select(0, index)
    old_R = torch.cat([_normaliser(one, how.loss_type).expand(len(one["prompt_ids"])) for one in group])
    used = 0
    for part, index in zip(parts, index_of_part, strict=True):
        used += len(index)
        if (fillers := min(used - len(order), len(index))) > 0:
            for key in {*PER_TOKEN_KEYS, REWARD_ADVANTAGES} & {*part} - {"completion_ids"}:
                part[key][-fillers:] = 0
        factor_B = _normaliser(part, how.loss_type) / old_R[index]
        for key in {"advantages", REWARD_ADVANTAGES} & {*part}:
            values = part[key]
            part[key] = values * (factor_B if values.dim() == 1 else factor_B[:, None]).to(values)
    return parts


def _narrow(key: str, whole: torch.Tensor, longest_P: int, longest_T: int) -> torch.Tensor:
    """A tensor of all rows without the columns that are padding for the rows of a part, as a view."""
    if key in PROMPT_KEYS:
        return whole[:, -longest_P:]
    # A ratio per sequence has one column, and an advantage per row none.
    per_token = key != REWARD_ADVANTAGES and whole.dim() == 2 and whole.size(1) > 1
    return whole[:, :longest_T] if per_token else whole


def _normaliser(micro_batch: MicroBatch, loss_type: str) -> torch.Tensor:
    """What the loss of a micro-batch is divided by, up to what all of them share."""
    if loss_type in GLOBAL_TOKEN_LOSSES:
        return torch.ones(1, device=micro_batch["prompt_ids"].device)
    if loss_type == "bnpo":
        return in_loss(micro_batch).sum().clamp(min=1).float().view(1)
    return torch.full((1,), float(len(micro_batch["prompt_ids"])), device=micro_batch["prompt_ids"].device)


def token_counts(parts: list[MicroBatch]) -> torch.Tensor:
    """Rows, and their tokens with padding: (2,), float."""
    tokens = sum(part[key].numel() for part in parts for key in ("prompt_ids", "completion_ids"))
    return torch.tensor([float(sum(len(part["prompt_ids"]) for part in parts)), float(tokens)])


def forward_in_parts(
    forward: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_width: int,
    how: Compaction,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    process_index: int = 0,
) -> torch.Tensor:
    """Log-probabilities of a whole batch from parts of rows of similar length, without padding but their own.

    Args:
        forward: gives (B, T) log-probabilities, or (B, T + 1, C) of several kinds, for (B, P + T) tokens, their mask,
            and T.
        input_ids, attention_mask: R rows of left-padded prompts and right-padded completions.
        completion_width: columns of the completions, padding included.
        how, gather, process_index: as in `compact`; all processes call `forward` equally often.

    Returns:
        (R, `completion_width`), or (R, `completion_width` + 1, C), with 0 in the columns that a part has not, which is
        what TRL has at padding.
    """
    R, border = len(input_ids), input_ids.shape[1] - completion_width
    lengths_R2 = columns_needed(attention_mask[:, :border], attention_mask[:, border:], how)
    lengths_R3 = torch.cat([torch.ones_like(lengths_R2[:, :1]), lengths_R2], dim=1)
    lengths_WR3 = gather(lengths_R3).view(-1, R, 3).cpu().numpy()
    orders, sizes = plan_parts(lengths_WR3, how)
    order, lengths = orders[process_index], lengths_WR3[process_index, :, 1:]
    result_RT: torch.Tensor | None = None
    for rows in np.split(order, np.cumsum(sizes)[:-1]):
        longest_P, longest_T = lengths[rows].max(axis=0).tolist()
        columns = slice(border - longest_P, border + longest_T)
        index = torch.from_numpy(rows).to(input_ids.device)
        part = forward(input_ids[index, columns], attention_mask[index, columns], longest_T)
        if result_RT is None:
            extra = part.shape[1] - longest_T
            result_RT = part.new_zeros(R, completion_width + extra, *part.shape[2:])
        result_RT[index, : part.shape[1]] = part
    assert result_RT is not None
    return result_RT
