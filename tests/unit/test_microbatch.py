"""Which rows make up which part, and that a part holds them unharmed."""

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from rlbal.trainers.microbatch import PART_TOKENS, Compaction, compact, forward_in_parts, plan_parts, token_counts

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
PAD = -1
PROMPTS, COMPLETIONS = 9, 12  # widths that TRL has padded to, longer than any row


def lengths(rows: int, dice: np.random.Generator, kept: float = 1.0) -> Any:
    """(kept, prompt, completion) of each row."""
    parts = (dice.random(rows) < kept, dice.integers(1, PROMPTS, rows), dice.integers(1, COMPLETIONS, rows))
    return np.stack(parts, axis=1).astype(np.int64)


def cost(sizes: list[int], rows: list[tuple[int, int]], part_tokens: int) -> int:
    """What parts of consecutive rows cost: their padded tokens and a constant each."""
    total, start = 0, 0
    for size in sizes:
        some = rows[start : start + size]
        total += part_tokens + size * (max(prompt for prompt, _ in some) + max(done for _, done in some))
        start += size
    return total


def allowed(sizes: list[int], rows: list[tuple[int, int]], how: Compaction) -> bool:
    """Whether no part is too large; a single row may be. All rows count for the width of TRL's micro-batches."""
    width = max(prompt for prompt, _ in rows) + max(done for _, done in rows)
    most = how.max_tokens if how.max_tokens is not None else how.rows * width
    start = 0
    for size in sizes:
        tokens = cost([size], rows[start : start + size], 0)
        start += size
        if size > 1 and tokens > most:
            return False
    return True


def every_partition(rows: int) -> list[list[int]]:
    """All ways to cut a row of rows into consecutive parts."""
    ways = []
    for cuts in range(rows):
        for borders in combinations(range(1, rows), cuts):
            edges = [0, *borders, rows]
            ways.append([high - low for low, high in pairwise(edges)])
    return ways


