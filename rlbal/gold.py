"""Do the rewards tell right from wrong? Gold answers of real rows, against the gold answers of other rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_fns._text import last_boxed
from rlbal.check_report import figure
from rlbal.scoring import Table, score_texts
from rlbal.scoring_stats import Array

if TYPE_CHECKING:
    from rlbal.rewards.suite import RewardSuite

# Columns that hold a gold answer, most usual names first, and the one that holds a worked solution beside it.
ANSWERS = ("answer", "gold", "target", "ground_truth", "solution", "label")
SOLUTION = "solution"
# How a model might write a gold answer. Each reward is judged on the form in which these first rows score highest.
FORMS = {
    "as it stands": "{solution}",
    "boxed": "\\boxed{{{answer}}}",
    "in answer tags": "<think>\nworked out\n</think>\n<answer>{answer}</answer>",
}
FORM_ROWS = 64


@dataclass(frozen=True)
class GoldResult:
    """Mean reward on gold answers and on other rows' gold answers.

    Attributes:
        means: reward -> (gold, shuffled), NaN where it scored nothing.
        forms: reward -> the form in which the answers were written.
        correctness: rewards that need a gold answer, so that they must separate the two.
        rows: rows with a gold answer.
        equal_share: share of rows whose shuffled answer equals their own as text.
        completions: how many were scored in all.
    """

    means: dict[str, tuple[float, float]]
    forms: dict[str, str]
    correctness: list[str]
    rows: int
    equal_share: float
    completions: int

    def to_json(self) -> dict[str, Any]:
        scores = {
            name: {"gold": figure(gold), "shuffled": figure(shuffled), "form": self.forms[name]}
            for name, (gold, shuffled) in self.means.items()
        }
        return {
            "rewards": scores,
            "correctness": self.correctness,
            "rows": self.rows,
            "equal_share": self.equal_share,
        }


def score_gold(suite: "RewardSuite", table: Table, seed: int) -> GoldResult | None:
    """Score gold and shuffled answers with every reward; None where fewer than two rows have a gold answer.

    Args:
        suite: the rewards.
        table: real rows as columns.
        seed: of the shuffle.
    """
    correctness = [name for name in suite.names if set(suite.required_columns(name)) & set(ANSWERS)]
    needed = {column for name in correctness for column in suite.required_columns(name)}
    present = [name for name in ANSWERS if name in table]
    if not present:
        return None
    column = next((name for name in present if name in needed), present[0])
    answered = [row for row, value in enumerate(table[column]) if value is not None]
    if (count := len(answered)) < 2:
        return None
    table = {name: [values[row] for row in answered] for name, values in table.items()}
    written = _write(table, column)
    first = {name: values[:FORM_ROWS] for name, values in table.items()}
    trial = {form: _means(suite, first, texts[:FORM_ROWS]) for form, texts in written.items()}
    forms = {name: _best_form({form: trial[form][k] for form in trial}) for k, name in enumerate(suite.names)}
    # A shift by a random distance: every row gets another row's answer.
    shift = int(np.random.default_rng(seed).integers(1, count))
    chosen = {form: written[form] for form in dict.fromkeys(forms.values())}
    gold = {form: _means(suite, table, texts) for form, texts in chosen.items()}
    shuffled = {form: _means(suite, table, texts[shift:] + texts[:shift]) for form, texts in chosen.items()}
    answers = ["".join(final(str(value)).split()) for value in table[column]]
    equal = [own == other for own, other in zip(answers, answers[shift:] + answers[:shift], strict=True)]
    return GoldResult(
        means={name: (gold[forms[name]][k], shuffled[forms[name]][k]) for k, name in enumerate(suite.names)},
        forms=forms,
        correctness=correctness,
        rows=count,
        equal_share=float(np.mean(equal)),
        completions=len(trial) * min(FORM_ROWS, count) + 2 * len(chosen) * count,
    )


def final(solution: str) -> str:
    r"""The answer itself where it ends a worked solution: after GSM8K's `####`, or in the last `\boxed{…}`."""
    text = solution.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return text if boxed is None else boxed


def _write(table: Table, column: str) -> dict[str, list[str]]:
    """Every gold answer in every form."""
    worked = SOLUTION if SOLUTION in table else column
    pairs = [(final(str(answer)), str(solution)) for answer, solution in zip(table[column], table[worked], strict=True)]
    return {
        form: [template.format(answer=answer, solution=solution) for answer, solution in pairs]
        for form, template in FORMS.items()
    }


def _best_form(means: dict[str, float]) -> str:
    return max(means, key=lambda form: np.nan_to_num(means[form], nan=-np.inf))


def _means(suite: "RewardSuite", table: Table, texts: list[str]) -> list[float]:
    # Length rewards want tokens; characters stand in for them, since no gold answer has been tokenized.
    return means(score_texts(suite, table, texts, [[0] * len(text) for text in texts]))


def means(rewards_NK: Array) -> list[float]:
    """The mean of each reward over the rows that it scored, NaN without any."""
    scored_KN = [column[~np.isnan(column)] for column in rewards_NK.T]
    return [float(scores.mean()) if len(scores) else np.nan for scores in scored_KN]
