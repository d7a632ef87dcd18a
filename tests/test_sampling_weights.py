"""From sizes to weights, from attributes to keep sets: each formula by hand."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from corpus_steps import Doc, run_step
from hypothesis import given

from data_pipeline.mixtures.steps import make_sampling, make_step
from data_pipeline.select import weights
from data_pipeline.select.attributes import AttributeSelection, CurriculumPhases, QualitySelection, TemporalSelection
from data_pipeline.select.documents import (
    YEAR,
    attribute_rates,
    curriculum_phases,
    quality_rates,
    rates_for_shares,
    temporal_weights,
)
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError

SIZES = st.lists(st.floats(1, 1e13), min_size=1, max_size=8)


# weights of datasets

def test_unimax_worked_example():
    """1e11 tokens over 1e12, 2e11, 1e9 and 1e8, four epochs at most: the small ones give 4e8 and 4e9 tokens, the
    others half each of the 9.56e10 that are left."""
    found = weights.unimax([1e12, 2e11, 1e9, 1e8], 1e11, 4)
    assert found == pytest.approx([0.478, 0.478, 0.04, 0.004])
    epochs = [weight * 1e11 / size for weight, size in zip(found, [1e12, 2e11, 1e9, 1e8], strict=True)]
    assert epochs == pytest.approx([0.0478, 0.239, 4, 4])


@given(SIZES, st.floats(1, 1e13), st.floats(0.5, 8))
def test_unimax_is_the_most_even_under_its_cap(sizes, budget, cap):
    found = weights.unimax(sizes, budget, cap)
    seen = min(budget, cap * sum(sizes))
    assert math.fsum(found) == pytest.approx(1)
    largest = max(found)
    for weight, size in zip(found, sizes, strict=True):
        epochs = weight * seen / size
        assert epochs <= cap * (1 + 1e-9)
        assert weight == pytest.approx(largest) or epochs == pytest.approx(cap)  # even, or at its cap


def test_alpha_by_hand():
    """10 ** 1.3 = 19.952623, so 10 : 1 becomes 19.952623 : 1: above 1 favours the large one."""
    assert weights.alpha([10, 1]) == pytest.approx([19.952623 / 20.952623, 1 / 20.952623], abs=1e-8)
    assert weights.alpha([10, 1], 0.5) == pytest.approx([0.759747, 0.240253], abs=1e-6)
    assert weights.alpha([3, 2], 1) == pytest.approx(weights.proportional([3, 2])) == [0.6, 0.4]
    assert weights.alpha([2e13, 1e13], 2) == pytest.approx([0.8, 0.2])


def test_temperature_by_hand():
    assert weights.temperature([9, 1], 2) == pytest.approx([0.75, 0.25])
    assert weights.temperature([9, 1], 1) == pytest.approx([0.9, 0.1])
    assert weights.temperature([9, 1], 1e9) == pytest.approx([0.5, 0.5])
    assert weights.temperature([7, 3], 1 / 1.3) == pytest.approx(weights.alpha([7, 3], 1.3))


def test_rates_for_shares_by_hand():
    """Fine-grained: high has 10 of 100 tokens and should be half of training, so 5 times its share; low 0.1 of 0.6."""
    found = rates_for_shares({"high": 10, "medium": 30, "low": 60}, {"high": 0.5, "medium": 0.4, "low": 0.1}, {})
    assert found == pytest.approx({"high": 1.0, "medium": (0.4 / 0.3) / 5, "low": (0.1 / 0.6) / 5})
    grouped = rates_for_shares({"law": 20, "medicine": 20, "games": 60}, {"science": 0.5, "fun": 0.5},
                               {"law": "science", "medicine": "science", "games": "fun"})
    assert grouped == pytest.approx({"law": 1.0, "medicine": 1.0, "games": (0.5 / 0.6) / (0.5 / 0.4)})
    with pytest.raises(ValueError, match="shares are of b, the documents' are a"):
        rates_for_shares({"a": 1}, {"b": 1}, {})


def test_the_mixture_file_uses_these_formulas():
    sizes = [1e12, 2e11, 1e9, 1e8]
    assert make_sampling({"method": "unimax"}, "s").weights(sizes, 1e11) == weights.unimax(sizes, 1e11)
    assert make_sampling({"method": "unimax"}, "s").weights([3, 1], None) == [0.75, 0.25]
    assert make_sampling({"method": "alpha"}, "s").weights(sizes, None) == weights.alpha(sizes, 1.3)
    assert make_sampling({"method": "temperature"}, "s").weights(sizes, None) == weights.temperature(sizes, 3.3)


# rates of documents

def test_quality_rates_by_hand():
    """Scores 0 and 2 (z = -1 and 1), mean rate 0.5: c (e + 1/e) / 2 = 0.5; at 0.9 the better one is kept for sure."""
    scores = np.array([0.0, 2.0])
    c = 1 / (math.e + 1 / math.e)
    assert quality_rates(scores, 0.5) == pytest.approx([c / math.e, c * math.e])
    assert quality_rates(scores, 0.9) == pytest.approx([0.8, 1.0])
    assert quality_rates(scores, 0.9, 0.0) == pytest.approx([0.9, 0.9])
    assert quality_rates(np.array([1.0, 1.0, 1.0]), 0.25) == pytest.approx([0.25] * 3)
    assert quality_rates(scores, 1.0) == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="mean_rate"):
        quality_rates(scores, 0.0)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.floats(0.01, 1), st.floats(0, 5))
def test_quality_rates_have_their_mean(scores, mean, sharpness):
    found = quality_rates(np.array(scores), mean, sharpness)
    assert found.mean() == pytest.approx(mean) and (found <= 1 + 1e-12).all() and (found >= 0).all()
    order = np.argsort(scores)
    assert (np.diff(found[order]) >= -1e-12).all()


def test_curriculum_by_hand():
    assert curriculum_phases(np.array([3.0, 1, 2, 2, 9, 0]), 3).tolist() == [2, 0, 1, 1, 2, 0]
    assert curriculum_phases(np.array([3.0, 1, 2, 2, 9, 0]), 3, easy_first=False).tolist() == [0, 2, 1, 1, 0, 2]
    assert curriculum_phases(np.array([5.0, 5, 5, 5]), 2).tolist() == [0, 0, 1, 1]
    assert curriculum_phases(np.zeros(0), 4).tolist() == []


def test_temporal_weights_by_hand():
    now = 10 * YEAR
    dates = [round(now), round(now - 2 * YEAR), round(now - 4 * YEAR), round(now + YEAR), None]
    assert temporal_weights(dates, round(now), 2.0, 0.3) == pytest.approx([1, 0.5, 0.25, 1, 0.3])
    assert temporal_weights(dates[:3], None, 4.0) == pytest.approx([1, 2 ** -0.5, 0.5])
    assert temporal_weights([None], None).tolist() == [0.5]


def test_attribute_rates_by_hand():
    groups = {"law": "science", "biology": "science"}
    found = attribute_rates(["law", "games", "biology", None, "high"], {"science": 0.5, "high": 1.0}, 0.1, groups)
    assert found.tolist() == [0.5, 0.1, 0.5, 0.1, 1.0]


# steps

def documents(count=1000, **meta):
    return [Doc(f"d{number}", "text", meta={name: make(number) for name, make in meta.items()})
            for number in range(count)]


def share(rows, chosen):
    return np.mean([row["reason"] is None for number, row in enumerate(rows) if chosen(number)])


def test_attribute_step():
    docs = documents(quality=lambda n: ["high", "medium", "low"][n % 3])
    step = make_step("selection", {"type": "attributes", "rates": {"high": 1.0, "low": 0.0}, "other": 0.5}, "s")
    assert isinstance(step, AttributeSelection)
    rows = run_step(step, [docs[:10], docs[10:]])
    assert share(rows, lambda n: n % 3 == 0) == 1 and share(rows, lambda n: n % 3 == 2) == 0
    assert share(rows, lambda n: n % 3 == 1) == pytest.approx(0.5, abs=0.08)
    assert {row["reason"] for row in rows} == {None, "not selected by quality"}
    assert rows == run_step(step, [docs], cut=7)


def test_attribute_step_by_shares_of_the_text(capsys):
    texts = {"law": "x" * 300, "games": "x" * 50, "news": "x" * 100, None: "x" * 10}
    names = ["law", "games", "games", "news", "news", "news", None]
    docs = [Doc(f"d{number}", texts[names[number % 7]], meta={"domain": names[number % 7]}) for number in range(7000)]
    groups = {"law": "serious", "news": "serious"}
    step = make_step("selection", {"type": "attributes", "attribute": "domain", "groups": groups,
                                   "shares": {"serious": 0.6, "games": 0.4}}, "s")
    rows = run_step(step, [docs[:10], docs[10:]])
    kept = {name: sum(len(doc.text) for doc, row in zip(docs, rows, strict=True)
                      if row["reason"] is None and doc.meta["domain"] == name) for name in texts}
    total = kept["law"] + kept["news"] + kept["games"]
    assert kept["games"] / total == pytest.approx(0.4, abs=0.02)
    assert kept["law"] / kept["news"] == pytest.approx(1.0, abs=0.15)  # as it is in the text
    assert kept["games"] == 100_000 and kept[None] == 10_000  # no more is dropped than the shares ask for
    assert rows == run_step(step, [docs], cut=700)
    with pytest.raises(DataError, match="shares are of games, serious, the documents' are games, law, news"):
        run_step(AttributeSelection(attribute="domain", shares={"serious": 0.6, "games": 0.4}), [docs])
    assert not capsys.readouterr().err
    run_step(AttributeSelection(attribute="domain", rates={"gamse": 0.1, "serious": 1.0}, groups=groups), [docs])
    assert "by domain: no document has gamse; there are games, law, news\n" in capsys.readouterr().err


def test_quality_step():
    docs = documents(quality_score=lambda n: None if n % 10 == 9 else n / 1000)
    rows = run_step(QualitySelection(rate=0.4), [docs[:400], docs[400:]])
    assert share(rows, lambda n: True) == pytest.approx(0.4, abs=0.04)
    assert share(rows, lambda n: n > 800 and n % 10 < 9) > 2 * share(rows, lambda n: n < 200 and n % 10 < 9)


def test_temporal_step():
    year = round(YEAR)
    docs = [Doc(f"d{number}", "text", (20 - number % 3) * year if number % 4 else None) for number in range(2000)]
    rows = run_step(TemporalSelection(half_life_years=1.0, undated=0.0), [docs])
    for age in range(3):
        assert share(rows, lambda n, age=age: n % 4 > 0 and n % 3 == age) == pytest.approx(0.5 ** age, abs=0.06)
    assert share(rows, lambda n: n % 4 == 0) == 0
    later = run_step(TemporalSelection(reference="2000-01-01", half_life_years=10.0), [docs])
    assert later[1]["rate"] == pytest.approx(2 ** -((10957 * 86_400 - 19 * year) / YEAR / 10))


def test_curriculum_step_drops_nothing():
    docs = documents(10, perplexity=lambda n: 100 - n if n else None)
    rows = run_step(CurriculumPhases(phases=2), [docs[:3], docs[3:]])
    assert [row["reason"] for row in rows] == [None] * 10
    assert [row["phase"] for row in rows] == [1] * 5 + [0] * 5


def test_an_attribute_that_nobody_has():
    with pytest.raises(DataError, match=r"no document has the attribute 'quality'\. Add the filter"):
        run_step(AttributeSelection(), [documents(3)])
    with pytest.raises(DataError, match="no document has a date"):
        run_step(TemporalSelection(), [documents(3)])
    assert run_step(AttributeSelection(), [[]]) == []


@pytest.mark.parametrize("step, message", [
    (AttributeSelection(rates={"high": 1.5}), r"rates: high: 1.5 is not in \[0, 1\]"),
    (AttributeSelection(rates={"a": 1.0}, shares={"a": 1.0}), "shares: is given beside rates"),
    (AttributeSelection(shares={"a": -1.0, "b": 2.0}), "are no shares"),
    (AttributeSelection(shares={"a": float("nan")}), "are no shares"),
    (QualitySelection(rate=0.0), "rate: 0.0 is not in"),
    (TemporalSelection(reference="soon"), "reference: 'soon' is no date"),
    (TemporalSelection(half_life_years=0.0), "half_life_years: 0.0 is not above 0"),
    (CurriculumPhases(phases=0), "phases: 0 is below 1"),
])
def test_wrong_parameters(step, message):
    with pytest.raises(FieldError, match=message):
        step.check("selection[0]")
