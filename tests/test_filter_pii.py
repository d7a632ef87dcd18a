"""Personal data: a labelled set, check digits, masks, and screens that lose nothing."""

from collections import Counter

import pytest
from pii_cases import BY_HAND, KNOWN_WRONG, generated

from data_pipeline.filters import make_batch, make_filter
from data_pipeline.filters.pii_patterns import KINDS, find, is_iban, luhn

CASES = [*BY_HAND, *KNOWN_WRONG, *generated(7, 900)]


def figures(cases):
    """Per kind and in all: true positives, what was found, what is there. A find counts only if it is exact."""
    right, found, there = Counter(), Counter(), Counter()
    for text, labels in cases:
        got = Counter((item.kind, text[item.start:item.end]) for item in find(text))
        want = Counter((kind, value) for kind, values in labels.items() for value in values)
        for counter, items in ((right, got & want), (found, got), (there, want)):
            for (kind, _), number in items.items():
                counter[kind] += number
                counter["all"] += number
    return {kind: (right[kind], found[kind], there[kind]) for kind in [*KINDS, "all"]}


def f1(right, found, there):
    return 2 * right / (found + there)


def test_f1_on_the_labelled_set():
    counted = figures(CASES)
    print({kind: (round(f1(*numbers), 3), numbers) for kind, numbers in counted.items()})
    assert counted["all"][2] >= 600
    for kind, numbers in counted.items():
        assert numbers[2] >= 60, kind
        assert f1(*numbers) >= 0.95, (kind, numbers)


@pytest.mark.parametrize("text, labels", BY_HAND)
def test_cases_written_by_hand(text, labels):
    got = {}
    for item in find(text):
        got.setdefault(item.kind, []).append(text[item.start:item.end])
    assert got == labels


def test_the_filter_finds_what_the_search_finds():
    """The screens over all texts (another engine) lose nothing, and kinds can be chosen."""
    texts = [text for text, _ in CASES]
    counts = make_filter({"type": "pii", "action": "detect"}, "x").judge(make_batch(texts)).scores
    for kind in KINDS:
        slow = [sum(item.kind == kind for item in find(text)) for text in texts]
        assert counts[f"pii.{kind}"].to_list() == slow
    only = make_filter({"type": "pii", "action": "detect", "kinds": ["ip"]}, "x").judge(make_batch(texts)).scores
    assert list(only) == ["pii.ip"]


def test_mask_drop_and_detect():
    texts = ["Mail jane@example.org or +44 20 7946 0958!", "Nothing here, in 1984.",
             "ünï 😀 a@example.org\u2028b@example.com"]
    batch = make_batch(texts)
    masked = make_filter({"type": "pii"}, "x").judge(batch)
    assert masked.text.to_list() == ["Mail [EMAIL] or [PHONE]!", texts[1], "ünï 😀 [EMAIL]\u2028[EMAIL]"]
    assert batch.text.to_list() == texts
    assert masked.reasons.null_count() == 3
    own = make_filter({"type": "pii", "kinds": ["email"], "masks": {"email": "<mail>"}}, "x").judge(batch)
    assert own.text[0] == "Mail <mail> or +44 20 7946 0958!"
    dropped = make_filter({"type": "pii", "action": "drop"}, "x").judge(batch)
    assert dropped.reasons.to_list() == ["pii: personal data", None, "pii: personal data"]
    assert dropped.text is None
    # a masked text has nothing left to find
    again = make_filter({"type": "pii"}, "x").judge(make_batch(masked.text.to_list()))
    assert again.text.to_list() == masked.text.to_list()


def test_private_addresses_on_demand():
    assert [item.kind for item in find("host 192.168.10.20", public_ips_only=False)] == ["ip"]


@pytest.mark.parametrize("number, right", [("4111111111111111", True), ("4111111111111112", False), ("79927398713",
                                                                                                     True),
                                           ("79927398710", False)])
def test_luhn(number, right):
    assert luhn(number) is right


def test_iban_check_digits():
    assert is_iban("GB82WEST12345698765432")
    for wrong in ("GB82WEST12345698765433", "GB83WEST12345698765432", "GB82WEST1234569876543",
                  "ZZ82WEST12345698765432"):
        assert not is_iban(wrong)


@pytest.mark.parametrize("text", ["a" * 200_000, "1" * 200_000, "1 " * 100_000, "1." * 100_000, "a@" * 100_000,
                                  "+1 " * 60_000,
                                  "tel " * 50_000, "2001:" * 40_000, "AB12 " * 40_000, "call me on the " * 20_000,
                                  "a.b-c_" * 40_000, "123-45-" * 30_000, "(212) " * 40_000, "DE89" * 50_000,
                                  "x@y." * 50_000],
                         ids=lambda text: text[:8])
def test_no_text_makes_the_search_slow(text):
    import time
    start = time.process_time()
    find(text)
    assert time.process_time() - start < 5


def test_wrong_parameters():
    with pytest.raises(ValueError, match="'phones' is not one of"):
        make_filter({"type": "pii", "kinds": ["phones"]}, "x")
    with pytest.raises(ValueError, match=r"masks: has none for iban"):
        make_filter({"type": "pii", "masks": {"email": "x"}}, "x")
