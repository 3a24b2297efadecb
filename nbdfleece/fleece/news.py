"""What happens to snapshots by itself or on demand, for whoever subscribes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class SnapshotCreated:
    """A snapshot is there; `instant` is in RFC 3339."""

    disk: str
    snapshot: str
    instant: str


@dataclass(frozen=True, slots=True)
class SnapshotDeleted:
    """A snapshot is gone."""

    disk: str
    snapshot: str


@dataclass(frozen=True, slots=True)
class SnapshotBroken:
    """A snapshot cannot be read any more, because of `error`."""

    disk: str
    snapshot: str
    error: str


@dataclass(frozen=True, slots=True)
class TempThreshold:
    """A snapshot has `used` most of the `limit` bytes that its old data may take."""

    disk: str
    snapshot: str
    used: int
    limit: int


News: TypeAlias = SnapshotCreated | SnapshotDeleted | SnapshotBroken | TempThreshold
