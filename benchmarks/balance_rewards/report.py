"""result.json as tables: on the terminal and in README.md, where figures are never typed by hand."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

LEVEL = 0.05
LESS_MEAN = "influence less the rewards' mean"
FOLDER = Path(__file__).parent
COLUMNS = [
    "arm",
    "correct",
    "format",
    "concise",
    "tokens",
    "hypervolume",
    "of all evaluations",
    "steps to the mark",
    "gradient norm varies by",
    "dominates / is dominated",
]
DIFFERENCES = ["difference", "correct", "format", "concise", "hypervolume", "p (Holm), hypervolume"]


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


def score_rows(found: dict[str, Any]) -> list[list[str]]:
    """One row per arm: means, the half-width of their 95 % intervals, and counts over seeds."""
    return [
        [
            f"`{name}`",
            *(_plus_minus(arm[score]) for score in ("correct", "format", "concise")),
            _plus_minus(arm["tokens"], 1),
            _plus_minus(arm["hypervolume"]),
            _plus_minus(arm["hypervolume_reached"]),
            _steps(list(arm["steps_to_mark"].values())),
            _plus_minus(arm["grad_norm_variation"], 2),
            f"{arm['dominates_fixed']} / {arm['dominated_by_fixed']} of {arm['seeds']}" if name != "fixed" else "",
        ]
        for name, arm in found["arms"].items()
    ]


def difference_rows(found: dict[str, Any]) -> list[list[str]]:
    """One row per comparison: mean paired differences with 95 % intervals, bold where Holm's p is below 0.05."""
    rows = []
    for pair, scores in (found["differences"] | found.get("control", {})).items():
        cells = [_difference(scores[score]) for score in ("correct", "format", "concise", "hypervolume")]
        rows.append([f"`{pair}`".replace(" - ", "` − `"), *cells, _number(scores["hypervolume"]["p_holm"], 3)])
    return rows


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _plus_minus(interval: dict[str, float | None], digits: int = 3) -> str:
    mean, high = interval["mean"], interval["high"]
    return _number(mean, digits) + ("" if mean is None or high is None else f" ± {high - mean:.{digits}f}")


def _difference(test: dict[str, Any]) -> str:
    if test["low"] is None:
        return _number(test["mean"], 3)
    text = f"{test['mean']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}]"
    return f"**{text}**" if test["p_holm"] is not None and test["p_holm"] < LEVEL else text


def _steps(steps: list[int | None]) -> str:
    """The median over seeds, a seed that never gets there counting as later than all others."""
    reached = [step for step in steps if step is not None]
    middle = statistics.median_high([math.inf if step is None else step for step in steps])
    text = "not reached by most" if math.isinf(middle) else f"{middle:.0f}"
    return f"{text} ({len(reached)} of {len(steps)} get there)" if len(reached) < len(steps) else text


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill_readme(name: str, *parts: str) -> None:
    """Write between README.md's markers of that name."""
    readme = FOLDER / "README.md"
    begin, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    readme.write_text(before + "\n\n".join([begin, *parts, end]) + after, encoding="utf-8")


def fill_results() -> None:
    """Write result.json's tables into README.md."""
    found = json.loads((FOLDER / "result.json").read_text(encoding="utf-8"))
    chosen = " and ".join(f"`{name}`" for name in found["chosen"])
    facts = f"{len(found['seeds'])} seeds. The best two, run with beta: {chosen}."
    if found["factor"]:
        factors = ", ".join(f"{factor:.2f}" for factor in found["factor"].values())
        facts += f" Mean factor of `hypervolume`, by seed: {factors}."
    tables = [markdown(COLUMNS, score_rows(found)), markdown(DIFFERENCES, difference_rows(found))]
    fill_readme("results", facts, *tables)


def fill_probe() -> None:
    """Write probe.json's tables into README.md."""
    found = json.loads((FOLDER / "probe.json").read_text(encoding="utf-8"))
    costs = [
        [probe, setting, f"{one['step_ms']:.0f} ms", _interval(one["extra_ms"], 1), _interval(one["ratio"], 3)]
        for probe, settings in found["cost"].items()
        for setting, one in settings.items()
    ]
    names = list(next(iter(found["quality"].values()))["influence"])
    quality = [
        [
            seed,
            *(f"{one['influence'][name]:.2f} / {one[LESS_MEAN][name]:.2f}" for name in names),
            f"{one['same order of all rewards']:.0%}",
            f"{one['same first reward']:.0%}",
            *(" / ".join(f"{weight:.3f}" for weight in weights) for weights in one["final weights"].values()),
        ]
        for seed, one in found["quality"].items()
    ]
    ends = [f"weights: {how}" for how in next(iter(found["quality"].values()))["final weights"]]
    fill_readme(
        "probe",
        f"{found['threads']} thread(s).",
        markdown(["probe", "steps", "a step without", "extra, ms", "ratio"], costs),
        markdown(["seed", *(f"ρ `{name}`" for name in names), "same order", "same first", *ends], quality),
    )


def _interval(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def show(result: Path) -> None:
    """Print the tables."""
    found = json.loads(result.read_text(encoding="utf-8"))
    for columns, rows in ((COLUMNS, score_rows(found)), (DIFFERENCES, difference_rows(found))):
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(cell.replace("`", "") for cell in row))
        Console(highlight=False).print(table)