@pytest.mark.parametrize("part_tokens", [0, 20, 512])
@pytest.mark.parametrize("limit", [{"rows": 1}, {"rows": 3}, {"rows": 20}, {"max_tokens": 40}, {"max_tokens": 10}])
def test_no_other_partition_is_cheaper(
    limit: dict[str, int], part_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlbal.trainers.microbatch.PART_TOKENS", part_tokens)
    how, dice = Compaction("dapo", **{"rows": 2, **limit}), np.random.default_rng(0)
    for rows in range(1, 9):
        lengths_R3 = lengths(rows, dice)
        (order,), sizes = plan_parts(lengths_R3[None], how)
        in_order = [(int(prompt), int(done)) for _, prompt, done in lengths_R3[order]]
        totals = [prompt + done for prompt, done in in_order]
        assert totals == sorted(totals, reverse=True)
        assert sorted(order.tolist()) == list(range(rows)) and sum(sizes) == rows
        assert allowed(sizes, in_order, how)
        best = min(cost(way, in_order, part_tokens) for way in every_partition(rows) if allowed(way, in_order, how))
        assert cost(sizes, in_order, part_tokens) == best


def test_a_row_over_the_budget_gets_a_part_of_its_own() -> None:
    lengths_R3 = np.array([[1, 5, 3], [1, 50, 60], [1, 4, 4]])
    (order,), sizes = plan_parts(lengths_R3[None], Compaction("dapo", rows=8, max_tokens=40))
    # 110 tokens are too many for any budget of 40; the other two make 2·(5 + 4) = 18.
    assert order.tolist() == [1, 0, 2] and sizes == [1, 2]


def test_processes_with_different_numbers_of_kept_rows() -> None:
    dice = np.random.default_rng(1)
    lengths_WR3 = np.stack([lengths(8, dice, kept) for kept in (0.3, 1.0, 0.0)])
    orders, sizes = plan_parts(lengths_WR3, Compaction("grpo", rows=3))
    kept = lengths_WR3[:, :, 0].sum(axis=1).tolist()
    assert kept[2] == 0 < kept[0] < kept[1] == 8
    assert [len(order) for order in orders] == kept
    assert sum(sizes) == 8


def test_the_plan_counts_with_the_longest_row_of_all_processes() -> None:
    """Two rows of 10 tokens would share a part of 20; on the other process they have 30, so neither process does."""
    lengths_WR3 = np.array([[[1, 5, 5], [1, 5, 5]], [[1, 5, 25], [1, 5, 25]]])
    assert plan_parts(lengths_WR3, Compaction("dapo", rows=8, max_tokens=20))[1] == [1, 1]
    assert plan_parts(lengths_WR3[:1], Compaction("dapo", rows=8, max_tokens=20))[1] == [2]


def test_nothing_kept_anywhere_leaves_each_process_its_shortest_row() -> None:
    lengths_WR3 = np.array([[[0, 5, 9], [0, 5, 3]], [[0, 2, 2], [0, 5, 9]]])
    orders, sizes = plan_parts(lengths_WR3, Compaction("grpo", rows=4))
    assert [order.tolist() for order in orders] == [[1], [0]]
    assert sizes == [1]


# Random micro-batches, in which a row can be told from its tokens: row r has the tokens 1000·r, 1000·r + 1, ….


def make_batches(number: int, size: int, seed: int, dead: float = 0.4, per_token: bool = False) -> list[dict[str, Any]]:
    """Micro-batches as TRL buffers them, with everything that it may put there."""
    dice, rows = np.random.default_rng(seed), number * size
    lengths_R3 = lengths(rows, dice, 1 - dead)
    token = torch.arange(rows)[:, None] * 1000
    prompt_mask = torch.arange(PROMPTS)[None, :] >= PROMPTS - torch.from_numpy(lengths_R3[:, 1:2])
    completion_mask = torch.arange(COMPLETIONS)[None, :] < torch.from_numpy(lengths_R3[:, 2:])
    tool_mask = torch.from_numpy(dice.random((rows, COMPLETIONS)) < 0.8)
    tool_mask[:, 0] = True  # at least one token of a row counts
    alive = torch.from_numpy(lengths_R3[:, 0])
    noise = [torch.from_numpy(dice.normal(size=(rows, COMPLETIONS))).float() for _ in range(4)]
    whole = {
        "prompt_ids": (token + torch.arange(PROMPTS)).masked_fill(~prompt_mask, PAD),
        "prompt_mask": prompt_mask.long(),
        "completion_ids": (token + 100 + torch.arange(COMPLETIONS)).masked_fill(~completion_mask, PAD),
        "completion_mask": completion_mask.long(),
        "tool_mask": tool_mask.long(),
        "old_per_token_logps": noise[0] * completion_mask,
        "ref_per_token_logps": noise[1] * completion_mask,
        "sampling_per_token_logps": noise[2] * completion_mask,
        "importance_sampling_ratio": torch.from_numpy(dice.random((rows, 1))).float(),
        "advantages": (noise[3] if per_token else noise[3][:, 0]) * (alive[:, None] if per_token else alive),
    }
    cut = {key: value.split(size) for key, value in whole.items()}
    scalar = torch.tensor(float(completion_mask.sum()))
    return [{key: value[i] for key, value in cut.items()} | {"num_items_in_batch": scalar} for i in range(number)]


def on_processes(
    batches_of: list[list[dict[str, Any]]], block: int, how: Compaction
) -> list[list[list[dict[str, Any]]]]:
    """What `compact` gives on each of several processes."""
    sent: list[torch.Tensor] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor)
        return tensor

    for batches in batches_of:
        compact(batches, block, how, record)
    results = [compact(one, block, how, lambda _: torch.cat(sent), rank) for rank, one in enumerate(batches_of)]
    assert all(result is not None for result in results)
    return results  # type: ignore[return-value]


def row_of(part: dict[str, Any], index: int) -> int:
    """Which row it is, told from its first completion token."""
    return int(part["completion_ids"][index, 0]) // 1000


def teaches(batch: dict[str, Any], index: int) -> bool:
    counted = batch["completion_mask"][index] * batch["tool_mask"][index] * batch["advantages"][index]
    return bool((counted != 0).any())


def fillers(part: dict[str, Any]) -> int:
    return int((part["completion_mask"].sum(dim=1) == 0).sum())


