"""README.md and communication.png from result.json."""

import statistics
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PROCESSES, FLEET_ROLLOUTS = 512, 65536  # what is extrapolated to
MODEL = 7e9  # parameters, for a comparison in words


def write(result: dict[str, Any], folder: Path) -> None:
    """Write both files."""
    (folder / "README.md").write_text(readme(result), encoding="utf-8")
    draw(result, folder / "communication.png")


def per_row(series: list[dict[str, Any]], owner: str) -> float:
    """Bytes for each row that a process has, from the two largest batches of a series; half of a batch is its own."""
    small, large = series[-2:]
    rows = (large["setting"]["rollouts"] - small["setting"]["rollouts"]) / 2
    return (large["bytes"][owner] - small["bytes"][owner]) / rows


def per_token(series: list[dict[str, Any]], owner: str) -> float:
    """Bytes for each token of a completion, in the same way."""
    short, long = series
    tokens = (long["setting"]["length"] - short["setting"]["length"]) * long["setting"]["rollouts"] / 2
    return (long["bytes"][owner] - short["bytes"][owner]) / tokens


def milliseconds(run: dict[str, Any], part: str) -> str:
    """Median, and the range over repetitions."""
    taken = [1e3 * seconds for seconds in run["seconds"][part]]
    return f"{statistics.median(taken):.1f} ({min(taken):.1f}–{max(taken):.1f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def exchange_table(name: str, key: str, runs: list[dict[str, Any]]) -> str:
    """Bytes and calls of one process in one step."""
    head = [name, "rlbal: bytes", "calls", "TRL: bytes", "calls", "Trainer: bytes", "text and objects: bytes"]
    rows = []
    for run in runs:
        cells = [f"{run['bytes']['rlbal']:,.0f}", f"{run['calls']['rlbal']:.0f}"]
        cells += [f"{run['bytes']['trl']:,.0f}", f"{run['calls']['trl']:.0f}", f"{run['bytes']['transformers']:,.0f}"]
        rows.append([f"{run['setting'][key]:,}", *cells, f"{run['pickled']:,.0f}"])
    return table(head, rows)


def time_table(name: str, key: str, times: dict[str, Any], series: str) -> str:
    """Milliseconds of a step's parts, with one and with two processes."""
    head = [name, "balance, 1 process", "balance, 2", "allocate, 1", "allocate, 2", "gather, 2"]
    rows = []
    for one, two in zip(times["1"][series], times["2"][series], strict=True):
        cells = [milliseconds(run, part) for part in ("balance", "allocate") for run in (one, two)]
        rows.append([f"{one[key]:,}", *cells, milliseconds(two, "gather")])
    return table(head, rows)


