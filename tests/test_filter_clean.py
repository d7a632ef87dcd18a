"""Cleaning equals a plain-Python twin; URL blocklists; ugly input that no filter may fall over."""

import re
import unicodedata

import ftfy
import polars as pl
import pytest

from data_pipeline.filters import FILTERS, make_batch, make_filter
from data_pipeline.filters.clean import BOILERPLATE, INVISIBLE
from nanollama.data.files import DataError

TEXTS = [
    "Title\n\n\n\n\nAccept all cookies\nBody text of the page.  \n© 2019 Some Company. All rights reserved.\n"
    "Share this on Facebook\nWe use cookies to give you more.\n \t \nThe end   ",
    "CafÃ© â€œquotedâ€\x9d text\nnaïve café “fine” stays, as does Ãlone", "a\r\nb\x0bc\u2028d\x85e\rf",
    "x\x00\x01y\u200bz\ufeff\u00ad\u202e",
    "e\u0301 A\u030a \u1100\u1161 ﬁ １", "👩\u200d👩\u200c", "", "\n\n", "   leading stays",
    "Read more »\n\nlog in\nsign up now\n" * 3,
    "All rights reserved in a sentence that goes on and on is no boilerplate, is it? " * 5,
    "Privacy Policy | Terms of Use | Contact Us",
    "A treaty on privacy policy was signed.", "Share\nlike\nTWEET\nshares of the company",
    "You can log in to the machine with a key",
    "cookie\nCookies are sweet.\nwe use cookies", "\ttab\tstays\t", "one\n\n\ntwo\n\n\n\n\nthree",
    "\u00a0\n\u00a0x\u00a0",
]


def twin(text):
    """The steps of `clean`, one text and one line at a time, written with other means."""
    config = ftfy.TextFixerConfig(unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False,
                                  fix_character_width=False, uncurl_quotes=False, fix_line_breaks=False,
                                  fix_surrogates=False, remove_control_chars=False, normalization=None, explain=False)
    text = "\n".join(ftfy.fix_text(line, config) if ftfy.badness.is_bad(line) else line for line in text.split("\n"))
    for end in ("\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"):
        text = text.replace(end, "\n")
    invisible = {"\u00ad", "\u200b", "\u200e", "\u200f", "\u2060", "\ufeff", *map(chr, range(0x202A, 0x202F)),
                 *map(chr, range(0x2066, 0x206A)), "\ufff9", "\ufffa", "\ufffb", "\ufffe", "\uffff"}
    text = "".join(c for c in text if c in "\t\n" or not (unicodedata.category(c) == "Cc" or c in invisible
                                                          or "\ufdd0" <= c <= "\ufdef"))
    text = unicodedata.normalize("NFC", text)
    lines = [line for line in text.split("\n") if not (line and len(line.encode()) <= 300 and any(
        re.fullmatch(pattern, line.strip(), re.IGNORECASE) for pattern in BOILERPLATE))]
    text = "\n".join(line.rstrip() if number < len(lines) - 1 else line for number, line in enumerate(lines)).rstrip()
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.lstrip("\n")


def cleaned(texts, **parameters):
    return make_filter({"type": "clean", **parameters}, "x").judge(make_batch(texts))


def test_clean_equals_the_twin():
    judgement = cleaned(TEXTS)
    assert judgement.text.to_list() == [twin(text) for text in TEXTS]
    assert judgement.reasons.null_count() == len(TEXTS)
    removed = [len(old) - len(new) for old, new in zip(TEXTS, judgement.text, strict=True)]
    assert judgement.scores["clean.characters_removed"].to_list() == removed
    again = cleaned(judgement.text.to_list())
    assert again.text.to_list() == judgement.text.to_list()


def test_some_results_by_eye():
    text = cleaned(TEXTS).text
    assert text[0] == "Title\n\nBody text of the page.\n\nThe end"
    assert text[1] == "Café “quoted” text\nnaïve café “fine” stays, as does Ãlone"
    assert text[2] == "a\nb\nc\nd…e\nf"  # U+0085 is the ellipsis of Windows-1252
    assert text[3] == "xyz"
    assert text[4] == "é Å 가 ﬁ １"
    assert text[9] == ""
    assert text[11] == ""
    assert text[12] == TEXTS[12]


def test_each_step_can_be_left_out():
    off = {"mojibake": False, "line_ends": False, "invisible": False, "unicode": None, "boilerplate": [],
           "spaces": False}
    assert cleaned(TEXTS, **off).text.to_list() == TEXTS
    assert cleaned(["CafÃ©\x00"], **{**off, "mojibake": True}).text[0] == "Café\x00"
    assert cleaned(["ﬁ"], **{**off, "unicode": "NFKC"}).text[0] == "fi"
    assert cleaned(["Advert\nText"], **{**off, "boilerplate": ["advert"]}).text[0] == "Text"
    with pytest.raises(ValueError, match=r"boilerplate\[0\].*no regular expression"):
        make_filter({"type": "clean", "boilerplate": ["("]}, "x")


def test_invisible_characters_are_those_named():
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    gone = set(pl.Series(every).filter(pl.Series(every).str.contains(INVISIBLE)).to_list())
    controls = {c for c in every if unicodedata.category(c) == "Cc"} - set("\t\n\r\x0b\x0c\x1c\x1d\x1e\x85")
    assert controls <= gone
    assert not gone & {"\u200c", "\u200d", "\t", "\n", " ", "\u00a0"}
    assert all(unicodedata.category(c) in ("Cc", "Cf", "Cn") for c in gone)