def assert_same_row(part: dict[str, Any], index: int, batch: dict[str, Any], source: int) -> None:
    """A row came through with all that belongs to it, and what was cut off is padding."""
    for key, value in batch.items():
        mine = part[key]
        if key in ("num_items_in_batch", "advantages"):
            continue
        theirs, found = value[source], mine[index]
        if key.startswith("prompt"):
            cut, rest = theirs[: len(theirs) - len(found)], theirs[len(theirs) - len(found) :]
        else:
            cut, rest = theirs[len(found) :], theirs[: len(found)]
        assert torch.equal(found, rest), key
        if key in ("prompt_mask", "completion_mask"):
            assert not cut.any(), key


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("limit", [{"rows": 1}, {"rows": 4}, {"max_tokens": 50}])
@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo"])
def test_every_row_that_teaches_is_there_once(loss: str, limit: dict[str, int], per_token: bool) -> None:
    how = Compaction(loss, **{"rows": 4, **limit})
    for seed, block, processes in [(0, 1, 1), (1, 2, 1), (2, 4, 2), (3, 2, 3)]:
        sources = [make_batches(4, 4, 10 * seed + rank, per_token=per_token) for rank in range(processes)]
        results = on_processes(sources, block, how)
        for batches, steps in zip(sources, results, strict=True):
            assert len(steps) == len(batches)
            for start in range(0, 4, block):
                # Rows never leave their block, and the last micro-batch of a block has something to synchronise with.
                assert steps[start + block - 1]
                parts = [part for step in steps[start : start + block] for part in step]
                kept = {4 * b + r: (b, r) for b in range(start, start + block) for r in range(4)}
                kept = {row: place for row, place in kept.items() if teaches(batches[place[0]], place[1])}
                anywhere = any(
                    teaches(some[b], r) for some in sources for b in range(start, start + block) for r in range(4)
                )
                if not anywhere:
                    assert [len(part["prompt_ids"]) for part in parts] == [1]
                    continue
                found = []
                for part in parts:
                    for index in range(len(part["prompt_ids"]) - fillers(part)):
                        found.append(row_of(part, index))
                        batch, source = kept[found[-1]]
                        assert_same_row(part, index, batches[batch], source)
                assert sorted(found) == sorted(kept)
                width = sum(batches[start][key].shape[1] for key in ("prompt_ids", "completion_ids"))
                most = limit.get("max_tokens", how.rows * width)
                for part in parts:
                    tokens = part["prompt_ids"].numel() + part["completion_ids"].numel()
                    assert tokens <= most or len(part["prompt_ids"]) == 1


def test_processes_get_parts_of_equal_rows() -> None:
    sources = [make_batches(4, 4, seed, dead) for seed, dead in ((0, 0.9), (1, 0.1), (2, 1.0))]
    for steps in zip(*on_processes(sources, 2, Compaction("grpo", rows=3)), strict=True):
        sizes = [[len(part["prompt_ids"]) for part in parts] for parts in steps]
        assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_block_without_kept_rows_is_one_row_without_advantage(loss: str) -> None:
    """With its tokens, so that TRL's entropy of it is that of tokens and not 0."""
    (steps,) = on_processes([make_batches(2, 4, 0, dead=1.0)], 2, Compaction(loss, rows=4))
    assert [len(parts) for parts in steps] == [0, 1]
    (part,) = steps[1]
    assert len(part["prompt_ids"]) == 1
    assert not part["advantages"].any()
    assert part["completion_mask"].any()


def test_rows_whose_completion_does_not_count_are_left_out() -> None:
    """Advantage or not: with every token masked (truncated, or injected by a tool), a row has no gradient."""
    for key in ("completion_mask", "tool_mask"):
        batches = make_batches(1, 4, 0, dead=0.0)
        batches[0][key][1:] = 0
        (steps,) = on_processes([batches], 1, Compaction("grpo", rows=4))
        assert [row_of(part, 0) for part in steps[0]] == [0] and len(steps[0][0]["prompt_ids"]) == 1


def test_one_token_with_advantage_is_enough() -> None:
    batches = make_batches(1, 4, 0, dead=1.0, per_token=True)
    batches[0]["advantages"][2, 0] = 1e-6  # `tool_mask` counts the first token of every row
    (steps,) = on_processes([batches], 1, Compaction("dapo", rows=4))
    (part,) = steps[0]
    assert row_of(part, 0) == 2 and part["advantages"].tolist()[0][0] == pytest.approx(1e-6)