def readme(result: dict[str, Any]) -> str:
    """The text, with every figure from `result`."""
    found, times = result["exchanges"], {str(world): one for world, one in result["times"].items()}
    rollouts, plain = found["rollouts"], found["plain TRL"]
    plain_rollouts, plain_length = plain[: len(rollouts)], plain[len(rollouts) :]
    ours, own_calls = per_row(rollouts, "rlbal"), rollouts[-1]["calls"]["rlbal"]
    trl_row, text_token = per_row(rollouts, "trl"), per_token(plain_length, "trl")
    share = FLEET_ROLLOUTS // PROCESSES
    largest = [times[world]["rollouts"][-1] for world in ("1", "2")]
    balance, allocate = (1e3 * statistics.median(largest[0]["seconds"][part]) for part in ("balance", "allocate"))
    slower = 1e3 * statistics.median(largest[1]["seconds"]["balance"]) / balance
    gradient = {run["setting"]["rewards"]: run for run in found["gradient"]}
    fixed = {run["setting"]["rewards"]: run for run in found["rewards"]}
    probe = (gradient[4]["bytes"]["rlbal"] - gradient[2]["bytes"]["rlbal"]) - (
        fixed[4]["bytes"]["rlbal"] - fixed[2]["bytes"]["rlbal"]
    )
    most_text = plain_rollouts[-1]
    text = f"""# What travels between processes, and how long balancing takes

Written by `python benchmarks/communication/run.py` from `result.json`. GRPO on two processes over gloo on shared CPU
cores: bytes are exact, milliseconds vary (median and range of {len(largest[0]["seconds"]["balance"])} repetitions).

Bytes are those that one process puts into collective operations in one training step, counted below
`torch.distributed` and told apart by who asked for them: rlbal, TRL's GRPOTrainer, or the Trainer of transformers. Not
counted: the gradients, which DDP reduces by itself ({rollouts[0]["gradients"]:,} bytes a step for this tiny model).
Every batch has {found["length"][0]["setting"]["rollouts"]} rollouts in groups of 8, two rewards and completions of
32 tokens, except for what a table varies.

## Rollouts

{exchange_table("rollouts", "rollouts", rollouts)}

For each row that a process has, rlbal sends {ours:.0f} bytes: prompt, lengths, whether it was cut off, its budget, and
what compaction needs to give every process parts of equal size. TRL sends {trl_row:.0f} more: rewards, lengths and
what its loss logs.

## Length of completions

{exchange_table("tokens", "length", found["length"])}

Nothing grows with the length of what was written, since no text travels.

## Prompts

{exchange_table("rollouts a prompt", "per_prompt", found["prompts"])}

## Rewards

{exchange_table("rewards", "rewards", found["rewards"])}

`weighting: gradient` is the exception: on each step whose gradients it compares, it adds up one gradient of the probed
layer for each reward, {probe / 2:,.0f} bytes a reward here. That is a sum over processes of the layer's size, whatever
the number of rows.

## Plain TRL

The same rollouts in TRL's own trainer.

{exchange_table("rollouts", "rollouts", plain_rollouts)}

TRL sends every prompt and every completion to every process in every batch, as pickled text, whether or not
`log_completions` shows it: {most_text["pickled"] / most_text["bytes"]["trl"]:.0%} of TRL's bytes at
{most_text["setting"]["rollouts"]} rollouts, and {text_token:.1f} bytes more for each token. Under rlbal the text stays
where it is, unless `trainer.log_completions` asks for the table.

## Time

Of the pieces that `time/balance` and `time/allocate` add up, on made-up batches, with the dearest settings: the beta
density, and knapsack allocation from the ledger. Every process computes the whole batch by itself, from gathered
numbers, so that all of them decide alike and nothing has to be sent back.

{time_table("rollouts", "rollouts", times, "rollouts")}

{time_table("rewards (8,192 rollouts)", "rewards", times, "rewards")}

{time_table("prompts in a batch of 8,192 rollouts", "prompts_in_batch", times, "prompts")}

Milliseconds: of processor time for `balance` and `allocate`, in the first process; on the wall for `gather`, the
exchange of the rows' numbers between two processes of one machine. The largest batch took {slower:.1f} times as long to
balance with two processes as with one: they do the same at the same time, on cores and memory that they share.

![bytes and times](communication.png)

## On {PROCESSES} GPUs, in words

Not measured: nothing here ran on more than two processes. What follows is arithmetic on the figures above.

A batch of {FLEET_ROLLOUTS:,} rollouts is {share} rows on each of {PROCESSES} processes. Each would send
{share * ours / 1e3:.1f} kB of ours and receive {FLEET_ROLLOUTS * ours / 1e6:.1f} MB, in {own_calls:.0f} collective
operations a step, however long the completions are (under `weighting: gradient` the sums of the probed layer are added
to that). The gradients of a model of {MODEL / 1e9:.0f} billion parameters
in bfloat16 are {2 * MODEL / 1e9:.0f} GB in the same step. With plain TRL, completions of 4,096 tokens would at
{text_token:.1f} bytes a token bring {FLEET_ROLLOUTS * 4096 * text_token / 1e9:.1f} GB of text to every process; and a
token is a single letter here, but about four in the vocabularies of real models.

Balancing and allocating {FLEET_ROLLOUTS:,} rollouts took {balance:.0f} and {allocate:.0f} ms in one process here. That
work depends on the rollouts of the whole batch and not on the processes, each of which does all of it.
What does grow with processes is the latency of collective operations, about with the logarithm of their number; ours
add {own_calls:.0f} small ones to TRL's {rollouts[-1]["calls"]["trl"]:.0f}. No process has a part of its own that the
others wait for, except that the first one writes the log and the checkpoints.
"""
    return "\n\n".join(wrapped(paragraph) for paragraph in text.strip().split("\n\n")) + "\n"


def wrapped(paragraph: str) -> str:
    """Lines of at most 120 characters; tables and headings as they are."""
    return paragraph if paragraph[0] in "|#!" else textwrap.fill(paragraph, 120)


def draw(result: dict[str, Any], path: Path) -> None:
    """Bytes and milliseconds over the number of rollouts."""
    found, times = result["exchanges"], result["times"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    ours = found["rollouts"]
    plain = found["plain TRL"][: len(ours)]
    at = [run["setting"]["rollouts"] for run in ours]
    left.plot(at, [run["bytes"]["rlbal"] for run in ours], "o-", label="rlbal")
    left.plot(at, [run["bytes"]["trl"] for run in ours], "s-", label="TRL, under rlbal")
    left.plot(at, [run["bytes"]["trl"] for run in plain], "^--", label="TRL alone (its text too)")
    left.set(xscale="log", yscale="log", xlabel="rollouts in a batch", ylabel="bytes a process sends in a step")
    left.set_xticks(at, [f"{rollouts:,}" for rollouts in at])
    left.minorticks_off()
    colors = {"balance": "tab:blue", "allocate": "tab:orange"}
    for world, style in (("1", "-"), ("2", "--")):
        runs = times[world]["rollouts"]
        for part, marker in (("balance", "o"), ("allocate", "s")):
            middle = [1e3 * statistics.median(run["seconds"][part]) for run in runs]
            label = f"{part}, {world} process" + ("es" if world == "2" else "")
            right.plot([run["rollouts"] for run in runs], middle, marker + style, color=colors[part], label=label)
    right.set(xscale="log", yscale="log", xlabel="rollouts in a batch", ylabel="milliseconds of processor time")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
