"""`url_blocklist`: documents from listed domains, or with URLs of listed shapes."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Literal

import polars as pl

from data_pipeline.filters.base import Batch, Judgement, Parameters
from data_pipeline.filters.resources import file_hash, resource
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError

_HOST = r"^(?:[A-Za-z][A-Za-z0-9+.\-]*:)?(?://)?(?:[^/?#@]*@)?\[?([^/?#:\]\s]+)"
_DOMAIN = re.compile(r"(?:[^\s./:@*|^$#]+\.)*[^\s./:@*|^$#]+")
_HOW = "Give a text file with one entry a line."


@dataclasses.dataclass(frozen=True)
class UrlBlocklistFilter(Parameters):
    """Drops documents whose URL (the meta field `field`) is on a listed domain or below one, or matches a pattern.

    Lists hold one domain a line; # and ! begin comments; lines of hosts files ("0.0.0.0 domain") and the domain
    rules of ad-block lists ("||domain^") are understood, other ad-block rules are passed over. Patterns are regular
    expressions of Rust's `regex`, searched anywhere in the URL; case matters unless they begin with (?i).
    """

    type: Literal["url_blocklist"] = "url_blocklist"
    domains: tuple[str, ...] = ()
    domain_files: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    pattern_files: tuple[str, ...] = ()
    field: str = "url"
    missing: Literal["keep", "drop"] = "keep"  # documents without a URL

    def check(self, where: str) -> None:
        """Raises FieldError where nothing is listed or a pattern cannot be used."""
        if not (self.domains or self.domain_files or self.patterns or self.pattern_files):
            raise FieldError(where, "lists nothing", "Give domains, domain_files, patterns or pattern_files.")
        for index, domain in enumerate(self.domains):
            if not _DOMAIN.fullmatch(domain):
                raise FieldError(f"{where}.domains[{index}]", f"{domain!r} is no domain", "Write example.com.")
        for index, pattern in enumerate(self.patterns):
            if (why := _wrong_pattern(pattern)) is not None:
                raise FieldError(f"{where}.patterns[{index}]", f"{pattern!r} is no regular expression ({why})",
                                 "Mend it.")

    def resources(self) -> dict[str, str]:
        """The list files."""
        return {f"{name} {index}": file_hash(path) for name in ("domain_files", "pattern_files")
                for index, path in enumerate(self._paths(name))}

    def judge(self, batch: Batch) -> Judgement:
        """Reasons by URL; the text is not looked at."""
        urls = [meta.get(self.field) for meta in batch.meta]
        url = pl.Series("url", [one if isinstance(one, str) and one else None for one in urls], dtype=pl.String)
        hosts = url.str.extract(_HOST, 1).str.to_lowercase().str.strip_chars_end(".").to_list()
        blocked = self._domains()
        listed = pl.Series("listed", [host is not None and is_below(host, blocked) for host in hosts], dtype=pl.Boolean)
        shaped = pl.Series("shaped", [False] * len(batch), dtype=pl.Boolean)
        for pattern in self._patterns():
            shaped |= url.str.contains(pattern).fill_null(False)
        dropped = url.is_null() & (self.missing == "drop")
        reasons = pl.DataFrame([listed, shaped, dropped.alias("absent")]).select(
            reason=pl.when("listed").then(pl.lit("url_blocklist: domain")).when("shaped").then(
                pl.lit("url_blocklist: pattern")).when("absent").then(pl.lit("url_blocklist: no URL")).otherwise(None))
        return Judgement(reasons["reason"])

    def _paths(self, name: str) -> list[Path]:
        return [resource(path, f"url_blocklist.{name}", _HOW) for path in getattr(self, name)]

    def _domains(self) -> frozenset[str]:
        files = [_read_domains(path, file_hash(path)) for path in self._paths("domain_files")]
        return frozenset(domain.lower() for domain in self.domains).union(*files)

    def _patterns(self) -> list[str]:
        files = [_read_patterns(path, file_hash(path)) for path in self._paths("pattern_files")]
        return [*self.patterns, *(pattern for patterns in files for pattern in patterns)]


def is_below(host: str, domains: frozenset[str]) -> bool:
    """Whether `host` or a domain above it is in `domains`."""
    while True:
        if host in domains:
            return True
        _, dot, host = host.partition(".")
        if not dot:
            return False


def _lines(path: Path) -> list[tuple[int, str]]:
    text = path.read_bytes().decode("utf-8", errors="replace")
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


@functools.lru_cache(maxsize=16)
def _read_domains(path: Path, sha256: str) -> frozenset[str]:
    """The domains of a list file. Errors: DataError names the line that is none."""
    lines = _lines(path)
    adblock = bool(lines) and (lines[0][1].startswith("[Adblock") or any(line.startswith("||") for _, line in lines))
    found = set()
    for number, line in lines:
        if line[0] in "#!" or line.startswith("[Adblock"):
            continue
        if adblock:
            rule = re.fullmatch(r"\|\|([^/^$*]+)\^(?:\$[^,]*third-party|\$popup)?", line)
            if rule is not None:
                found.add(rule[1].lower().rstrip("."))
            continue
        words = line.partition("#")[0].split()
        domain = words[-1] if len(words) in (1, 2) else ""
        if not _DOMAIN.fullmatch(domain) or (len(words) == 2 and words[0] not in ("0.0.0.0", "127.0.0.1", "::", "::1")):
            raise DataError(f"{path}:{number}: {line[:100]!r} is no domain. Give one domain a line.")
        found.add(domain.lower().rstrip("."))
    if not found:
        raise DataError(f"{path}: lists no domain. {_HOW}")
    return frozenset(found)


@functools.lru_cache(maxsize=16)
def _read_patterns(path: Path, sha256: str) -> tuple[str, ...]:
    """The patterns of a list file. Errors: DataError names the line that is none."""
    found = []
    for number, line in _lines(path):
        if line.startswith("#"):
            continue
        if (why := _wrong_pattern(line)) is not None:
            raise DataError(f"{path}:{number}: {line[:100]!r} is no regular expression ({why}). Mend the line.")
        found.append(line)
    return tuple(found)


def _wrong_pattern(pattern: str) -> str | None:
    if not pattern:
        return "it is empty, and would match every URL"
    try:
        pl.Series([""]).str.contains(pattern)
    except pl.exceptions.ComputeError as error:
        return " ".join(str(error).split())[:200]
    return None


