"""Events: what the rooms below publish, told to every monitor.

An event is queued, never waited for: a monitor that does not read loses its oldest events and
nobody else's.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from nbdfleece.base.notify import Notifier
from nbdfleece.fleece.news import (
    News,
    SnapshotBroken,
    SnapshotCreated,
    SnapshotDeleted,
    TempThreshold,
)
from nbdfleece.jobs.job import JobIoError, JobNews, JobPending, StatusChanged
from nbdfleece.protocol.qmp import messages
from nbdfleece.server.audit import ClientConnected, ClientNews

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdfleece.protocol.qmp.values import Json

_log = logging.getLogger(__name__)


class Events:
    """Publishes events with their time.

    Attributes:
        published: Every event message, in order.
    """

    def __init__(self) -> None:
        self.published: Notifier[Json] = Notifier()

    def emit(self, name: str, data: Mapping[str, Json]) -> None:
        """Tell all monitors that `name` happened now."""
        _log.debug("event %s", name)
        self.published.publish(messages.event(name, data, microseconds=time.time_ns() // 1000))

    def fleece_news(self, news: News) -> None:
        """Tell all monitors what the fleece room published."""
        data: dict[str, Json] = {"disk": news.disk, "snapshot": news.snapshot}
        if isinstance(news, SnapshotCreated):
            self.emit("FLEECE_SNAPSHOT_CREATED", {**data, "instant": news.instant})
        elif isinstance(news, SnapshotDeleted):
            self.emit("FLEECE_SNAPSHOT_DELETED", data)
        elif isinstance(news, SnapshotBroken):
            self.emit("FLEECE_SNAPSHOT_BROKEN", {**data, "error": news.error})
        elif isinstance(news, TempThreshold):
            self.emit("FLEECE_TEMP_THRESHOLD", {**data, "used": news.used, "limit": news.limit})

    def export_removed(self, export_id: str) -> None:
        """Tell all monitors that an export is gone."""
        self.emit("BLOCK_EXPORT_DELETED", {"id": export_id})

    def job_news(self, news: JobNews) -> None:
        """Tell all monitors what a job published."""
        if isinstance(news, StatusChanged):
            self.emit("JOB_STATUS_CHANGE", {"status": news.status.value, "id": news.id})
        elif isinstance(news, JobPending):
            self.emit("BLOCK_JOB_PENDING", {"type": news.type, "id": news.id})
        elif isinstance(news, JobIoError):
            operation = "read" if news.is_read else "write"
            action = news.action.value
            data: dict[str, Json] = {"device": news.id, "operation": operation, "action": action}
            self.emit("BLOCK_JOB_ERROR", data)
        else:
            data = {
                "device": news.id,
                "len": news.total,
                "offset": news.done,
                "speed": news.speed,
                "type": news.type,
            }
            if news.cancelled:
                self.emit("BLOCK_JOB_CANCELLED", data)
                return
            if news.error is not None:
                data["error"] = news.error
            self.emit("BLOCK_JOB_COMPLETED", data)

    def client_news(self, news: ClientNews) -> None:
        """Tell all monitors of a client that has opened an export, or is gone again."""
        data: dict[str, Json] = {"id": news.id, "peer": news.peer}
        if news.identity:
            data["identity"] = news.identity
        data["export"] = news.export
        if isinstance(news, ClientConnected):
            if news.tls:
                data["tls"] = news.tls
            self.emit("FLEECE_CLIENT_CONNECTED", data)
            return
        data |= {
            "bytes-read": news.bytes_read,
            "bytes-written": news.bytes_written,
            "requests": news.requests,
            "duration": news.duration_s,
            "reason": news.reason,
        }
        self.emit("FLEECE_CLIENT_DISCONNECTED", data)
