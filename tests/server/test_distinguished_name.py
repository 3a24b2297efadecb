"""Distinguished names in both spellings, and that no value ever counts as more than a value."""

from __future__ import annotations

import random

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from nbdfleece.base.errors import ConfigError
from nbdfleece.server.distinguished_name import DistinguishedName, NamePattern, parse_name

CN, O, C, ST, OU, DC = (  # noqa: E741 - the names they have in certificates
    *("2.5.4.3", "2.5.4.10", "2.5.4.6", "2.5.4.8", "2.5.4.11"),
    "0.9.2342.19200300.100.1.25",
)


def name(*attributes: tuple[str, str]) -> DistinguishedName:
    """A name in the order of the certificate, one attribute in each RDN."""
    return DistinguishedName(tuple(frozenset({attribute}) for attribute in attributes))


def fits(pattern: str, found: DistinguishedName, *, globs: bool = True) -> bool:
    return NamePattern(pattern, globs=globs).matches(found)


LAPTOP = name((C, "GB"), (ST, "London"), (O, "Example Org"), (CN, "laptop"))


# --- both orders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        "C=GB,ST=London,O=Example Org,CN=laptop",
        "CN=laptop,O=Example Org,ST=London,C=GB",
        "CN = laptop, O = Example Org, ST = London, C = GB",
        "cn=laptop,o=Example Org,St=London,c=GB",
        "commonName=laptop,organizationName=Example Org,S=London,countryName=GB",
        "2.5.4.3=laptop,OID.2.5.4.10=Example Org,ST=London,C=GB",
        r"CN=lap\74op,O=Example\20Org,ST=London,C=GB",
        "CN=#0C066C6170746F70,O=Example Org,ST=London,C=GB",
    ],
)
@pytest.mark.parametrize("globs", [True, False])
def test_one_name_in_many_spellings(spelling: str, *, globs: bool) -> None:
    assert fits(spelling, LAPTOP, globs=globs)


@pytest.mark.parametrize(
    "other",
    [
        "CN=laptop",
        "CN=laptop,O=Example Org",
        "CN=laptop,O=Example Org,ST=London",
        "CN=laptop,O=Example Org,ST=London,C=GB,OU=x",
        "O=Example Org,CN=laptop,ST=London,C=GB",
        "CN=laptop,O=Example Org,ST=London,C=gb",
        "CN=laptops,O=Example Org,ST=London,C=GB",
        "CN=laptop,O=Example Org,L=London,C=GB",
        "CN=laptop+O=Example Org,ST=London,C=GB",
        "CN=laptop,O=Example  Org,ST=London,C=GB",
    ],
)
def test_other_names_do_not_fit(other: str) -> None:
    assert not fits(other, LAPTOP)


def test_order_within_the_name_counts() -> None:
    staff = name((DC, "com"), (DC, "example"), (CN, "x"))
    assert fits("CN=x,DC=example,DC=com", staff)
    assert fits("DC=com,DC=example,CN=x", staff)
    assert not fits("CN=x,DC=com,DC=example", staff)


# --- a value is a value: the classic attacks ---------------------------------------------------


ADMIN = "CN=backup,O=Admin"


@pytest.mark.parametrize(
    "forged",
    [
        "backup,O=Admin",
        r"backup\,O=Admin",
        "backup, O=Admin",
        "backup+O=Admin",
        "backup\0,O=Admin",
        "backup\nO=Admin",
        'backup",O="Admin',
        "/CN=backup/O=Admin",
    ],
)
@pytest.mark.parametrize("globs", [True, False])
def test_attributes_written_into_a_value_are_none(forged: str, *, globs: bool) -> None:
    for found in (name((CN, forged)), name((O, forged)), name((CN, forged), (O, "Users"))):
        assert not fits(ADMIN, found, globs=globs)
        assert not fits("O=Admin,CN=backup", found, globs=globs)
        assert not fits("CN=backup*,O=Admin", found)


