"""Images with something behind them, made over a monitor; a format is one line of FORMATS."""

from __future__ import annotations

from typing import Any

from tests.support.storage_daemon import StorageDaemon

FORMATS = ("qcow2",)


def create(daemon: StorageDaemon, driver: str, **options: Any) -> str | None:
    """Run a job "create" to its end; return its error."""
    given = {name.replace("_", "-"): value for name, value in options.items()}
    daemon.ask("blockdev-create", {"job-id": "make", "options": {"driver": driver, **given}})
    while True:  # until the deadline of the test
        (row,) = (row for row in daemon.ask("query-jobs") if row["id"] == "make")
        if row["status"] == "concluded":
            daemon.ask("job-dismiss", {"id": "make"})
            return row.get("error")


def make_image(daemon: StorageDaemon, driver: str, name: str, size: int, **more: Any) -> None:
    """Make an image in a new file, whose node is NAME-file; it is not opened."""
    path = str(daemon.folder / f"{name}.{driver}")
    assert create(daemon, "file", filename=path, size=0) is None
    daemon.ask("blockdev-add", {"driver": "file", "node-name": f"{name}-file", "filename": path})
    assert create(daemon, driver, file=f"{name}-file", size=size, **more) is None


def add_overlay(
    daemon: StorageDaemon, driver: str, name: str, size: int, backing: object = None
) -> None:
    """Make and open an image."""
    make_image(daemon, driver, name, size)
    daemon.ask("blockdev-add", options(driver, name, backing))


def options(driver: str, name: str, backing: object = None) -> dict[str, Any]:
    return {"driver": driver, "node-name": name, "file": f"{name}-file", "backing": backing}