URLS = ["https://example.com/a", "http://shop.example.com:80/b", "https://notexample.com/",
        "HTTPS://User@SUB.BAD.org./x", "bad.org/path",
        "https://good.org/?u=https://bad.org", "https://good.org/casino/win", None, "", 7, "ftp://[2001:db8::1]/x",
        "https://bad.org.evil.net"]


def test_url_blocklist(tmp_path):
    (tmp_path / "domains.txt").write_text(
        "# a comment\nbad.org\n0.0.0.0 ads.example\n\n127.0.0.1 tracker.example # why\n")
    (tmp_path / "adblock.txt").write_text("[Adblock Plus 2.0]\n! title\n||ads.example.net^\n||pop.example^$popup\n"
                                          "/banner/*\n||site.example/path^\n@@||ok.example^\n##.ad\n")
    (tmp_path / "patterns.txt").write_text("# one a line\n/casino/\n(?i)porn\n")
    mapping = {"type": "url_blocklist", "domains": ["Example.com"], "domain_files": [str(tmp_path / "domains.txt")],
               "pattern_files": [str(tmp_path / "patterns.txt")]}
    item = make_filter(mapping, "x")
    urls = [*URLS, "https://tracker.example/", "https://a.ads.example", "http://x.net/PORN"]
    batch = make_batch(["text"] * len(urls), meta=[{} if url is None else {"url": url} for url in urls])
    domain, pattern = "url_blocklist: domain", "url_blocklist: pattern"
    assert item.judge(batch).reasons.to_list() == [domain, domain, None, domain, domain, None, pattern, None, None,
                                                   None, None, None,
                                                   domain, domain, pattern]
    assert len(item.resources()) == 2
    dropped = make_filter({**mapping, "missing": "drop"}, "x").judge(batch).reasons.to_list()
    assert dropped[7:10] == ["url_blocklist: no URL"] * 3
    adblock = make_filter({"type": "url_blocklist", "domain_files": [str(tmp_path / "adblock.txt")]}, "x")
    urls = ["http://ads.example.net/", "http://pop.example", "http://site.example/path", "http://ok.example",
            "http://x/banner/a"]
    batch = make_batch(["text"] * 5, meta=[{"url": url} for url in urls])
    assert adblock.judge(batch).reasons.to_list() == [domain, domain, None, None, None]


def test_wrong_lists_are_explained(tmp_path):
    (tmp_path / "d.txt").write_text("good.org\nhttps://bad.org/path\n")
    with pytest.raises(DataError, match=r"d\.txt:2: .*is no domain"):
        make_filter({"type": "url_blocklist", "domain_files": [str(tmp_path / "d.txt")]}, "x").judge(make_batch(["a"]))
    (tmp_path / "p.txt").write_text("ok\n(\n")
    with pytest.raises(DataError, match=r"p\.txt:2: .*no regular expression"):
        make_filter({"type": "url_blocklist", "pattern_files": [str(tmp_path / "p.txt")]}, "x").judge(make_batch(["a"]))
    with pytest.raises(DataError, match="no file"):
        make_filter({"type": "url_blocklist", "domain_files": [str(tmp_path / "none.txt")]}, "x").resources()
    with pytest.raises(ValueError, match="lists nothing"):
        make_filter({"type": "url_blocklist"}, "x")
    with pytest.raises(ValueError, match=r"patterns\[0\].*no regular expression"):
        make_filter({"type": "url_blocklist", "patterns": ["["]}, "x")


UGLY = ["", " ", "\n", "\x00", "\ufeff", "\u2028\u2029\x85", "\ufffd" * 50, "ÃƒÂ©" * 50, "a" * 200_000, "\n" * 100_000,
        " " * 100_000,
        "1" * 100_000, "e\u0301\u0302" * 20_000, "👩\u200d" * 20_000, "\U0010ffff\ue000", "𝕏 \u200b 中文",
        "www." * 20_000, "-\n" * 30_000,
        "a b " * 40_000, "。" * 30_000, "Ã" * 30_000, "a@b.c" * 20_000]
PLAIN = [name for name in FILTERS if name not in ("perplexity", "quality", "toxicity", "domain", "url_blocklist")]


@pytest.mark.parametrize("name", PLAIN)
def test_no_text_stops_a_filter_or_makes_it_slow(name):
    import time
    item = make_filter({"type": name}, "x")
    start = time.process_time()
    together = item.judge(make_batch(UGLY))
    assert time.process_time() - start < 15
    assert len(together.reasons) == len(UGLY)
    assert together.reasons.dtype == pl.String
    few = [0, 1, 5, 7, 12, 14]
    alone = [item.judge(make_batch([UGLY[index]])) for index in few]
    assert [together.reasons[index] for index in few] == [one.reasons[0] for one in alone]
    nothing = item.judge(make_batch([]))
    assert len(nothing.reasons) == 0
    assert nothing.scores.keys() == together.scores.keys()


def test_texts_that_are_no_unicode_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="lone surrogate"):
        make_batch(["ok", "\ud800"])
    with pytest.raises(ValueError, match="have no text"):
        make_batch(["ok", None])
