"""Slow twins of the rule filters: plain Python, one text at a time, written to be read next to the rules' papers."""

import functools
import re
import unicodedata
from collections import Counter
from itertools import groupby

from data_pipeline.filters.c4 import POLICY
from data_pipeline.filters.characters import PUNCTUATION, TERMINAL, pairs
from data_pipeline.filters.gopher_quality import STOP_WORDS

WHITE = set("\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200b)}


def members(ranges):
    return {chr(code) for first, last in pairs(ranges) for code in range(first, last + 1)}


SYMBOLS, ENDS = members(PUNCTUATION), tuple(members(TERMINAL))


@functools.cache
def kind(character):
    if character in WHITE:
        return "white"
    return "letter" if unicodedata.category(character)[0] in "LMN" or character == "_" else "other"


def words_of(text, definition):
    if definition == "whitespace":
        return ["".join(run) for white, run in groupby(text, lambda c: kind(c) == "white") if not white]
    found = []
    for what, run in groupby(text, kind):
        if what == "letter":
            found.append("".join(run))
        elif what == "other" and definition == "pieces":
            found += list(run)
    return found


def heuristics(text, words="whitespace"):
    if text:
        size = len(text)
        if sum(kind(c) == "other" or c == "_" for c in text) / size >= 0.25:
            return "heuristics: too many non-alphanumeric characters"
        if sum(unicodedata.category(c) == "Nd" for c in text) / size >= 0.15:
            return "heuristics: too many digits"
        in_urls, at = 0, 0
        while match := re.compile(r"https?://|www\.").search(text, at):
            at = match.end()
            if at == size or text[at] in WHITE:
                continue
            while at < size and text[at] not in WHITE:
                at += 1
            in_urls += at - match.start()
        if in_urls / size >= 0.20:
            return "heuristics: too much URL text"
    found = words_of(text, words)
    mean = sum(map(len, found)) / len(found) if found else 0
    if not 50 <= len(found) <= 100_000:
        return f"heuristics: too {'few' if len(found) < 50 else 'many'} words"
    if not 3 <= mean <= 10:
        return f"heuristics: words too {'short' if mean < 3 else 'long'}"
    return None


def gopher_quality(text, words="whitespace"):
    found = words_of(text, words)
    real = [word for word in found if set(word) - SYMBOLS]
    lines = text.splitlines()
    if not 50 <= len(real) <= 100_000:
        return f"gopher_quality: too {'few' if len(real) < 50 else 'many'} words"
    mean = sum(map(len, real)) / len(real)
    if not 3 <= mean <= 10:
        return f"gopher_quality: words too {'short' if mean < 3 else 'long'}"
    if text.count("#") / len(found) > 0.1:
        return "gopher_quality: too many #"
    if (text.count("...") + text.count("…")) / len(found) > 0.1:
        return "gopher_quality: too many ellipses"
    if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > 0.9:
        return "gopher_quality: too many bullet lines"
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > 0.3:
        return "gopher_quality: too many lines end in an ellipsis"
    if sum(any(c.isalpha() for c in word) for word in found) / len(found) < 0.8:
        return "gopher_quality: too few alphabetic words"
    if len(set(STOP_WORDS) & set(found)) < 2:
        return "gopher_quality: too few stop words"
    return None


def _repeated(items):
    seen, again = set(), []
    for item in items:
        (again.append if item in seen else seen.add)(item)
    return len(again) / len(items), sum(map(len, again))


def duplicate_characters(found, n):
    seen, characters, at = set(), 0, 0
    while at + n <= len(found):
        gram = tuple(found[at:at + n])
        if gram in seen:
            characters, at = characters + len("".join(gram)), at + n
        else:
            seen.add(gram)
            at += 1
    return characters


def gopher_repetition(text, words="whitespace"):
    if not text:
        return "gopher_repetition: empty"
    for name, parts in (("paragraphs", re.split(r"\n{2,}", text.strip())), ("lines", re.split(r"\n+", text))):
        share, characters = _repeated(parts)
        if name == "paragraphs" and share > 0.3:
            return "gopher_repetition: repeated paragraphs"
        if name == "paragraphs" and characters / len(text) > 0.2:
            return "gopher_repetition: characters in repeated paragraphs"
        if name == "lines" and share > 0.3:
            return "gopher_repetition: repeated lines"
        if name == "lines" and characters / len(text) > 0.2:
            return "gopher_repetition: characters in repeated lines"
    found = words_of(text, words)
    for n, most in ((2, 0.20), (3, 0.18), (4, 0.16)):
        grams = Counter(tuple(found[i:i + n]) for i in range(len(found) - n + 1))
        if grams:
            gram, times = max(grams.items(), key=lambda item: item[1])  # the first of the most frequent
            if len(" ".join(gram)) * times / len(text) > most:
                return f"gopher_repetition: the top {n}-gram"
    for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
        if duplicate_characters(found, n) / len(text) > most:
            return f"gopher_repetition: duplicate {n}-grams"
    return None


def c4(text):
    """(reason, text)"""
    kept, sentences = [], 0
    for line in text.splitlines():
        line = line.strip("".join(WHITE))
        words = words_of(line, "whitespace")
        if any(len(word) > 1000 for word in words) or len(words) < 3:
            continue
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line)
        if not line.endswith((".", "?", "!", '"', "'")) or line.endswith("..."):
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return "c4: lorem ipsum", text
        if "javascript" in lower:
            continue
        if "{" in line:
            return "c4: curly bracket", text
        if any(policy in lower for policy in POLICY):
            continue
        sentences += 1 + len(re.findall(rf"[.!?][\"'”’)\]]*[{''.join(WHITE)}]", line))
        kept.append(line)
    return ("c4: too few sentences", text) if sentences < 5 else (None, "\n".join(kept).strip("".join(WHITE)))


def fineweb(text, words="pieces"):
    lines = [line for line in text.split("\n") if line.strip("".join(WHITE))]
    if not lines:
        return "fineweb: empty"
    if sum(line.endswith(ENDS) for line in lines) / len(lines) < 0.12:
        return "fineweb: few lines end a sentence"
    if sum(len(line) <= 30 for line in lines) / len(lines) > 0.67:
        return "fineweb: short lines"
    if _repeated(lines)[1] / len(text.replace("\n", "")) > 0.01:
        return "fineweb: characters in repeated lines"
    found = words_of(text, words)
    if found and text.count("\n") / len(found) > 0.3:
        return "fineweb: many lines for its words"
    return None