@pytest.mark.parametrize(
    ("pattern", "found", "expected"),
    [
        ("CN=backup*,O=Example", name((CN, "backup1"), (O, "Example")), True),
        ("CN=backup*,O=Example", name((O, "Example"), (CN, "backup")), True),
        ("CN=backup*,O=Example", name((CN, "backup1,O=Example")), False),
        ("CN=backup*,O=Example", name((CN, "backup1"), (O, "Other"), (O, "Example")), False),
        ("CN=backup*,O=Example", name((CN, "backup1"), (OU, "x"), (O, "Example")), False),
        ("CN=*", name((CN, "a"), (O, "Example")), False),
        ("CN=*", name((CN, "a,O=Example")), True),
        ("CN=*,O=Example", name((CN, "evil"), (O, "Evil,O=Example")), False),
        ("CN=b?", name((CN, "b1")), True),
        ("CN=b?", name((CN, "b")), False),
        ("CN=", name((CN, "")), True),
        ("CN=", name((CN, "x")), False),
        ("*,O=Example", LAPTOP, False),
        ("*,O=Example Org,*", LAPTOP, True),
        ("CN=lap*,*", LAPTOP, True),
        ("*,CN=lap*", LAPTOP, True),
        ("CN=lap*,*,C=GB", LAPTOP, True),
        ("CN=lap*,*,C=DE", LAPTOP, False),
        ("*", LAPTOP, True),
        ("*", name(), True),
        ("*,*", name(), True),
        ("*,O=Example Org,*", name((CN, "x,O=Example Org,y")), False),
    ],
)
def test_globs_stay_within_their_value(
    pattern: str, found: DistinguishedName, *, expected: bool
) -> None:
    assert fits(pattern, found) is expected


@pytest.mark.parametrize(
    "other",
    [
        "Backup",
        "b\u0430ckup",  # Cyrillic a
        "backup\u200b",  # zero width space
        "ba\u0441kup",
        "\uff42ackup",  # fullwidth b
        " backup",
        "backup ",
    ],
)
@pytest.mark.parametrize("globs", [True, False])
def test_look_alikes_are_others(other: str, *, globs: bool) -> None:
    assert not fits("CN=backup", name((CN, other)), globs=globs)


def test_composed_and_decomposed_texts_are_two() -> None:
    assert not fits("CN=\u00e9", name((CN, "e\u0301")))


def test_stars_of_a_certificate_mean_nothing() -> None:
    assert not fits("CN=backup1", name((CN, "*")))
    assert not fits("CN=backup1", name((CN, "backup?")))


def test_exact_match_takes_a_star_for_a_star() -> None:
    assert fits("CN=a*", name((CN, "a*")), globs=False)
    assert not fits("CN=a*", name((CN, "ab")), globs=False)
    assert fits(r"CN=a\*", name((CN, "a*")))
    assert fits(r"CN=a\2a", name((CN, "a*")))
    assert not fits(r"CN=a\2a", name((CN, "ab")))


def test_multi_valued_rdn_is_a_set() -> None:
    both = DistinguishedName((frozenset({(CN, "x"), (OU, "y")}), frozenset({(O, "z")})))
    assert fits("CN=x+OU=y,O=z", both)
    assert fits("OU=y + CN=*, O=z", both)
    assert fits("O=z,OU=y+CN=x", both)
    assert not fits("CN=x,O=z", both)
    assert not fits("CN=x,OU=y,O=z", both)
    assert not fits("CN=x+OU=y+L=l,O=z", both)


