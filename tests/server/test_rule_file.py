"""Files of rules: what is read, and what is not even waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdfleece.base.errors import ConfigError
from nbdfleece.base.limits import MAX_RULE_FILE, MAX_RULES
from nbdfleece.server.rule_file import RuleFile, Stamp, Table, build_rules


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rules"


def as_is(table: Table) -> Table:
    return table


def test_toml_and_json_are_told_apart_by_their_text(path: Path) -> None:
    path.write_text("a = 1")
    assert RuleFile(path).table == {"a": 1}
    path.write_text('\n {"a": 1}')
    assert RuleFile(path).table == {"a": 1}


def test_pipe_is_refused_without_waiting_for_a_writer(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        RuleFile(path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_is_no_file_name_is_refused(name: str) -> None:
    assert Stamp.of(Path(name)) is None
    with pytest.raises(ConfigError, match="is not a file name"):
        RuleFile(Path(name))


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        RuleFile(tmp_path)


def test_longest_file_is_read_and_a_longer_one_refused(path: Path) -> None:
    text = "a = 1\n#"
    path.write_text(text + "x" * (MAX_RULE_FILE - len(text)))
    assert RuleFile(path).table == {"a": 1}
    path.write_text(text + "x" * (MAX_RULE_FILE - len(text) + 1))
    with pytest.raises(ConfigError, match="longer than"):
        RuleFile(path)


def test_bytes_that_are_no_text_are_refused(path: Path) -> None:
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8"):
        RuleFile(path)


def test_most_rules_are_taken_and_more_refused() -> None:
    assert len(build_rules([{}] * MAX_RULES, as_is)) == MAX_RULES
    with pytest.raises(ConfigError, match=f"at most {MAX_RULES}"):
        build_rules([{}] * (MAX_RULES + 1), as_is)


def test_line_is_left_out_where_it_could_be_wrong(path: Path) -> None:
    path.write_text('note = """\n[[rule]]\n"""\n[[rule]]\nx = 1\n')

    def refuse(_: Table) -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError) as caught:
        RuleFile(path).rules("rule", refuse)
    assert str(caught.value) == f"{path}: rule 1: no"


def test_stamp_changes_with_the_file(path: Path) -> None:
    assert Stamp.of(path) is None
    path.write_text("a = 1")
    os.utime(path, ns=(1, 1))
    before = Stamp.of(path)
    assert before == Stamp.of(path)
    os.utime(path, ns=(1, 2))
    assert Stamp.of(path) != before
    path.rename(path.with_name("old"))
    path.write_text("a = 2")
    os.utime(path, ns=(1, 1))
    assert Stamp.of(path) != before
