from __future__ import annotations

from nbdfleece.base.errors import OptionRefused
from nbdfleece.protocol.nbd import constants as c
from nbdfleece.protocol.nbd import wire
from nbdfleece.protocol.nbd.haggle import ExportInfo
from tests.support.nbd_machines import FLAGS, FakeDirectory, Script


def test_each_export_is_listed_with_its_description() -> None:
    assert Script().option(c.NBD_OPT_LIST) == [
        (c.NBD_REP_SERVER, wire.counted(b"disk") + b"a disk"),
        (c.NBD_REP_SERVER, wire.counted(b"odd")),
        (c.NBD_REP_ACK, b""),
    ]


def test_list_may_be_repeated_and_changes_nothing() -> None:
    script = Script()

    assert script.option(c.NBD_OPT_LIST) == script.option(c.NBD_OPT_LIST)
    assert script.is_haggling


def test_no_exports_are_listed_as_such() -> None:
    assert Script(FakeDirectory(exports=[])).option(c.NBD_OPT_LIST) == [(c.NBD_REP_ACK, b"")]


def test_longest_name_and_description_fit() -> None:
    export = ExportInfo("n" * 4096, 1, FLAGS, "d" * 5000)

    (_, data), _ = Script(FakeDirectory(exports=[export])).option(c.NBD_OPT_LIST)

    assert data == wire.counted(b"n" * 4096) + b"d" * 4096


def test_policy_may_forbid_the_list() -> None:
    script = Script(FakeDirectory(refusal=OptionRefused(c.NBD_REP_ERR_POLICY, "hidden")))

    assert script.option(c.NBD_OPT_LIST) == [(c.NBD_REP_ERR_POLICY, b"hidden")]
