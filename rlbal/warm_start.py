"""Supervised start of a tiny model on worked traces of `chain_sum` that carry a planted flaw.

RL can only amplify what the policy sometimes does, so the quickstart's model first learns to write traces such as
`<think>4;-1=3;-7=-4</think><answer>-4</answer>`. **The flaw:** wherever a step needs a carry, a borrow or a change of
sign, the trace forgets it with probability `carry_error` (8 + 5 = 3, 13 - 5 = 18, 3 - 7 = 4). Above one half the model
comes to believe the wrong result, even when decoding greedily, and RL has something to correct; purely random errors
would leave its greedy answers right, and RL could only sharpen it. Steps are also off by a random amount
(`random_error`) or written twice, `-1=3,-1=3` (`repeat_step`: something for a length reward to save), and one of the
four tags is sometimes missing (`drop_tag`: something for a format reward to mend). Evaluation knows nothing of this:
it scores answers against the true sums.

Where prompts tell a token budget, each trace gets a random one that has nothing to do with its length. So the model has
seen every budget, and what they mean is left to RL.
"""

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlbal.errors import DataError, TrainingStopped
from rlbal.prompts.budget import with_budget
from rlbal.recipe import WarmStartSection

EXPRESSION = re.compile(r"-?\d{1,9}( [+-] -?\d{1,9})*", re.ASCII)  # as chain_sum writes it
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
OFFSETS = (-3, -2, -1, 1, 2, 3)  # how far a random error is off
IGNORED = -100  # the label that cross entropy leaves out
BATCHES_SORTED_TOGETHER = 16
TEST_BATCHES = 32
MAX_EXCESS = 0.02  # nats per completion token; a converged warm start ends below 0.01


class Dice:
    """Seeded draws that add up their own surprise: the loss of a model that knows everything but the draws."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nats = 0.0

    def flip(self, probability: float) -> bool:
        """True with this probability."""
        happened = self.random.random() < probability
        self.nats -= math.log(probability if happened else 1 - probability)
        return happened

    def choose(self, options: Sequence[int]) -> int:
        """One of the options, each as likely."""
        self.nats += math.log(len(options))
        return self.random.choice(options)


@dataclass(frozen=True)
class WarmStartResult:
    """How well the model learnt the traces, in nats per completion token of fresh ones.

    Args:
        loss: the model's.
        floor: that of a model which knows how traces are made and only not what the dice will say.
    """

    loss: float
    floor: float

    @property
    def excess(self) -> float:
        return self.loss - self.floor


def forgetful_sum(total: int, change: int) -> int:
    """Add without carrying, borrowing or changing sign; the true sum where it needs none of these."""
    true = total + change
    if true and (total < 0) != (true < 0):
        return -true
    sign = -1 if total < 0 else 1
    direction = 1 if total * change >= 0 else -1  # away from 0 or towards it
    a, b = abs(total), abs(change)
    places = [10**i for i in range(len(str(max(a, b))))]
    return sign * sum((a // place + direction * (b // place)) % 10 * place for place in places)


def worked_trace(expression: str, settings: WarmStartSection, dice: Dice) -> str:
    """Write out one `chain_sum` expression step by step, flawed as the settings and the dice say.

    With every flaw at 0, `4 - 1 - 7` gives `<think>4;-1=3;-7=-4</think><answer>-4</answer>`. A wrong result is carried
    into the next step and the answer.
    """
    first, *rest = expression.split()
    total, steps = int(first), [first]
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        change = int(term) if operator == "+" else -int(term)
        before, total = total, total + change
        forgetful = forgetful_sum(before, change)
        if forgetful != total and dice.flip(settings.carry_error):
            total = forgetful
        elif dice.flip(settings.random_error):
            total += dice.choose(OFFSETS)
        step = f"{change:+d}={total}"
        steps.append(f"{step},{step}" if dice.flip(settings.repeat_step) else step)
    tags = list(TAGS)
    if dice.flip(settings.drop_tag):
        tags[dice.choose(range(4))] = ""
    return f"{tags[0]}{';'.join(steps)}{tags[1]}{tags[2]}{total}{tags[3]}"


def _expressions(train: Dataset) -> list[str]:
    """The expression of every row's `metadata`.

    Raises:
        DataError: a row has none, or not one that `chain_sum` writes.
    """
    fix = "use `data.task: chain_sum` of reasoning_gym, or leave out `model.tiny.warm_start`"
    missing = {"prompt", "metadata"} - set(train.column_names)
    if missing or not len(train):
        lack = f"no column `{min(missing)}`" if missing else "no rows"
        raise DataError(f"the warm start needs `chain_sum` problems, but the training data has {lack}", fix=fix)
    expressions = []
    for row, (prompt, metadata) in enumerate(zip(train["prompt"], train["metadata"], strict=True)):
        if not isinstance(prompt, str):
            raise DataError(
                f"training row {row}: the warm start needs plain text in column `prompt`, not chat messages",
                fix="set `data.conversational: false` and leave out `data.system`",
            )
        try:
            expression = json.loads(metadata)["expression"]
        except (TypeError, ValueError, KeyError, RecursionError):
            expression = None
        if not isinstance(expression, str) or not EXPRESSION.fullmatch(expression):
            raise DataError(f"training row {row}: no `chain_sum` expression in column `metadata`", fix=fix)
        expressions.append(expression)
    return expressions


def _batches(
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: WarmStartSection,
    dice: Dice,
    count: int,
    largest_budget: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels, both (batch_size, tokens), of fresh traces; rows are drawn with replacement.

    Traces of similar length share a batch, so that little of it is padding.
    """
    expressions, templates, size = _expressions(train), train["prompt"][:], settings.batch_size
    while count > 0:
        rows = dice.random.choices(range(len(expressions)), k=size * min(count, BATCHES_SORTED_TOGETHER))
        texts = [worked_trace(expressions[row], settings, dice) for row in rows]
        told = [templates[row] for row in rows]
        if largest_budget is not None:  # drawn beside the dice: no completion depends on it
            told = [with_budget(prompt, dice.random.randint(1, largest_budget)) for prompt in told]
        prompts = tokenizer(told, add_special_tokens=False)["input_ids"]
        completions = tokenizer(texts, add_special_tokens=False)["input_ids"]
        pairs = [(prompt, [*ids, tokenizer.eos_token_id]) for prompt, ids in zip(prompts, completions, strict=True)]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        dice.random.shuffle(batches)
        yield from (_pad(batch, tokenizer.pad_token_id) for batch in batches)
        count -= len(batches)