def test_all_rows_are_kept_where_a_term_of_the_loss_needs_them() -> None:
    (steps,) = on_processes([make_batches(2, 4, 0)], 2, Compaction("dapo", rows=3, keep_all=True))
    found = [row_of(part, index) for parts in steps for part in parts for index in range(len(part["prompt_ids"]))]
    assert sorted(found) == list(range(8))


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("cut_prompts", [True, False])
def test_parts_are_as_wide_as_their_longest_rows(cut_prompts: bool, multiple: int) -> None:
    how = Compaction("dapo", rows=3, cut_prompts=cut_prompts, multiple_of=multiple)
    # TRL pads to the multiple too.
    batches = make_batches(4, 4, 5)
    for batch in batches:
        for key in ("prompt_ids", "prompt_mask"):
            batch[key] = torch.nn.functional.pad(batch[key], (3, 0), value=0 if "mask" in key else PAD)
    (steps,) = on_processes([batches], 2, how)
    parts = [part for some in steps for part in some]
    assert len(parts) > 2
    for part in parts:
        for name, trl in (("prompt", PROMPTS + 3), ("completion", COMPLETIONS)):
            longest = int(part[f"{name}_mask"].sum(dim=1).max())
            width = -(-longest // multiple) * multiple if cut_prompts or name == "completion" else trl
            assert part[f"{name}_ids"].shape[1] == part[f"{name}_mask"].shape[1] == width
        for key in ("tool_mask", "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
            assert part[key].shape == part["completion_ids"].shape
        assert part["importance_sampling_ratio"].shape == (len(part["prompt_ids"]), 1)


def test_masked_rows_do_not_widen_a_part() -> None:
    """A process without kept rows must not pay for the width of rows that it leaves out."""
    sources = [make_batches(1, 4, 0, dead) for dead in (0.0, 1.0)]
    for batch in sources[0]:
        for key, columns in (("prompt_mask", slice(-2)), ("completion_mask", slice(2, None))):
            batch[key][:, columns] = 0  # rows of 2 + 2 tokens, next to much longer ones on the other process
    assert min(sources[1][0]["prompt_mask"].sum(dim=1)) > 2 or min(sources[1][0]["completion_mask"].sum(dim=1)) > 2
    with_rows, without = on_processes(sources, 1, Compaction("grpo", rows=4, max_tokens=16))
    assert [token_counts(parts).tolist() for parts in with_rows] == [[4.0, 16.0]]
    rows, tokens = token_counts(without[0]).tolist()
    assert rows == 4 and tokens <= 16


@pytest.mark.parametrize("how", [{"multiple_of": 4}, {"cut_prompts": False}])
def test_the_token_budget_counts_all_padding(how: dict[str, Any]) -> None:
    """Also that which rounding up to a multiple adds, and that left of prompts which may not be cut."""
    budget = 64
    (steps,) = on_processes(
        [make_batches(1, 16, 3, dead=0.0)], 1, Compaction("dapo", rows=16, max_tokens=budget, **how)
    )
    assert len(steps[0]) > 2
    for part in steps[0]:
        rows, tokens = token_counts([part]).tolist()
        assert tokens <= budget or rows == 1


def test_what_does_not_belong_to_a_row_stays() -> None:
    batches = make_batches(2, 4, 0)
    before = [{key: value.clone() for key, value in batch.items()} for batch in batches]
    (steps,) = on_processes([batches], 2, Compaction("grpo", rows=4))
    for part in (part for parts in steps for part in parts):
        assert torch.equal(part["num_items_in_batch"], batches[0]["num_items_in_batch"])
    for batch, old in zip(batches, before, strict=True):
        assert all(torch.equal(batch[key], old[key]) for key in old), "TRL's own micro-batches were written to"


def test_what_is_not_known_cannot_be_cut() -> None:
    how, batches = Compaction("grpo", rows=4), make_batches(1, 4, 0)
    assert compact([batches[0] | {"pixel_values": torch.zeros(4, 3)}], 1, how) is None
    assert compact([batches[0] | {"pixel_values": None}], 1, how) is not None


# The factor of old over new normaliser, by hand. Two micro-batches of two rows belong to one step:
#
#   row   micro-batch   advantage   completion tokens   of which count
#   0     1              1.0        3                   3
#   1     1              0.0        2                   1
#   2     2              0.5        2                   2
#   3     2             -2.0        4                   3
#
# Prompts have 2 tokens. Row 1 goes; by length the rest is 3, 0, 2.


def small_batches() -> list[dict[str, Any]]:
    counts = {0: (3, 3), 1: (2, 1), 2: (2, 2), 3: (4, 3)}
    batches = []
    for rows, advantages in (((0, 1), [1.0, 0.0]), ((2, 3), [0.5, -2.0])):
        shape = torch.arange(4)[None, :]
        there, count = (torch.tensor([counts[row][i] for row in rows])[:, None] for i in (0, 1))
        batches.append(
            {
                "prompt_ids": torch.ones(2, 2, dtype=torch.long),
                "prompt_mask": torch.ones(2, 2, dtype=torch.long),
                "completion_ids": torch.tensor(rows)[:, None] * 1000 + shape,
                "completion_mask": (shape < there).long(),
                "tool_mask": (shape < count).long(),
                "advantages": torch.tensor(advantages),
            }
        )
    return batches


def factored(loss: str, part_tokens: int, monkeypatch: pytest.MonkeyPatch, per_token: bool) -> list[float]:
    """The advantages of rows 3, 0 and 2 after compaction."""
    monkeypatch.setattr("rlbal.trainers.microbatch.PART_TOKENS", part_tokens)
    batches = small_batches()
    if per_token:
        for batch in batches:
            batch["advantages"] = batch["advantages"][:, None].repeat(1, 4)
    (steps,) = on_processes([batches], 2, Compaction(loss, rows=3))
    parts = [part for some in steps for part in some]
    assert [len(part["prompt_ids"]) for part in parts] == ([3] if part_tokens else [1, 1, 1])
    assert [row_of(part, index) for part in parts for index in range(len(part["prompt_ids"]))] == [3, 0, 2]
    if per_token:
        for part in parts:
            assert part["advantages"].shape == part["completion_ids"].shape
            assert (part["advantages"] == part["advantages"][:, :1]).all()
        return [row[0] for part in parts for row in part["advantages"].tolist()]
    return [value for part in parts for value in part["advantages"].tolist()]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("losses", "together", "alone"),
    [
        # Rows: from micro-batches of 2 to one part of 3, a factor of 3/2; to parts of 1, 1/2.
        (("grpo", "sapo", "luspo", "dr_grpo"), [-3.0, 1.5, 0.75], [-1.0, 0.5, 0.25]),
        # Tokens that count: 3 + 1 = 4 in micro-batch 1, 2 + 3 = 5 in micro-batch 2, 3 + 3 + 2 = 8 in one part.
        # Together: row 3 -2·8/5, row 0 1·8/4, row 2 0.5·8/5. Alone: -2·3/5, 1·3/4, 0.5·2/5.
        (("bnpo",), [-3.2, 2.0, 0.8], [-1.2, 0.75, 0.2]),
        # Tokens of the generation batch, which stay the same.
        (("dapo", "cispo", "vespo"), [-2.0, 1.0, 0.5], [-2.0, 1.0, 0.5]),
    ],
)
def test_the_factor_by_hand(
    losses: tuple[str, ...],
    together: list[float],
    alone: list[float],
    per_token: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for loss in losses:
        assert factored(loss, 512, monkeypatch, per_token) == pytest.approx(together, rel=1e-6)
        assert factored(loss, 0, monkeypatch, per_token) == pytest.approx(alone, rel=1e-6)


def test_every_loss_is_in_the_table_above() -> None:
    from rlbal.trainer_section import CHOICES

    assert set(CHOICES["loss_type"]) == set(LOSSES)
    assert PART_TOKENS > 0


# Log-probabilities of a whole batch, part by part.


def masked_sums(calls: list[tuple[int, ...]]) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """A stand-in for a model: at each completion token the sum of the tokens up to it; 0 at padding."""

    def forward(ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
        calls.append(tuple(ids.shape))
        sums = (ids * mask).cumsum(dim=1) * mask
        return sums[:, -keep:].double()

    return forward


@pytest.mark.parametrize("cut_prompts", [True, False])
def test_log_probabilities_in_parts_are_those_of_the_whole(cut_prompts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlbal.trainers.microbatch.PART_TOKENS", 8)
    how = Compaction("grpo", rows=4, cut_prompts=cut_prompts)
    inputs, sent = [], []
    for seed in (0, 1):
        (batch,) = make_batches(1, 16, seed)
        batch["completion_mask"][3] = 0  # as TRL masks a truncated completion
        both = [torch.cat([batch[f"prompt_{of}"], batch[f"completion_{of}"]], dim=1) for of in ("ids", "mask")]
        inputs.append(both)
        lengths_R2 = [batch[f"{of}_mask"].sum(dim=1) for of in ("prompt", "completion")]
        sent.append(torch.stack([torch.ones(16, dtype=torch.long), *lengths_R2], dim=1))
    shapes: list[list[tuple[int, ...]]] = [[], []]
    for rank, (ids, mask) in enumerate(inputs):
        expected = masked_sums([])(ids, mask, COMPLETIONS)
        gather = lambda _: torch.cat(sent)  # noqa: E731
        found = forward_in_parts(masked_sums(shapes[rank]), ids, mask, COMPLETIONS, how, gather, rank)
        assert torch.equal(found, expected)
    assert [rows for rows, _ in shapes[0]] == [rows for rows, _ in shapes[1]]
    assert sum(rows for rows, _ in shapes[0]) == 16
    assert max(rows * width for rows, width in shapes[0]) <= 4 * inputs[0][0].shape[1]
    tokens = sum(rows * width for rows, width in shapes[0])
    assert tokens < 0.9 * 16 * (PROMPTS + COMPLETIONS)
