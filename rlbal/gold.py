"""Do the rewards tell right from wrong? Gold answers of real rows, against the gold answers of other rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlbal.evaluation import score_texts
from rlbal.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from rlbal.rewards.suite import RewardSuite

# Columns that hold a gold answer, and those that hold a whole worked solution, most usual names first.
ANSWERS = ("answer", "gold", "target", "ground_truth", "solution", "label")
SOLUTIONS = ("solution", "answer")
# How a model might write a gold answer; each reward is judged on the form it likes best.
FORMS = {
    "as it stands": "{gold}",
    "boxed": "\\boxed{{{gold}}}",
    "in answer tags": "<think>\nworked out\n</think>\n<answer>{gold}</answer>",
}


@dataclass(frozen=True)
class GoldResult:
    """Mean reward on gold answers and on other rows' gold answers.

    Attributes:
        means: reward -> (gold, shuffled), in the form in which gold answers score highest.
        forms: reward -> that form.
        correctness: rewards that look at a gold answer, so that they must separate the two.
        equal_share: share of rows whose shuffled answer equals their own.
    """

    means: dict[str, tuple[float, float]]
    forms: dict[str, str]
    correctness: list[str]
    equal_share: float

    @property
    def hint(self) -> str:
        return "look at its `args`, at `data.columns`, and at the form of the answers"

    def to_json(self) -> dict[str, Any]:
        scores = {
            name: {"gold": gold, "shuffled": shuffled, "form": self.forms[name]}
            for name, (gold, shuffled) in self.means.items()
        }
        return {"rewards": scores, "correctness": self.correctness, "equal_share": self.equal_share}


def score_gold(recipe: Recipe, suite: "RewardSuite", rows: "Dataset", seed: int) -> GoldResult | None:
    """Score gold and shuffled answers with every reward; None where no column holds gold answers.

    Args:
        recipe: its rewards.
        suite: the same, loaded.
        rows: real rows.
        seed: of the shuffle.
    """
    needed = {name: suite.required_columns(name) for name in suite.names}
    gold_columns = [name for name in ANSWERS if name in rows.column_names]
    if not gold_columns or len(rows) < 2:
        return None
    solution = next((name for name in SOLUTIONS if name in rows.column_names), gold_columns[0])
    answers, solutions = [str(value) for value in rows[gold_columns[0]]], [str(value) for value in rows[solution]]
    # A shift by a random distance: every row gets another row's answer.
    shift = int(np.random.default_rng(seed).integers(1, len(rows)))
    best: dict[str, tuple[float, float, str]] = {}
    for form, template in FORMS.items():
        texts = solutions if form == "as it stands" else answers
        written = [template.format(gold=text) for text in texts]
        own, other = _score(suite, rows, written), _score(suite, rows, written[shift:] + written[:shift])
        for k, name in enumerate(suite.names):
            gold, shuffled = _mean(own[:, k]), _mean(other[:, k])
            if name not in best or gold > best[name][0]:
                best[name] = (gold, shuffled, form)
    shifted = answers[shift:] + answers[:shift]
    return GoldResult(
        means={name: (gold, shuffled) for name, (gold, shuffled, _) in best.items()},
        forms={name: form for name, (_, _, form) in best.items()},
        correctness=[name for name in suite.names if set(needed[name]) & set(ANSWERS)],
        equal_share=float(np.mean([_final(a) == _final(b) for a, b in zip(answers, shifted, strict=True)])),
    )


def _score(suite: "RewardSuite", rows: "Dataset", written: list[str]) -> np.ndarray:
    # Length rewards want tokens; characters stand in for them, since no gold answer has been tokenized.
    return score_texts(suite, rows[:], written, [[0] * len(text) for text in written])


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _final(answer: str) -> str:
    """The answer itself where it stands at the end of a worked solution (GSM8K's `#### 42`)."""
    return answer.rsplit("####", 1)[-1].strip()
