"""What happens to a snapshot by itself: it breaks, or the space for its old data runs out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from nbdfleece.fleece.news import SnapshotBroken, TempThreshold

if TYPE_CHECKING:
    from nbdfleece.base.errors import IoError
    from nbdfleece.base.notify import Notifier
    from nbdfleece.fleece.news import News
    from nbdfleece.fleece.snapshot import Snapshot

_log = logging.getLogger(__name__)

_TEMP_WARNING: Final = 0.8  # of the limit


def watch(snapshot: Snapshot, news: Notifier[News]) -> None:
    """Publish once that `snapshot` broke, and once that most of its space is used.

    The log tells of the first guest write that fails for its sake, too: a guest sees no reason.
    What happened before the call is published now.
    """

    def broken(error: IoError) -> None:
        _log.error("snapshot %s: broken: %s", snapshot.export_name, error)
        news.publish(SnapshotBroken(snapshot.disk, snapshot.name, str(error)))

    if snapshot.cbw.error is not None:
        broken(snapshot.cbw.error)
    snapshot.cbw.broken.subscribe(broken)

    def refused(error: IoError) -> None:
        stop()
        _log.error(
            "snapshot %s: guest writes fail (break-guest-write): %s", snapshot.export_name, error
        )

    stop = snapshot.cbw.refused.subscribe(refused)
    if snapshot.options.temp_limit is not None:
        _watch_space(snapshot, news, snapshot.options.temp_limit)


def _watch_space(snapshot: Snapshot, news: Notifier[News], limit: int) -> None:
    def saved(used: int) -> None:
        if used < limit * _TEMP_WARNING:
            return
        unsubscribe()
        _log.warning("snapshot %s: %d of %d bytes used", snapshot.export_name, used, limit)
        news.publish(TempThreshold(snapshot.disk, snapshot.name, used, limit))

    unsubscribe = snapshot.cbw.saved.subscribe(saved)
    saved(snapshot.cbw.saved_bytes)