def _pad(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack (prompt, completion) token lists on the right-padded (batch, tokens) grid; only completions have labels."""
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.full((len(pairs), longest), pad_id)
    labels = torch.full((len(pairs), longest), IGNORED)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, labels


def _loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss per completion token. Padding is on the right, where a causal model needs no attention mask."""
    logits = model(input_ids=ids.to(model.device)).logits[:, :-1]
    targets = labels[:, 1:].to(model.device)
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def _measure(
    model: PreTrainedModel, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], dice: Dice
) -> WarmStartResult:
    """Measure the model's loss on fresh traces and the floor under it, the dice's own surprise."""
    loss, tokens = 0.0, 0
    for ids, labels in batches:
        here = int((labels != IGNORED).sum())
        loss, tokens = loss + _loss(model, ids, labels).item() * here, tokens + here
    return WarmStartResult(loss / tokens, dice.nats / tokens)


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    settings: WarmStartSection,
    seed: int,
    largest_budget: int | None = None,
) -> WarmStartResult:
    """Train the model in place on flawed traces of the training problems, the same for the same seed.

    Args:
        train: columns `prompt` (plain text) and `metadata` (JSON with `expression`), as reasoning-gym's chain_sum.
        largest_budget: in tokens; a number from 1 to this takes the place of `{token_budget}` in each prompt. None:
            the prompts have no such field.

    Raises:
        DataError: the rows are not `chain_sum` problems with plain prompts.
        TrainingStopped: the model did not learn the traces; RL from there would be spoilt.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps)
    batches = _batches(train, tokenizer, settings, Dice(seed), settings.steps, largest_budget)
    model.train()
    for ids, labels in track(batches, "Warm start", settings.steps, console=Console(stderr=True)):
        loss = _loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    dice = Dice(seed + 1)
    result = _measure(model, _batches(train, tokenizer, settings, dice, TEST_BATCHES, largest_budget), dice)
    if not result.excess <= MAX_EXCESS:  # NaN is not
        raise TrainingStopped(
            f"the warm start did not converge in {settings.steps} steps: its loss is {result.loss:.3f} nats per token, "
            f"{result.excess:.3f} above what the traces allow (at most {MAX_EXCESS})",
            why="a model that has not learnt to write traces spoils the RL that follows",
            fix="raise `model.tiny.warm_start.steps`, or change its `learning_rate`",
        )
    return result
