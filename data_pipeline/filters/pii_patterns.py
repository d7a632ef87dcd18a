"""Personal data in a text: e-mail, phone, IP address, card, IBAN, US social security number.

Owns the shapes, the checks behind them (Luhn, mod 97, number ranges) and what stands before a number that makes it
one thing or another. Every pattern is bounded, so that no text makes the search slow. Knows nothing of filters.
"""

import bisect
import dataclasses
import functools
import ipaddress
import re
from collections.abc import Callable, Collection
from typing import Literal, get_args

Kind = Literal["iban", "card", "ssn", "ip", "email", "phone"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # where two overlap, the one named first is meant


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """Characters start to end of the text."""

    start: int
    end: int
    kind: Kind


# A text without a match of these (Rust's syntax) has no such datum: they run over all texts, the rest over few.
SCREENS: dict[Kind, str] = {
    "iban": r"[A-Z]{2}[0-9]{2} ?[A-Z0-9]{4}",
    "card": r"[0-9](?:[ -]?[0-9]){12}",
    "ssn": r"[0-9]{3}[- ][0-9]{2}[- ][0-9]{4}|(?i:ssn|social security)[^0-9\n]{0,20}[0-9]{9}",
    "ip": r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]|[23][0-9A-Fa-f]{3}:[0-9A-Fa-f]{0,4}:",
    "email": r"[A-Za-z0-9_+\-]@[A-Za-z0-9\-]+\.[A-Za-z]",
    "phone": r"\+ ?\(?[1-9](?:[ .\-()/]{0,3}[0-9]){6}|[0-9]{3}(?:\) ?|[.\-])[0-9]{3}[ .\-][0-9]{4}|"
             r"0[1-9](?:[ .][0-9]{2}){4}|"
             r"(?i:phone|tel|fax|mobile|cell|call|dial|text|handy|whatsapp|rufnummer|mobil|portable)"
             r"[^0-9\n]{0,24}[0-9](?:[ .\-()/]{0,3}[0-9]){6}",
}

_FILES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "ts", "html", "htm", "py", "json", "xml", "txt"}
_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+'\-/@])[A-Za-z0-9_][A-Za-z0-9._%+'\-]{0,63}@"
                    r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9_@\-])")
_IPV4 = re.compile(r"(?<![0-9A-Za-z.\-_])(?<![A-Za-z0-9]/)(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z_\-]|\.[0-9])")
_IPV6 = re.compile(r"(?<![0-9A-Za-z:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![0-9A-Za-z:])")
_NOT_IP = re.compile(r"(?:version|release|section|chapter|clause|firmware|kernel|build|rev\.?|sec\.?|oid|v|ver\.?|"
                     r"§|rule|figure|table|appendix|paragraph|step)[ :=]{0,2}$", re.IGNORECASE)
_IP_WORD = re.compile(r"(?:\bips?|addr(?:ess)?|host|server|client|gateway|router|\bdns|ping|from|https?:/)(?![A-Za-z])"
                      r"[^0-9\n]{0,12}$",
                      re.IGNORECASE)
_CARD = re.compile(r"(?<![0-9A-Za-z.,\-+/_])(?:[0-9]{13,19}|[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{3})?|"
                   r"[0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5})(?![0-9A-Za-z_]|[.,\-/][0-9])")
_IBAN = re.compile(r"(?<![0-9A-Za-z])[A-Z]{2}[0-9]{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)"
                   r"(?![0-9A-Za-z])")
_SSN = re.compile(r"(?<![0-9A-Za-z.\-+/])(?!000|666|9)[0-9]{3}([- ])(?!00)[0-9]{2}\1(?!0000)[0-9]{4}"
                  r"(?![0-9A-Za-z]|[.\-/,][0-9])")
_SSN_NAMED = re.compile(r"(?i:\bssn|social security)[^0-9\n]{0,20}((?!000|666|9)[0-9]{3}(?!00)[0-9]{2}(?!0000)[0-9]{4})"
                        r"(?![0-9A-Za-z\-])")
_SSN_WORD = re.compile(r"(?:ssn|social security)[^\n]{0,30}$", re.IGNORECASE)

_GAP = r"(?:[ .\-/]|\) ?| ?\(| - )?"
_INTERNATIONAL = re.compile(rf"(?<![0-9A-Za-z+.\-*/^])\+ ?\(?[1-9](?:{_GAP}[0-9]){{7,14}}(?![0-9A-Za-z]|[.,\-][0-9])")
_AMERICAN = re.compile(r"(?<![0-9A-Za-z.\-+/$#=])(?:1[ .\-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}([.\-]))[2-9][0-9]{2}"
                       r"[ .\-][0-9]{4}(?![0-9A-Za-z]|[.\-/,][0-9])")
_FRENCH = re.compile(r"(?<![0-9A-Za-z.\-+/])(?<![0-9] )0[1-9]([ .])[0-9]{2}(?:\1[0-9]{2}){3}"
                     r"(?![0-9A-Za-z]|[ .,\-/][0-9])")
_NAMED = re.compile(
    r"(?i:\b(?:telephone|phone|tel|fax|mobile?|cell|call|dial|text|handy|whatsapp|rufnummer|portable|telefon|"
    r"tél(?:éphone)?))(?:[^0-9A-Za-z\n]|(?i:numbers?|no|nr|is|at|on|me|us|him|her|or|our|my|the|office|line|home|"
    rf"direct|work|bei|unter|au|ext)(?![A-Za-z])){{0,24}}?"
    rf"(\(?[0-9](?:{_GAP}[0-9]){{6,13}})(?![0-9A-Za-z]|[.,\-/][0-9]|[%$€])")
