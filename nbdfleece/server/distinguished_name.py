r"""Distinguished names: parsed, compared attribute by attribute, and patterns of them.

A name is a sequence of RDNs, each a set of attributes. There are two spellings of one name, and
nothing in either tells which it is: in the order of the certificate (`C=GB,O=Example,CN=x`: GnuTLS,
QEMU 7.2) and in reverse (`CN=x,O=Example,C=GB`: RFC 4514, OpenSSL). A pattern fits a name if either
reading of the pattern does.

Invariants
  N1  Texts are never compared: what an attribute's value contains (a comma, `O=Admin`, an escape)
      cannot become another attribute, and a `*` within a value never reaches beyond it.
  N2  Values are compared exactly: case counts, and no two different Unicode texts are equal.
  N3  A pattern says all of the name. Only `*` in place of a whole RDN lets any number of others be.

Spec: RFC 4514. Beyond it: blanks around `,`, `+` and `=` as OpenSSL prints them, and `\*` and `\?`,
which stand for themselves in patterns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdfleece.base.errors import ConfigError
from nbdfleece.server.glob import ANY_ONE, Characters, Glob, check_pattern

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Attributes of one RDN: dotted number of the type, value.
Rdn: TypeAlias = "frozenset[tuple[str, str]]"

_RdnPattern: TypeAlias = "Mapping[str, Glob]"

# The first name of a number is the one that we print.
_TYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "2.5.4.3": ("CN", "commonName"),
    "2.5.4.4": ("SN", "surname"),
    "2.5.4.5": ("serialNumber",),
    "2.5.4.6": ("C", "countryName"),
    "2.5.4.7": ("L", "localityName"),
    "2.5.4.8": ("ST", "S", "stateOrProvinceName"),
    "2.5.4.9": ("STREET", "streetAddress"),
    "2.5.4.10": ("O", "organizationName"),
    "2.5.4.11": ("OU", "organizationalUnitName"),
    "2.5.4.12": ("title", "T"),
    "2.5.4.13": ("description",),
    "2.5.4.15": ("businessCategory",),
    "2.5.4.16": ("postalAddress",),
    "2.5.4.17": ("postalCode",),
    "2.5.4.41": ("name",),
    "2.5.4.42": ("GN", "givenName"),
    "2.5.4.43": ("initials",),
    "2.5.4.44": ("generationQualifier",),
    "2.5.4.46": ("dnQualifier",),
    "2.5.4.65": ("pseudonym",),
    "2.5.4.97": ("organizationIdentifier",),
    "0.9.2342.19200300.100.1.1": ("UID", "userId"),
    "0.9.2342.19200300.100.1.25": ("DC", "domainComponent"),
    "1.2.840.113549.1.9.1": ("emailAddress", "EMAIL", "E"),
    "1.2.840.113549.1.9.2": ("unstructuredName",),
    "1.2.840.113549.1.9.8": ("unstructuredAddress",),
}
_NUMBERS: Final = {name.lower(): number for number, names in _TYPES.items() for name in names}

_DOTTED: Final = re.compile(r"(?:OID\.)?((?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*))+)", re.IGNORECASE)
_HEX_PAIR: Final = re.compile(r"[0-9A-Fa-f]{2}")
_HEX_STRING: Final = re.compile(r"#(?:[0-9A-Fa-f]{2})+")
_SPECIAL: Final = ' "#=+,;<>\\'  # may stand behind a backslash
_RESERVED: Final = '";<>\0'  # may not stand without one; `,` and `+` have been looked at before

# DER tags of texts, with how Python calls their encoding.
_TEXT_TAGS: Final = {
    0x0C: "utf-8",  # UTF8String
    0x12: "ascii",  # NumericString
    0x13: "ascii",  # PrintableString
    0x14: "latin-1",  # TeletexString, as everybody reads it
    0x16: "ascii",  # IA5String
    0x1A: "ascii",  # VisibleString
    0x1C: "utf-32-be",  # UniversalString
    0x1E: "utf-16-be",  # BMPString
}


@dataclass(frozen=True, slots=True)
class DistinguishedName:
    """A distinguished name.

    Attributes:
        rdns: In the order of the certificate; no attribute type twice in one RDN.
    """

    rdns: tuple[Rdn, ...]

    def text(self) -> str:
        """Return the name as RFC 4514 spells it, with nothing in it that is not printable."""
        return ",".join(
            "+".join(sorted(_attribute_text(*attribute) for attribute in rdn))
            for rdn in reversed(self.rdns)
        )


class NamePattern:
    """What a distinguished name must be.

    Args:
        text: A name in either spelling. In parts of its values, and in place of RDNs, with globs.
        globs: `*` and `?` have their meaning as patterns; else they stand for themselves.

    Raises:
        ConfigError: `text` is not a name; it says why.
    """

    def __init__(self, text: str, *, globs: bool) -> None:
        check_pattern(text)
        self._rdns: tuple[_RdnPattern | None, ...] = tuple(
            None if globs and part.strip(" ") == "*" else _rdn_pattern(text, part, globs=globs)
            for part in _split(text, ",")
        )

    def matches(self, name: DistinguishedName) -> bool:
        """Tell whether `name` fits, with the pattern read in either order."""
        return _all_match(self._rdns, name.rdns) or _all_match(self._rdns, name.rdns[::-1])


def parse_name(text: str) -> DistinguishedName:
    """Return the name that RFC 4514 means by `text`; there are no globs in it.

    Raises:
        ConfigError: It is none.
    """
    return DistinguishedName(
        tuple(
            frozenset(
                (kind, "".join(filter(None, value)))
                for kind, value in _parse_rdn(text, part, globs=False).items()
            )
            for part in reversed(_split(text, ","))
        )
    )


def _all_match(wanted: Sequence[_RdnPattern | None], found: Sequence[Rdn]) -> bool:
    """Tell whether all of `found` are what is wanted; None stands for any number of RDNs.

    Goes back no further than to the last None, which is enough, and bounds the time.
    """
    at = seen = rest = 0
    star = -1
    while seen < len(found):
        pattern = wanted[at] if at < len(wanted) else None
        if at < len(wanted) and pattern is None:
            star, rest = at, seen
            at += 1
        elif pattern is not None and _rdn_matches(pattern, found[seen]):
            at += 1
            seen += 1
        elif star >= 0:
            rest += 1  # one more RDN is for the last None
            at, seen = star + 1, rest
        else:
            return False
    return all(pattern is None for pattern in wanted[at:])


def _rdn_matches(wanted: _RdnPattern, found: Rdn) -> bool:
    """Tell whether an RDN has just the attributes that are wanted."""
    return len(wanted) == len(found) and all(
        kind in wanted and wanted[kind].matches(value) for kind, value in found
    )


# --- parsing -----------------------------------------------------------------------------------


def _refuse(text: str, why: str) -> ConfigError:
    return ConfigError(f"'{text}' is not a distinguished name: {why}")


def _split(text: str, separator: str) -> list[str]:
    """Return the parts of `text` between separators that have no backslash before them."""
    parts = [""]
    rest = iter(text)
    for character in rest:
        if character == separator:
            parts.append("")
        elif character == "\\":
            parts[-1] += character + next(rest, "")
        else:
            parts[-1] += character
    return parts


def _rdn_pattern(whole: str, text: str, *, globs: bool) -> _RdnPattern:
    rdn = _parse_rdn(whole, text, globs=globs)
    return {kind: Glob(value) for kind, value in rdn.items()}


def _parse_rdn(whole: str, text: str, *, globs: bool) -> dict[str, Characters]:
    """Return the characters of each value by the number of its type, with globs or without."""
    rdn: dict[str, Characters] = {}
    for part in _split(text, "+"):
        kind, equals, value = part.partition("=")
        if not equals:
            raise _refuse(whole, f"'{part.strip()}' is not TYPE=VALUE")
        number = _type_number(whole, kind.strip(" "))
        if number in rdn:
            raise _refuse(whole, f"'{kind.strip()}' stands twice in one RDN")
        rdn[number] = _parse_value(whole, value, globs=globs)
    return rdn


def _type_number(whole: str, kind: str) -> str:
    dotted = _DOTTED.fullmatch(kind)
    if dotted is not None:
        return dotted[1]
    number = _NUMBERS.get(kind.lower()) if kind.isascii() else None
    if number is None:
        raise _refuse(whole, f"there is no attribute type '{kind}' (others as dotted numbers)")
    return number


def _parse_value(whole: str, text: str, *, globs: bool) -> Characters:
    """Return the characters of a value, escapes resolved."""
    text = text.lstrip(" ")
    if text.startswith("#"):
        return tuple(_parse_hex_string(whole, text.rstrip(" ")))
    found: list[str | None] = []
    blanks = 0  # at the end, without a backslash: not part of the value
    at = 0
    while at < len(text):
        character = text[at]
        if character == "\\":
            literal, at = _parse_escapes(whole, text, at)
            found += literal
            blanks = 0
            continue
        if character in _RESERVED:
            raise _refuse(whole, f"{character!r} must have a backslash before it")
        if globs and character in "*?":
            found.append(None if character == "*" else ANY_ONE)
        else:
            found.append(character)
        blanks = blanks + 1 if character == " " else 0
        at += 1
    return tuple(found[: len(found) - blanks])


def _parse_escapes(whole: str, text: str, at: int) -> tuple[str, int]:
    r"""Return what the escapes from `at` on stand for, and where they end.

    `\C3\A4` are two bytes of one character, so pairs of hexadecimal digits are taken together.
    """
    data = bytearray()
    while text[at : at + 1] == "\\" and _HEX_PAIR.match(text, at + 1):
        data.append(int(text[at + 1 : at + 3], 16))
        at += 3
    if data:
        if 0 in data:
            raise _refuse(whole, "a value contains a NUL")
        try:
            return data.decode(), at
        except UnicodeDecodeError:
            raise _refuse(whole, "the escaped bytes are not UTF-8") from None
    escaped = text[at + 1 : at + 2]
    if not escaped or escaped not in _SPECIAL + "*?":
        raise _refuse(whole, f"'\\{escaped}' is not an escape")
    return escaped, at + 2


def _parse_hex_string(whole: str, text: str) -> str:
    """Return the text in `#` and hexadecimal digits, which are a value as DER."""
    if _HEX_STRING.fullmatch(text) is None:
        raise _refuse(whole, "behind '#' stand pairs of hexadecimal digits")
    data = bytes.fromhex(text[1:])
    encoding = _TEXT_TAGS.get(data[0])
    if encoding is None:
        raise _refuse(whole, f"'{text}' is not a text")
    try:
        value = _der_content(data).decode(encoding)
    except ValueError:
        raise _refuse(whole, f"'{text}' is malformed") from None
    if "\0" in value:
        raise _refuse(whole, "a value contains a NUL")
    return value


def _der_content(data: bytes) -> bytes:
    """Return the content of one value as DER.

    Raises:
        ValueError: It is longer or shorter than it says.
    """
    start, length = 2, int.from_bytes(data[1:2], "big")
    if length >= 0x80:  # the low bits say how many bytes of length follow
        start += length - 0x80
        length = int.from_bytes(data[2:start], "big")
    if len(data) < 2 or len(data) != start + length:
        raise ValueError("wrong length")
    return data[start:]


# --- printing ----------------------------------------------------------------------------------


def _attribute_text(kind: str, value: str) -> str:
    name = _TYPES[kind][0] if kind in _TYPES else kind
    return f"{name}={_value_text(value)}"


def _value_text(value: str) -> str:
    last = len(value) - 1
    return "".join(
        _character_text(character, is_edge=index in (0, last))
        for index, character in enumerate(value)
    )


def _character_text(character: str, *, is_edge: bool) -> str:
    """Return a character of a value; blanks and `#` have a meaning at the edge."""
    if character in ',+"\\;<>' or (is_edge and character in " #"):
        return "\\" + character
    if character.isprintable() and character not in "*?":
        return character
    return "".join(f"\\{byte:02X}" for byte in character.encode(errors="surrogatepass"))
