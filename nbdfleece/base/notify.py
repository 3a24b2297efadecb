"""Notifier: ordered, synchronous observers.

Lets a lower room tell a higher one something without importing it. An observer must not raise and
must not block; it is called in the order of subscription.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Notifier(Generic[T]):
    """Tells every subscriber of each value that is published."""

    def __init__(self) -> None:
        self._observers: list[Callable[[T], None]] = []

    def subscribe(self, observer: Callable[[T], None]) -> Callable[[], None]:
        """Call `observer` for every later value; return a function that ends this (idempotent)."""
        self._observers.append(observer)

        def unsubscribe() -> None:
            if observer in self._observers:
                self._observers.remove(observer)

        return unsubscribe

    def publish(self, value: T) -> None:
        """Tell all subscribers of `value`."""
        for observer in list(self._observers):
            observer(value)
