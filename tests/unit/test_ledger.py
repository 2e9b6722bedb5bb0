"""What is known of prompts: beliefs after known outcomes, forgetting, order, memory, and the file."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save

from rlbal.errors import DataError, RunError
from rlbal.prompts.ledger import PromptLedger

NAN = math.nan


def observe(ledger, outcomes, step, length=10):
    """Observe {prompt: [success of each rollout]}."""
    rows = [(prompt, success) for prompt, successes in outcomes.items() for success in successes]
    indices, successes = zip(*rows, strict=True)
    ledger.observe(indices, successes, np.full(len(rows), length), step)


def belief(ledger, prompt, step):
    (a,), (b,) = ledger.belief([prompt], step)
    return a, b


def random_batch(generator, prompts, rows):
    indices = generator.choice(prompts, rows)
    successes = np.where(generator.random(rows) < 0.1, NAN, generator.random(rows))
    return indices, successes, generator.integers(1, 400, rows)


# Beliefs


def test_before_anything_is_seen_the_belief_is_one_half():
    assert belief(PromptLedger(3, 0.1), 2, step=0) == (0.5, 0.5)


def test_successes_and_failures_are_counted_at_once():
    """The next allocation must know the batch just finished, not the one before it."""
    ledger = PromptLedger(3, forgetting=0.1)
    observe(ledger, {1: [1, 1, 0, 1], 2: [0, 0]}, step=5)
    assert belief(ledger, 1, step=5) == (3.5, 1.5)
    assert belief(ledger, 2, step=5) == (0.5, 2.5)
    assert belief(ledger, 0, step=5) == (0.5, 0.5)


def test_forgetting_by_hand():
    ledger = PromptLedger(1, forgetting=0.5)
    observe(ledger, {0: [1, 1, 1, 0]}, step=2)
    assert belief(ledger, 0, step=3) == (0.5 + 1.5, 0.5 + 0.5)  # 3 and 1 after one update
    assert belief(ledger, 0, step=4) == (0.5 + 0.75, 0.5 + 0.25)
    observe(ledger, {0: [0, 0]}, step=4)
    assert belief(ledger, 0, step=4) == (0.5 + 0.75, 0.5 + 2.25)
    assert belief(ledger, 0, step=5) == (0.5 + 0.375, 0.5 + 1.125)


def test_reading_changes_nothing():
    ledger = PromptLedger(1, forgetting=0.5)
    observe(ledger, {0: [1, 1]}, step=0)
    assert belief(ledger, 0, step=9) == belief(ledger, 0, step=9)
    assert belief(ledger, 0, step=0) == (2.5, 0.5)


def test_without_forgetting_everything_stays():
    ledger = PromptLedger(1, forgetting=0)
    for step in range(100):
        observe(ledger, {0: [1, 0, 0]}, step)
    assert belief(ledger, 0, step=1000) == (100.5, 200.5)


def test_forgetting_everything_leaves_the_last_visit():
    ledger = PromptLedger(2, forgetting=1)
    observe(ledger, {0: [1, 1, 1, 1], 1: [1]}, step=0)
    observe(ledger, {0: [1, 0, 0, 0]}, step=1)
    assert ledger.success_rates([0, 1]).tolist() == [0.25, 1.0]
    assert belief(ledger, 0, step=2) == (0.5, 0.5)


def test_graded_and_missing_successes():
    ledger = PromptLedger(2, forgetting=0)
    observe(ledger, {0: [0.25, NAN, 0.5], 1: [NAN, NAN]}, step=0)
    assert belief(ledger, 0, step=0) == (0.5 + 0.75, 0.5 + 1.25)
    assert belief(ledger, 1, step=0) == (0.5, 0.5)
    np.testing.assert_array_equal(ledger.success_rates([0, 1]), [0.375, NAN])
    assert ledger.last_seen_M.tolist() == [0, 0]


def test_a_prompt_never_seen_inherits_what_its_like_has_shown():
    ledger = PromptLedger(102, forgetting=0, strata=[7] * 51 + [-3] * 51)
    solved = {prompt: [1, 1, 1, prompt % 2] for prompt in range(50)}
    failed = {51 + prompt: [0, 0, 0, prompt % 2] for prompt in range(50)}
    observe(ledger, solved | failed, step=0)
    a_P, b_P = ledger.belief([50, 101], step=0)
    easy, hard = a_P / (a_P + b_P)
    # Means 7/8 and 1/8, 50 prompts each, with the mean of all, 1/2, as 16 more.
    assert easy == pytest.approx((50 * 7 / 8 + 16 / 2) / 66)
    assert hard == pytest.approx((50 * 1 / 8 + 16 / 2) / 66)


# Batches


def test_rows_may_come_in_any_order():
    generator = np.random.default_rng(0)
    batches = [random_batch(generator, 40, 500) for _ in range(4)]
    ledgers = [PromptLedger(40, 0.1, np.arange(40) % 3) for _ in range(2)]
    for step, batch in enumerate(batches):
        order = generator.permutation(500)
        ledgers[0].observe(*batch, step)
        ledgers[1].observe(*(values[order] for values in batch), step)
    first, second = (ledger.state_dict() for ledger in ledgers)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert ledgers[0].metrics() == ledgers[1].metrics()


def test_a_batch_touches_its_own_prompts_alone():
    generator = np.random.default_rng(1)
    ledger = PromptLedger(40, 0.1)
    ledger.observe(*random_batch(generator, 40, 500), 0)
    before = {name: values.copy() for name, values in ledger.state_dict().items()}
    ledger.observe(*random_batch(generator, 20, 100), 7)
    after = ledger.state_dict()
    for name in ("counts", "last_seen", "stratum"):
        np.testing.assert_array_equal(after[name][20:], before[name][20:])
    assert (after["last_seen"][:20] == 7).all()


def test_an_empty_batch_is_none():
    ledger = PromptLedger(2, 0.1)
    ledger.observe([], [], [], 0)
    assert ledger.metrics()["ledger/seen"] == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (([2], [1.0], [5], 3), "numbered 0 to 1"),
        (([-1], [1.0], [5], 3), "numbered 0 to 1"),
        (([0], [1.1], [5], 3), r"lies in \[0, 1\]"),
        (([0], [-0.1], [5], 3), r"lies in \[0, 1\]"),
        (([0], [math.inf], [5], 3), r"lies in \[0, 1\]"),
        (([0], [1.0], [5], 1), "step 1 is before step 2"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_ledger_alone(rows, message):
    ledger = PromptLedger(2, 0.1)
    observe(ledger, {0: [1]}, step=2)
    with pytest.raises(ValueError, match=message):
        ledger.observe(*rows)
    assert belief(ledger, 0, step=2) == (1.5, 0.5)


# Everything at once, from the history of all rows, slowly


class Remembered:
    """What the ledger computes from sums, here from every row ever seen: (batch, step, prompt, success, tokens)."""

    def __init__(self, strata, forgetting):
        self.strata, self.keep, self.rows, self.batches = strata, 1 - forgetting, [], 0
        self.priors = {}

    def observe(self, indices, successes, lengths, step):
        self.drift = self.drift_of(indices, successes, step)
        self.rows += [(self.batches, step, *row) for row in zip(indices, successes, lengths, strict=True)]
        self.batches += 1
        self.priors = {stratum: self.prior(stratum) for stratum in set(self.strata)}

    def drift_of(self, indices, successes, step):
        known = {prompt for _, _, prompt, _, _ in self.rows}
        gaps = []
        for prompt in known.intersection(indices):
            scored = [s for i, s in zip(indices, successes, strict=True) if i == prompt and not math.isnan(s)]
            if scored:
                # With nothing but the last visit kept, it is what was believed.
                a, b = self.belief(prompt, step if self.keep else self.last_seen(prompt))
                gaps.append(sum(scored) / len(scored) - a / (a + b))
        return sum(gaps) / len(gaps) if gaps else NAN

    def visits(self):
        """(weight, stratum, scored rows, their mean, the variance of that mean) of each prompt in each batch."""
        cells = {}
        for batch, _, prompt, success, _ in self.rows:
            if not math.isnan(success):
                cells.setdefault((batch, prompt), []).append(success)
        for (batch, prompt), scored in cells.items():
            noise = np.var(scored, ddof=1) / len(scored) if len(scored) > 1 else 0.0
            yield 0.9 ** (self.batches - 1 - batch), self.strata[prompt], len(scored), np.mean(scored), noise

    def prior(self, stratum):
        visits = list(self.visits())
        mean, variance, effective = moments(visits)
        if effective < 32:
            return 0.5, 0.5
        own_mean, own_variance, own = moments([visit for visit in visits if visit[1] == stratum])
        if own >= 2:
            mean = (own * own_mean + 16 * mean) / (own + 16)
            variance = (own * own_variance + 16 * variance) / (own + 16)
        mean = min(max(mean, 0.5 / effective), 1 - 0.5 / effective)
        certainty = mean * (1 - mean) / variance - 1 if variance > 1e-12 else 100
        certainty = min(max(certainty, 0.5), 100)
        return mean * certainty, (1 - mean) * certainty

    def weights(self, prompt, step):
        """(weight, success, tokens) of each of its rows."""
        return [(self.keep ** (step - when), s, t) for _, when, i, s, t in self.rows if i == prompt]

    def belief(self, prompt, step):
        a, b = self.priors[self.strata[prompt]]
        scored = [(weight, s) for weight, s, _ in self.weights(prompt, step) if not math.isnan(s)]
        return a + sum(w * s for w, s in scored), b + sum(w * (1 - s) for w, s in scored)

    def last_seen(self, prompt):
        return max((when for _, when, i, _, _ in self.rows if i == prompt), default=-1)

    def expected_length(self, prompt):
        rows = self.weights(prompt, self.last_seen(prompt))
        rows = rows or [(0.9 ** (self.batches - 1 - batch), s, t) for batch, _, _, s, t in self.rows]
        return sum(w * t for w, _, t in rows) / sum(w for w, _, _ in rows)

    def solved(self, prompt, at, rollouts):
        step = self.last_seen(prompt)
        a, b = self.belief(prompt, step)
        scored = sum(w for w, s, _ in self.weights(prompt, step) if not math.isnan(s))
        return a / (a + b) >= at and scored >= rollouts


def moments(visits):
    """Mean and variance of the chances of success, and the effective number of prompts behind the variance."""
    if not visits:
        return NAN, NAN, 0.0
    mean = sum(w * rate for w, _, _, rate, _ in visits) / sum(w for w, *_ in visits)
    two = [(w, rate, noise) for w, _, count, rate, noise in visits if count > 1]
    total, squares = sum(w for w, _, _ in two), sum(w * w for w, _, _ in two)
    if not squares:
        return mean, NAN, 0.0
    of_two, effective = sum(w * rate for w, rate, _ in two) / total, total**2 / squares
    spread = sum(w * (rate - of_two) ** 2 for w, rate, _ in two) / total
    if effective == 1:
        return mean, NAN, 1.0
    return mean, spread / (1 - 1 / effective) - sum(w * noise for w, _, noise in two) / total, effective


@pytest.mark.parametrize("forgetting", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("easiest", [0.5, 1.0])
def test_sums_say_what_all_rows_say(forgetting, easiest):
    """Against a slow implementation that keeps every row; some steps have two batches, others none."""
    generator, prompts = np.random.default_rng(3), 50
    strata = ["a"] * 20 + ["b"] * 29 + ["alone"]
    chance = easiest * generator.beta(0.7, 0.7, prompts)
    ledger, slow = PromptLedger(prompts, forgetting, strata), Remembered(strata, forgetting)
    fitted = set()
    for step, size in zip((0, 1, 1, 4, 5, 30), (40, 160, 160, 160, 160, 160), strict=True):
        rows = np.where(generator.random(size) < 0.02, 49, generator.choice(45, size))  # 45 to 48 are never tried
        successes = (generator.random(size) < chance[rows]) * generator.choice([0.5, 1, 1], size)
        successes[generator.random(size) < 0.1] = NAN
        lengths = generator.integers(1, 400, size)
        ledger.observe(rows, successes, lengths, step)
        slow.observe(rows, successes, lengths, step)
        now, everything = step + 2, np.arange(prompts)
        a, b = ledger.belief(everything, now)
        np.testing.assert_allclose(np.stack([a, b], 1), [slow.belief(p, now) for p in everything], rtol=1e-5)
        assert ledger.metrics()["ledger/drift"] == pytest.approx(slow.drift, rel=1e-5, nan_ok=True)
        expected = [slow.expected_length(p) for p in everything]
        np.testing.assert_allclose(ledger.expected_lengths(everything), expected, rtol=1e-5)
        retired = ledger.solved(everything, 0.5, rollouts=4).tolist()
        assert retired == [slow.solved(p, 0.5, 4) for p in everything]
        fitted.add((ledger.prior.fitted, any(retired)))
    assert fitted >= {(False, False), (True, True)}


def test_outcomes_are_what_the_belief_adds_to_the_prior():
    ledger = filled()
    a_H, b_H = ledger.prior.strata()
    for step in (19, 40):
        a, b = ledger.belief(range(4), step)
        successes, failures = ledger.outcomes(range(4), step)
        np.testing.assert_allclose(a - successes, a_H[[0, 0, 1, 1]])
        np.testing.assert_allclose(b - failures, b_H[[0, 0, 1, 1]])
    assert successes[3] == failures[3] == 0 and successes[0] > 0  # prompt 3 is never in a batch of `filled`


def test_beliefs_may_be_read_as_of_a_step_for_each_prompt():
    ledger = PromptLedger(3, forgetting=1)
    observe(ledger, {0: [1, 1]}, step=3)
    observe(ledger, {1: [0, 1]}, step=7)
    a, b = ledger.belief([0, 1, 2], ledger.last_seen_M)
    assert a.tolist() == [2.5, 1.5, 0.5] and b.tolist() == [0.5, 1.5, 0.5]
    with pytest.raises(ValueError, match="before step 7"):
        ledger.belief([0, 1], np.array([3, 6]))


# Lengths


def test_lengths_are_means_and_those_of_prompts_never_tried_of_all_rows():
    ledger = PromptLedger(3, forgetting=0.5)
    assert ledger.expected_lengths([0, 2]).tolist() == [0, 0]
    ledger.observe([0, 0, 1], [1, NAN, 0], [10, 30, 80], 0)
    assert ledger.expected_lengths([0, 1, 2]).tolist() == [20, 80, 40]
    ledger.observe([0], [1], [50], 1)
    # Prompt 0: 2 rows of 20 count half, as 1 of 20, and 1 of 50. All: 3 rows of 120 count by 0.9, and 1 of 50.
    assert ledger.expected_lengths([0, 2]).tolist() == [35, pytest.approx((0.9 * 120 + 50) / (0.9 * 3 + 1))]


# Retirement


def test_a_prompt_retires_at_its_mean_with_enough_rollouts():
    ledger = PromptLedger(5, forgetting=0)
    observe(ledger, {0: [1] * 8, 1: [1] * 7, 2: [1] * 8 + [0], 3: [1] * 7 + [NAN]}, step=0)
    # 8.5/9 = .944 of 8; 7 are too few; 8.5/10 = .85; 7 scored; none.
    assert ledger.solved(range(5), at=0.9).tolist() == [True, False, False, False, False]
    assert ledger.solved(range(5), at=0.85).tolist() == [True, False, True, False, False]
    assert ledger.solved(range(5), at=0.9, rollouts=7).tolist() == [True, True, False, True, False]


def test_a_retired_prompt_returns_by_failing_alone():
    """Not by being forgotten, nor because the prior falls as the easy prompts leave."""
    ledger = PromptLedger(102, forgetting=0.5)
    observe(ledger, {0: [1] * 8, 1: [0] * 8}, step=0)
    ledger.retire([0, 1], at=0.9)
    for step in range(1, 6):  # a prior like Beta(37, 63): 8 successes more are not 0.9
        prompts = range(20 * step - 18, 20 * step + 2)
        observe(ledger, {prompt: [1] * 3 + [0] * 5 for prompt in prompts}, step)
        ledger.retire(prompts, at=0.9)
    assert ledger.prior.fitted and not ledger.solved([0], at=0.9).any()
    assert np.flatnonzero(ledger.retired_M).tolist() == [0]
    observe(ledger, {0: [0] * 8}, step=51)
    ledger.retire([0], at=0.9)
    assert not ledger.retired_M.any()


# Metrics


def test_metrics_by_hand():
    ledger = PromptLedger(4, forgetting=0)
    assert ledger.metrics() == {
        "ledger/seen": 0,
        "ledger/prior_a": 0.5,
        "ledger/prior_b": 0.5,
        "ledger/prior_fitted": 0,
        "ledger/drift": pytest.approx(NAN, nan_ok=True),
    }
    observe(ledger, {0: [0, 0, 0], 1: [1, 1, 1]}, step=0)
    assert ledger.metrics()["ledger/seen"] == 0.5 and math.isnan(ledger.metrics()["ledger/drift"])
    observe(ledger, {0: [1, 1], 1: [1, 1], 2: [0, 0]}, step=1)
    # Believed were 0.5/4 and 3.5/4, seen are 1 and 1; prompt 2 is new.
    assert ledger.metrics()["ledger/drift"] == pytest.approx((7 / 8 + 1 / 8) / 2)
    assert ledger.metrics()["ledger/seen"] == 0.75


# Memory


def test_a_million_prompts_take_less_than_64_megabytes():
    ledger = PromptLedger(1_000_000, 0.01, np.arange(1_000_000) % 1000)
    ledger.observe(np.arange(8192), np.ones(8192), np.full(8192, 100), 0)
    held = [*vars(ledger).values(), *vars(ledger.prior).values()]
    arrays = [value for value in held if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 64e6
    assert all(array.base is None or array.base.nbytes == array.nbytes for array in arrays)  # no view of more
    assert {array.size for array in arrays} >= {1_000_000, 4_000_000}
    assert len(save(ledger.state_dict())) <= 64e6


# Strata


def test_too_many_strata_are_refused():
    PromptLedger(1000, 0.1, np.arange(1000))
    with pytest.raises(DataError, match=r"`allocation.strata` divides the prompts into 1001 kinds"):
        PromptLedger(1001, 0.1, np.arange(1001))


def test_what_cannot_be_a_ledger_is_refused():
    with pytest.raises(ValueError, match="3 prompts need as many strata"):
        PromptLedger(3, 0.1, [0, 1])
    with pytest.raises(ValueError, match="share from 0 to 1"):
        PromptLedger(3, 1.5)


# The file


def filled(strata=(0, 0, 1, 1), forgetting=0.1):
    ledger = PromptLedger(4, forgetting, strata)
    for step in range(20):
        ledger.observe(*random_batch(np.random.default_rng(step), 3, 30), step)
    return ledger


def test_a_ledger_goes_on_from_its_file_as_if_never_stopped(tmp_path):
    ledger, again = filled(), PromptLedger(4, 0.1, (0, 0, 1, 1))
    ledger.save(tmp_path / "ledger.safetensors")
    again.load(tmp_path / "ledger.safetensors")
    batch = random_batch(np.random.default_rng(99), 4, 30)
    for one in (ledger, again):
        one.observe(*batch, 25)
    assert ledger.prior.fitted and ledger.metrics() == again.metrics()
    for mine, its in zip(ledger.belief(range(4), 30), again.belief(range(4), 30), strict=True):
        np.testing.assert_array_equal(mine, its)
    for name, values in ledger.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], values)


def test_a_loaded_state_is_not_shared():
    ledger, again = filled(), PromptLedger(4, 0.1, (0, 0, 1, 1))
    again.load_state_dict(ledger.state_dict())
    before = belief(ledger, 0, step=19)
    observe(again, {0: [1] * 50}, step=19)
    assert belief(ledger, 0, step=19) == before


@pytest.mark.parametrize(
    ("ledger", "message"),
    [
        (PromptLedger(5, 0.1, (0, 0, 1, 1, 1)), r"of other data\nWhy: `counts` has the shape \(4, 4\), not \(5, 4\)"),
        (PromptLedger(4, 0.1), r"of other data\nWhy: `prior` has the shape \(2, 7\), not \(1, 7\)"),
        (PromptLedger(4, 0.1, (0, 1, 0, 1)), "divides the prompts otherwise"),
    ],
)
def test_a_file_of_other_prompts_is_refused(tmp_path, ledger, message):
    filled().save(tmp_path / "ledger.safetensors")
    with pytest.raises(RunError, match=message):
        ledger.load(tmp_path / "ledger.safetensors")
    assert ledger.metrics()["ledger/seen"] == 0


def test_a_file_that_is_cut_off_or_missing_or_something_else_is_named(tmp_path):
    path = tmp_path / "ledger.safetensors"
    ledger = filled()
    with pytest.raises(RunError, match=r"cannot read the ledger .*ledger.safetensors"):
        ledger.load(path)
    ledger.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RunError, match="cannot read the ledger"):
        ledger.load(path)
    for broken in ({"counts": np.full((4, 4), np.nan, dtype=np.float32)}, {"counts": np.ones((4, 4))}):
        path.write_bytes(save(ledger.state_dict() | broken))
        with pytest.raises(RunError, match="no usable `counts`"):
            ledger.load(path)
    path.write_bytes(save({"weights": np.ones(4)}))
    with pytest.raises(RunError, match="no usable `counts`"):
        ledger.load(path)


def test_a_ledger_opens_without_its_data(tmp_path):
    ledger = filled(strata=("x", "x", "y", "y"))
    ledger.save(tmp_path / "ledger.safetensors")
    opened = PromptLedger.open(tmp_path / "ledger.safetensors", 0.1)
    assert opened.stratum_M.tolist() == [0, 0, 1, 1] and opened.metrics()["ledger/seen"] == 0.75
    for mine, its in zip(ledger.belief(range(4), 30), opened.belief(range(4), 30), strict=True):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stratum": np.zeros((4, 1), dtype=np.int16)}, "is not a ledger"),
        ({"stratum": np.arange(2000, dtype=np.int16)}, "is not a ledger"),
        ({"stratum": np.zeros(4)}, "no usable `stratum`"),
        ({"stratum": np.array([0, 0, 2, 2], dtype=np.int16)}, "divides the prompts otherwise"),
        ({"stratum": np.zeros(5, dtype=np.int16)}, r"`counts` has the shape \(4, 4\), not \(5, 4\)"),
        ({"counts": np.full((4, 4), -1, dtype=np.float32)}, "no usable `counts`"),
        ({"last_seen": np.full(4, -2, dtype=np.int32)}, "no usable `last_seen`"),
        ({"recent_rows_tokens": np.array([1.0, np.inf])}, "no usable `recent_rows_tokens`"),
    ],
)
def test_what_is_no_ledger_does_not_open(change, message, tmp_path):
    path = tmp_path / "ledger.safetensors"
    path.write_bytes(save(filled().state_dict() | change))
    with pytest.raises(RunError, match=message):
        PromptLedger.open(path, 0.1)


def test_weights_of_a_model_are_no_ledger(tmp_path):
    """A file whose numbers NumPy does not know."""
    header = b'{"weight":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(RunError, match=r"model.safetensors is not a ledger[\s\S]*BF16"):
        PromptLedger.open(tmp_path / "model.safetensors", 0.1)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, ledger, again = tmp_path / "ledger.safetensors", filled(), PromptLedger(4, 0.1, (0, 0, 1, 1))
    ledger.save(path)
    before = belief(ledger, 0, step=40)
    observe(ledger, {0: [1] * 9}, step=30)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        ledger.save(path)
    again.load(path)
    assert belief(again, 0, step=40) == before


@pytest.mark.parametrize("module", ["prompts.ledger", "prompts.allocation", "prompts.dealing", "balance.aggregation"])
def test_the_module_imports_no_torch(module):
    code = f"import sys, rlbal.{module}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