# --- what is no name -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("backup", "not TYPE=VALUE"),
        ("CN=x,", "not TYPE=VALUE"),
        ("CN=x,,O=y", "not TYPE=VALUE"),
        ("*CN=x", r"no attribute type '\*CN'"),
        ("/CN=x", "no attribute type '/CN'"),
        ("QQ=x", "no attribute type 'QQ'"),
        ("C\u212a=x", "no attribute type"),
        ("=x", "no attribute type ''"),
        ("2.05.4=x", "no attribute type"),
        ("CN=x+CN=y", "stands twice"),
        ("CN=x+2.5.4.3=y", "stands twice"),
        ('CN="x"', "must have a backslash"),
        ("CN=x;O=y", "must have a backslash"),
        ("CN=<x>", "must have a backslash"),
        ("CN=x\\", "is not an escape"),
        ("CN=\\x", "is not an escape"),
        (r"CN=\C3", "not UTF-8"),
        (r"CN=a\00b", "NUL"),
        ("CN=a\0b", "NUL"),
        ("CN=#", "hexadecimal"),
        ("CN=#0", "hexadecimal"),
        ("CN=#0C", "malformed"),
        ("CN=#0C0261", "malformed"),
        ("CN=#0C016162", "malformed"),
        ("CN=#0C01FF", "malformed"),
        ("CN=#0C0100", "NUL"),
        ("CN=#020101", "not a text"),
        ("CN=" + "x" * 600, "longer than"),
    ],
)
def test_what_is_no_name(text: str, why: str) -> None:
    for globs in (True, False):
        with pytest.raises(ConfigError, match=why):
            NamePattern(text, globs=globs)


def test_error_is_one_line_and_names_the_text() -> None:
    with pytest.raises(ConfigError) as caught:
        NamePattern("CN=x,backup", globs=True)
    assert str(caught.value) == (
        "'CN=x,backup' is not a distinguished name: 'backup' is not TYPE=VALUE"
    )


# --- round trips ---------------------------------------------------------------------------------


def test_printed_form_is_that_of_rfc_4514() -> None:
    assert LAPTOP.text() == "CN=laptop,O=Example Org,ST=London,C=GB"
    odd = name(("1.2.3", "#x "), (CN, 'a,b+c"d\\e<f>g;h\n*'))
    assert odd.text() == r"CN=a\,b\+c\"d\\e\<f\>g\;h\0A\2A,1.2.3=\#x" + "\\ "


ALPHABET = 'ab ,+"\\;<>=#*?/\n\t\u00e9\u4e2d\U0001f600\u200b'
TYPES = [CN, O, C, ST, OU, DC, "1.2.3.4", "2.5.4.5"]


def random_name(rng: random.Random) -> DistinguishedName:
    def value() -> str:
        return "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(6)))

    return DistinguishedName(
        tuple(
            frozenset((kind, value()) for kind in rng.sample(TYPES, rng.choice((1, 1, 1, 2, 3))))
            for _ in range(rng.randrange(1, 5))
        )
    )


def test_random_names_survive_printing_and_parsing(rng: random.Random) -> None:
    for _ in range(2000):
        wanted = random_name(rng)
        text = wanted.text()
        assert text.isprintable()
        assert parse_name(text) == wanted, text
        for globs in (True, False):
            assert fits(text, wanted, globs=globs), text
            assert fits(text, DistinguishedName(wanted.rdns[::-1]), globs=globs), text


def test_random_names_fit_no_other_name(rng: random.Random) -> None:
    for _ in range(2000):
        one, other = random_name(rng), random_name(rng)
        same = other.rdns in (one.rdns, one.rdns[::-1])
        assert fits(one.text(), other) is same


def test_names_are_parsed_as_by_another_parser(rng: random.Random) -> None:
    """Of the texts that both accept; cryptography knows fewer types and no blanks."""
    for _ in range(500):
        wanted = random_name(rng)
        if any(kind == C or not value for rdn in wanted.rdns for kind, value in rdn):
            continue  # cryptography refuses empty ones, and countries of other than two letters
        theirs = x509.Name.from_rfc4514_string(
            wanted.text(), {"serialNumber": NameOID.SERIAL_NUMBER}
        )
        assert [{(one.oid.dotted_string, one.value) for one in rdn} for rdn in theirs.rdns] == [
            set(rdn) for rdn in wanted.rdns
        ]


def test_random_garbage_is_a_name_or_refused(rng: random.Random) -> None:
    pieces = ["CN", "O", "=", ",", "+", "\\", "#0C0161", "*", " ", "x", "\\2C", "1.2.3", "\u00e9"]
    accepted = 0
    for _ in range(5000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 10)))
        try:
            parsed = parse_name(text)
        except ConfigError:
            continue
        accepted += 1
        assert parse_name(parsed.text()) == parsed
    assert accepted > 20
