"""Plain twin of nbdfleece.datapath.poller: sleep until something is ready."""

from __future__ import annotations

import selectors

PollingSelector = selectors.EpollSelector
