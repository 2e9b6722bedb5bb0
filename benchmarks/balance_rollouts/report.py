"""result.json as tables: on the terminal and in README.md, where figures are never typed by hand."""

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent
LEVEL = 0.05
GOAL = 0.6  # of uniform's rollouts, for what uniform ends with
ALLOCATION_FIGURES = ("correct", "effective_gradient_ratio", "allocate_ms", "allocate_share", "tokens_generated")
WAYS = {"correct": "up", "effective_gradient_ratio": None}  # the ratio is no goal in itself
BUDGET_FIGURES = (
    "correct",
    "tokens",
    "truncated",
    "free_correct",
    "free_tokens",
    "last_budget",
    "tokens_generated",
    "step_seconds",
)
BUDGET_PAIRS = [
    ("exponential", "constant"),
    ("linear", "constant"),
    ("adaptive", "constant"),
    ("linear", "exponential"),
    ("exponential_triangular", "exponential"),
]
CAP_FIGURES = ("tokens_generated", "step_seconds", "generate_seconds")
Rows = tuple[list[str], list[list[str]]]  # columns, lines


def write_result(path: Path, found: dict[str, Any]) -> None:
    """Write the result, NaN as null and figures to six digits."""
    path.write_text(json.dumps(_plain(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any]:
    """What was written before; empty if nothing was."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def allocation_rows(found: dict[str, Any]) -> Rows:
    """One line per arm of a pool: means with the half-width of their 95 % intervals."""
    reference = next(iter(found["arms"]))
    own = found["rollouts_to_mark"][reference]
    lines = []
    for arm, figures in found["arms"].items():
        needed = found["rollouts_to_mark"][arm]
        lines.append(
            [
                f"`{arm}`",
                _plus_minus(figures["correct"]),
                _plus_minus(figures["effective_gradient_ratio"], 2),
                _needed(needed["mean_curve"], own["mean_curve"]),
                _by_seed(needed["by_seed"], own["by_seed"]),
                f"{figures['allocate_ms']['mean']:.1f} ms ({figures['allocate_share']['mean']:.2%})",
                f"{figures['tokens_generated']['mean'] / 1e3:.0f} k",
            ]
        )
    columns = ["arm", "correct", "effective-gradient ratio", f"rollouts to `{reference}`'s end", "by seed"]
    return [*columns, "allocating, a step", "tokens generated"], lines


def _needed(rollouts: float | None, own: float) -> str:
    return "not reached" if rollouts is None else f"{rollouts:,.0f} ({_share(rollouts, own):.2f})"


def _share(rollouts: float, own: float) -> float:
    """Of the reference's rollouts; all of them where the reference was there before the first."""
    return rollouts / own if own else 1.0


def _by_seed(needed: dict[str, float | None], own: dict[str, float]) -> str:
    shares = [None if rollouts is None else _share(rollouts, own[seed]) for seed, rollouts in needed.items()]
    reached = [share for share in shares if share is not None]
    within = sum(share <= GOAL for share in reached)
    return f"{len(reached)} of {len(shares)} get there, {within} within {GOAL}"


def difficulty_rows(found: dict[str, Any]) -> Rows:
    """Held-out correctness by difficulty: one line per arm."""
    values = list(next(iter(found["by_difficulty"].values())))
    lines = [
        [f"`{arm}`", *(_number(figures[value], 2) for value in values)]
        for arm, figures in found["by_difficulty"].items()
    ]
    return ["terms", *values], lines


def difference_rows(found: dict[str, Any], figures: dict[str, int]) -> Rows:
    """One line per comparison: mean paired differences with 95 % intervals, bold where Holm's p is below 0.05.

    Args:
        found: what `analysis.differences` returns.
        figures: name -> digits; the first is the one whose p and verdict are given.
    """
    first = next(iter(figures))
    lines = [
        [
            f"`{pair}`".replace(" - ", "` − `"),
            *(_difference(tests[name], digits) for name, digits in figures.items()),
            _p(tests[first]["p_holm"]),
            tests[first]["verdict"],
        ]
        for pair, tests in found.items()
    ]
    return ["difference", *(name.replace("_", " ") for name in figures), f"p (Holm), {first}", "verdict"], lines


def budget_rows(found: dict[str, Any]) -> Rows:
    """One line per arm with a budget."""
    digits = dict.fromkeys(BUDGET_FIGURES, 3) | {"tokens": 1, "free_tokens": 1, "last_budget": 0, "step_seconds": 2}
    lines = []
    for arm, figures in found["arms"].items():
        cells = [_plus_minus(figures[name], digits[name]) for name in BUDGET_FIGURES if name != "tokens_generated"]
        cells.insert(-1, f"{figures['tokens_generated']['mean'] / 1e3:.0f} k")
        lines.append([f"`{arm}`", *cells])
    columns = ["arm", "correct", "tokens", "cut off", "correct, no budget", "tokens, no budget"]
    return [*columns, "last budget in training", "tokens generated", "seconds a step"], lines


def cap_rows(found: dict[str, Any]) -> Rows:
    """One line per schedule: what the cap saves, as ratios with : without."""
    lines = []
    for pair, tests in found["cap"].items():
        cells = [_ratio(tests[name]) for name in CAP_FIGURES]
        correct = _difference(found["cap_differences"][pair]["correct"], 3)
        lines.append([f"`{pair.split(' - ')[0]}`", *cells, correct])
    return ["with : without the cap", "tokens generated", "seconds a step", "seconds generating", "correct"], lines


def tables(found: dict[str, Any]) -> list[tuple[str, Rows]]:
    """All tables with their titles."""
    shown: list[tuple[str, Rows]] = []
    for pool in ("small", "large"):
        if part := found.get("allocation", {}).get(pool):
            digits = {"correct": 3, "effective_gradient_ratio": 2}
            shown.append((f"Allocation, {pool} pool", allocation_rows(part)))
            shown.append((f"Correct by number of terms, {pool} pool", difficulty_rows(part)))
            shown.append((f"Against uniform, {pool} pool", difference_rows(part["differences"], digits)))
            shown.append((f"Among each other, {pool} pool", difference_rows(part["controls"], digits)))
    if part := found.get("budgets"):
        shown.append(("Budgets, all evaluated at the last one", budget_rows(part)))
        shown.append(("Differences between budgets", difference_rows(part["differences"], {"correct": 3, "tokens": 1})))
        shown.append(("What the cap saves", cap_rows(part)))
    return shown


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _p(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else _number(value, 3)


def _plus_minus(interval: dict[str, float | None], digits: int = 3) -> str:
    mean, high = interval["mean"], interval["high"]
    return _number(mean, digits) + ("" if mean is None or high is None else f" ± {high - mean:.{digits}f}")


def _difference(test: dict[str, Any], digits: int) -> str:
    if test["low"] is None:
        return _number(test["mean"], digits)
    text = f"{test['mean']:+.{digits}f} [{test['low']:+.{digits}f}, {test['high']:+.{digits}f}]"
    return f"**{text}**" if test["p_holm"] is not None and test["p_holm"] < LEVEL else text


def _ratio(test: dict[str, Any]) -> str:
    if test["low"] is None:
        return _number(test["mean"], 3)
    return f"{test['mean']:.3f} [{test['low']:.3f}, {test['high']:.3f}]"


def markdown(columns: list[str], lines: list[list[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fill_results() -> None:
    """Write result.json's tables between README.md's markers."""
    found = read_result(FOLDER / "result.json")
    parts = [f"{len(found['seeds'])} seeds."]
    if "allocation" in found:
        parts[0] += f" Best value on the small pool, used on the large one: `{found['allocation']['best']}`."
    parts += [f"**{title}**\n\n{markdown(*rows)}" for title, rows in tables(found)]
    readme = FOLDER / "README.md"
    begin, end = "<!-- results: generated -->", "<!-- end of results -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    readme.write_text(before + "\n\n".join([begin, *parts, end]) + after, encoding="utf-8")


def show(result: Path) -> None:
    """Print the tables."""
    console = Console(highlight=False)
    for title, (columns, lines) in tables(read_result(result)):
        table = Table(
            *(column.replace("`", "") for column in columns), title=title, box=box.SIMPLE_HEAD, pad_edge=False
        )
        for line in lines:
            table.add_row(*(cell.replace("`", "").replace("**", "") for cell in line))
        console.print(table)