_GROUPS = re.compile(r"[0-9]+")
_DATE = re.compile(r"(?:1[5-9]|20)[0-9]{2}[.\-/ ][01]?[0-9][.\-/ ][0-3]?[0-9]|"
                   r"[0-3]?[0-9][.\-/ ][0-3]?[0-9][.\-/ ](?:1[5-9]|20)[0-9]{2}")

_COUNTRIES = ("AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 "
              "EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 "
              "IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 "
              "NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 "
              "SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30")
_IBAN_LENGTHS = {pair[:2]: int(pair[2:]) for pair in _COUNTRIES.split()}


def find(text: str, kinds: Collection[Kind] = KINDS, public_ips_only: bool = True) -> list[Found]:
    """All personal data of these kinds in `text`, by place, none overlapping another."""
    found: list[Found] = []
    for kind in KINDS:
        if kind in kinds:
            starts = [item.start for item in found]
            new = []
            for start, end in _search(kind, text, public_ips_only):
                after = bisect.bisect_left(starts, start)
                if ((after == len(found) or found[after].start >= end) and
                        (after == 0 or found[after - 1].end <= start)):
                    new.append(Found(start, end, kind))
            found = sorted(found + new, key=lambda item: item.start)
    return found


def _search(kind: Kind, text: str, public_ips_only: bool) -> list[tuple[int, int]]:
    public = functools.partial(_is_ip, public_only=public_ips_only)
    searches: dict[Kind, list[tuple[re.Pattern[str], Callable[[re.Match[str]], bool]]]] = {
        "iban": [(_IBAN, _is_iban)],
        "card": [(_CARD, _is_card)],
        "ssn": [(_SSN, _is_ssn), (_SSN_NAMED, lambda match: True)],
        "ip": [(_IPV4, public), (_IPV6, public)],
        "email": [(_EMAIL, _is_email)],
        "phone": [(_INTERNATIONAL, _is_international), (_AMERICAN, lambda match: True), (_FRENCH, lambda match: True),
                  (_NAMED, _is_named)],
    }
    spans: dict[int, int] = {}
    for pattern, is_one in searches[kind]:
        for match in pattern.finditer(text):
            if is_one(match):
                start, end = match.span(match.lastindex if pattern in (_NAMED, _SSN_NAMED) and match.lastindex else 0)
                spans[start] = max(end, spans.get(start, 0))
    kept, last = [], 0
    for start, end in sorted(spans.items()):
        if start >= last:
            kept.append((start, end))
            last = end
    return kept


def _before(match: re.Match[str], characters: int) -> str:
    return match.string[max(0, match.start() - characters):match.start()]


def _is_email(match: re.Match[str]) -> bool:
    local, _, domain = match[0].rpartition("@")
    return ".." not in local and not local.endswith(".") and domain.rpartition(".")[2].lower() not in _FILES


def _is_ip(match: re.Match[str], public_only: bool) -> bool:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    before = _before(match, 32)
    if _NOT_IP.search(before):
        return False
    if address.version == 4 and max(address.packed) < 100 and not _IP_WORD.search(before):
        return False  # 4.1.2.13 is the number of a section or an object, unless the text says address
    return not public_only or (address.is_global and not address.is_multicast)


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _is_card(match: re.Match[str]) -> bool:
    digits = re.sub("[^0-9]", "", match[0])
    size, two, four = len(digits), int(digits[:2]), int(digits[:4])
    issued = ((size in (13, 16, 19) and digits[0] == "4") or
              (size == 16 and (51 <= two <= 55 or 2221 <= four <= 2720 or two == 65 or four == 6011 or
                              6440 <= four <= 6499 or 3528 <= four <= 3589)) or
              (size == 15 and two in (34, 37)) or (size == 14 and (3000 <= four <= 3059 or two in (36, 38, 39))) or
              (16 <= size <= 19 and two == 62))
    return issued and len(set(digits)) > 1 and luhn(digits)


def _is_iban(match: re.Match[str]) -> bool:
    return is_iban(match[0].replace(" ", ""))


def is_iban(compact: str) -> bool:
    """Whether country, length and check digits fit (ISO 13616)."""
    if _IBAN_LENGTHS.get(compact[:2]) != len(compact):
        return False
    turned = compact[4:] + compact[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % 97 == 1


def _is_ssn(match: re.Match[str]) -> bool:
    # with spaces between, only where the text says what it is
    return match[1] == "-" or bool(_SSN_WORD.search(_before(match, 50)))


def _is_international(match: re.Match[str]) -> bool:
    groups = _GROUPS.findall(match[0])
    digits = sum(map(len, groups))
    if not 9 <= digits <= 15:
        return False
    if "." in match[0] and len(groups) < 3:
        return False  # a decimal number
    return not (len(groups) == 2 and digits < 10)


def _is_named(match: re.Match[str]) -> bool:
    number = match[match.lastindex or 0]
    digits = sum(map(len, _GROUPS.findall(number)))
    if _DATE.match(number) or not 7 <= digits <= 14:
        return False
    return not ("." in number and number.count(".") == 1 and len(_GROUPS.findall(number)) == 2)
