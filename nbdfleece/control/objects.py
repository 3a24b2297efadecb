"""Objects that commands make and other commands name: credentials, authorization, and so on.

Invariants
  O1  Ids are unique, whatever the kind.
  O2  What is in use stays. (QEMU lets credentials of a running server go, and an iothread that an
      export runs in.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, InUse, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _nothing() -> None:
    """Let go of an object that holds nothing."""


@dataclass(slots=True)
class Object:
    """One object.

    Attributes:
        id: Its name.
        kind: `qom-type`.
        value: What it is.
        users: How many hold it.
        let_go: Called when it is removed; raises CommandError where somebody still needs it.
    """

    id: str
    kind: str
    value: object
    users: int = 0
    let_go: Callable[[], None] = field(default=_nothing)


class Objects:
    """All objects, by id."""

    def __init__(self) -> None:
        self._objects: dict[str, Object] = {}

    def __iter__(self) -> Iterator[Object]:
        return iter(list(self._objects.values()))

    def check_new(self, object_id: str) -> None:
        """Check that an object may have this id.

        Raises:
            CommandError: There is one.
        """
        if object_id in self._objects:
            raise CommandError(
                f"attempt to add duplicate property '{object_id}' to object (type 'container')"
            )

    def add(self, new: Object) -> None:
        """Keep an object.

        Raises:
            CommandError: Its id is taken.
        """
        self.check_new(new.id)
        self._objects[new.id] = new

    def find(self, object_id: str) -> Object | None:
        """Return the object with this id, or None."""
        return self._objects.get(object_id)

    def remove(self, object_id: str) -> None:
        """Forget an object.

        Raises:
            NotFound: There is none.
            InUse: Somebody holds it.
            CommandError: Likewise.
        """
        found = self._objects.get(object_id)
        if found is None:
            raise NotFound(f"object '{object_id}' not found")
        if found.users:
            raise InUse(f"object '{object_id}' is in use, can not be deleted")
        found.let_go()
        del self._objects[object_id]
