"""What the C library does with memory that has been given back.

# FAST: payloads of large writes come and go, and each time glibc would give their pages back to the
# kernel and fault them in again, filled with zeroes: a quarter of the processor time of a
# sequential write. It keeps some MiB; plain form in tests/reference/pump.py
"""

from __future__ import annotations

import ctypes
from typing import Final

from nbdfleece.base.units import MiB

# Of <malloc.h>.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

KEPT: Final = 16 * MiB  # free at the end of the heap, for the next payloads
_OF_ITS_OWN: Final = 4 * MiB  # larger blocks are mapped, each by itself, and given back


def keep_freed_memory() -> bool:
    """Have the C library keep what payloads leave behind; False where it has no such setting.

    Of the whole process: for its main function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT)) and bool(mallopt(_M_MMAP_THRESHOLD, _OF_ITS_OWN))
