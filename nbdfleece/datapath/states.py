r"""StateMap: one small number per cluster of a disk of any size.

Layout: pages of 16384 states, made when first needed. A page is absent (all states 0), an int (all
states equal), or a bytearray (one byte per state).

::

    index      0 ......... 16383 | 16384 ..... 32767 | 32768 ...
    pages      absent (all 0)    | 2 (all 2)         | bytearray b"\0\0\1\2..."

Invariants
  S1  Only the event loop's thread makes pages; a page that is a bytearray stays that object for the
      life of the map. A worker thread may hold (page, first, last) and set those bytes: a
      same-size slice assignment is one step under the interpreter lock. So two looks may find two
      states: a state that is told of a run was found in the look that found the run.
  S2  Memory is one byte per cluster in touched pages, and next to nothing elsewhere: marking a
      16 TiB disk as a whole makes small ints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHIFT: Final = 14
PAGE: Final = 1 << _SHIFT
_MASK: Final = PAGE - 1


class StateMap:
    """`count` states, all 0 at first; values 0 to 255."""

    __slots__ = ("_count", "_pages")

    def __init__(self, count: int) -> None:
        self._count = count
        self._pages: dict[int, int | bytearray] = {}

    def __len__(self) -> int:
        return self._count

    def get(self, index: int) -> int:
        """Return one state."""
        page = self._pages.get(index >> _SHIFT, 0)
        return page if isinstance(page, int) else page[index & _MASK]

    def uniform(self, first: int, last: int) -> int:
        """Return the state that all of [first, last) share, or -1 when they differ."""
        number = first >> _SHIFT
        if (last - 1) >> _SHIFT != number:
            return self._uniform_over_pages(first, last)
        page = self._pages.get(number, 0)
        if isinstance(page, int):
            return page
        first &= _MASK
        state = page[first]
        count = last - (number << _SHIFT) - first
        if count == 1 or page.count(state, first, first + count) == count:
            return state
        return -1

    def run_end(self, first: int, last: int) -> int:
        """Return the end of the run of equal states that begins at `first`, at most `last`."""
        return self.run(first, last)[0]

    def run(self, first: int, last: int) -> tuple[int, int]:
        """Return (end, state) of the run of equal states that begins at `first`, at most `last`."""
        state = self.get(first)
        only = bytes((state,))
        index = first
        while index < last:
            page = self._pages.get(index >> _SHIFT, 0)
            stop = min(last, (index | _MASK) + 1)
            if isinstance(page, int):
                if page != state:
                    return index, state
            else:
                start = index & _MASK
                part = page[start : start + stop - index]
                rest = len(part.lstrip(only))
                if rest:
                    return max(stop - rest, first + 1), state
            index = stop
        return last, state

    def runs(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return (first, last, state) of every run in [first, last), in order."""
        runs = []
        while first < last:
            end, state = self.run(first, last)
            runs.append((first, end, state))
            first = end
        return runs

    def find(self, state: int, first: int, last: int) -> int:
        """Return the first index in [first, last) that has `state`, or -1."""
        if state and last - first > PAGE and len(self._pages) * PAGE < last - first:
            return self._find_in_pages(state, first, last)
        index = first
        while index < last:
            page = self._pages.get(index >> _SHIFT, 0)
            stop = min(last, (index | _MASK) + 1)
            if isinstance(page, int):
                if page == state:
                    return index
            else:
                start = index & _MASK
                found = page.find(state, start, start + stop - index)
                if found >= 0:
                    return index + found - start
            index = stop
        return -1

    def count(self, state: int) -> int:
        """Return how many have `state`; takes a moment per 10^8 of them."""
        absent = self._count
        found = 0
        for number, page in self._pages.items():
            size = min(PAGE, self._count - (number << _SHIFT))
            absent -= size
            if not isinstance(page, int):
                found += page.count(state, 0, size)
            elif page == state:
                found += size
        return found if state else found + absent

    def fill(self, first: int, last: int, state: int) -> None:
        """Set [first, last) to `state`."""
        while first < last:
            number = first >> _SHIFT
            stop = min(last, (first | _MASK) + 1)
            page = self._pages.get(number, 0)
            if isinstance(page, int):
                if page == state:
                    first = stop
                    continue
                if stop - first == PAGE:
                    self._pages[number] = state
                    first = stop
                    continue
                page = self._make_page(number, page)
            start = first & _MASK
            page[start : start + stop - first] = bytes((state,)) * (stop - first)
            first = stop

    def pages(self) -> Iterator[tuple[int, int | bytearray]]:
        """Yield (first index, page) of what is not absent, in order: the map may change meanwhile.

        A page that is a bytearray may be longer than what is left of the map behind its first.
        """
        for number in sorted(self._pages):
            yield number << _SHIFT, self._pages[number]

    def page(self, first: int) -> int | bytearray:
        """Return the page that begins at `first`, as `pages` does."""
        return self._pages.get(first >> _SHIFT, 0)

    def put_page(self, first: int, states: bytes) -> None:
        """Set the states from `first` on, a multiple of PAGE; PAGE of them, or up to the end."""
        assert first & _MASK == 0, "not where a page begins"
        if not states.strip(states[:1]):
            self.fill(first, first + len(states), states[0])
        else:
            self._pages[first >> _SHIFT] = bytearray(states.ljust(PAGE, b"\0"))

    def copy(self) -> StateMap:
        """Return another map with the same states."""
        twin = StateMap(self._count)
        twin._pages = {
            number: page if isinstance(page, int) else bytearray(page)
            for number, page in self._pages.items()
        }
        return twin

    def span(self, first: int, last: int) -> tuple[bytearray, int, int] | None:
        """Return (page, start, stop) for a worker to set (see S1), or None over several pages."""
        number = first >> _SHIFT
        if (last - 1) >> _SHIFT != number:
            return None
        page = self._pages.get(number, 0)
        if isinstance(page, int):
            page = self._make_page(number, page)
        base = number << _SHIFT
        return page, first - base, last - base

    def _make_page(self, number: int, state: int) -> bytearray:
        page = bytearray(PAGE) if state == 0 else bytearray(bytes((state,)) * PAGE)
        self._pages[number] = page
        return page

    def _uniform_over_pages(self, first: int, last: int) -> int:
        end, state = self.run(first, last)
        return state if end == last else -1

    def _find_in_pages(self, state: int, first: int, last: int) -> int:
        """As `find`, looking at existing pages only: absent ones are all 0."""
        for number in sorted(self._pages):
            start, stop = max(first, number << _SHIFT), min(last, (number + 1) << _SHIFT)
            if start < stop:
                page = self._pages[number]
                if isinstance(page, int):
                    if page == state:
                        return start
                else:
                    found = page.find(state, start & _MASK, (stop - 1 & _MASK) + 1)
                    if found >= 0:
                        return (number << _SHIFT) + found
        return -1
