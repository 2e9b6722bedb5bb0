"""result.json as tables: on the terminal and in README.md, where figures are never typed by hand."""

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlbal.experiments.statistics import LEVEL, paired_difference

FOLDER = Path(__file__).parent
NAMES = {"pass@1": "correct", "reward/format": "format", "reward/length": "length reward", "length/mean": "tokens"}
DIGITS = {"length/mean": 1}
Rows = tuple[list[str], list[list[str]]]


def thirds(curves: list[list[float]]) -> list[float]:
    """Mean over seeds in the first, middle and last third of a run."""
    size = len(curves[0]) // 3
    parts = [slice(0, size), slice(size, 2 * size), slice(2 * size, None)]
    return [sum(sum(curve[part]) / len(curve[part]) for curve in curves) / len(curves) for part in parts]


def write_result(path: Path, found: dict[str, Any]) -> None:
    """Write the result, NaN as null and figures to six digits."""
    path.write_text(json.dumps(_plain(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def score_rows(found: dict[str, Any]) -> Rows:
    """Means over seeds with the half-width of their 95 % intervals; the base model first."""
    lines = [["before", *(f"{value:.{DIGITS.get(name, 3)}f}" for name, value in found["before"].items())]]
    for label, arm in (found["arms"] | found["added"]["arms"]).items():
        lines.append([f"`{label}`", *(_plus_minus(arm[name], DIGITS.get(name, 3)) for name in NAMES)])
    return ["after", *NAMES.values()], lines


def difference_rows(found: dict[str, Any]) -> Rows:
    """Mean paired differences to GRPO with 95 % intervals, bold where Holm's p is below 0.05."""
    cells: dict[str, list[str]] = {}
    for one in found["differences"] + found["added"]["differences"]:
        cells.setdefault(f"`{one['arm']}`", []).append(_difference(one, DIGITS.get(one["metric"], 3)))
    return ["less `grpo`", *NAMES.values()], [[arm, *line] for arm, line in cells.items()]


def run_rows(runs: dict[str, dict[str, float]]) -> Rows:
    """What single runs ended with."""
    lines = []
    for run, scores in runs.items():
        arm, _, seed = run.partition("/seed-")
        lines.append([f"`{arm}`", seed, *(f"{value:.{DIGITS.get(name, 3)}f}" for name, value in scores.items())])
    return ["after", "seed", *NAMES.values()], lines


def _plus_minus(summary: dict[str, Any], digits: int) -> str:
    values = list(summary["values"].values())
    if len(values) < 2:
        return f"{summary['mean']:.{digits}f}"
    interval = paired_difference(values, [0.0] * len(values))
    return f"{summary['mean']:.{digits}f} ± {interval.high - interval.mean:.{digits}f}"


def _difference(one: dict[str, Any], digits: int) -> str:
    mean, low, high = (one["difference"][key] for key in ("mean", "low", "high"))
    if low is None:
        return "–" if mean is None else f"{mean:+.{digits}f}"
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if one["p_holm"] is not None and one["p_holm"] < LEVEL else text


def tables(found: dict[str, Any]) -> list[tuple[str, Rows]]:
    """All tables with their titles."""
    return [
        ("After 100 steps", score_rows(found)),
        ("Paired differences", difference_rows(found)),
        ("The quickstart with its own settings, after 200 steps", run_rows(found["quickstart"])),
        ("What settings were chosen by, after 100 steps", run_rows(found["tune"])),
    ]


def markdown(columns: list[str], lines: list[list[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fill_results() -> None:
    """Write result.json's tables between README.md's markers."""
    found = json.loads((FOLDER / "result.json").read_text(encoding="utf-8"))
    seeds = len(next(iter(found["arms"].values()))["pass@1"]["values"])
    critic = ", ".join(f"{value:.2f}" for value in found["critic"])
    parts = [f"{seeds} seeds. Variance that the critic of `ppo` explains in the three thirds of a run: {critic}."]
    parts += [f"**{title}**\n\n{markdown(*rows)}" for title, rows in tables(found)]
    readme = FOLDER / "README.md"
    begin, end = "<!-- results: generated -->", "<!-- end of results -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    readme.write_text(before + "\n\n".join([begin, *parts, end]) + after, encoding="utf-8")


def show(result: Path) -> None:
    """Print the tables."""
    console = Console(highlight=False)
    for title, (columns, lines) in tables(json.loads(result.read_text(encoding="utf-8"))):
        table = Table(*columns, title=title.replace("`", ""), box=box.SIMPLE_HEAD, pad_edge=False)
        for line in lines:
            table.add_row(*(cell.replace("`", "").replace("**", "") for cell in line))
        console.print(table)
