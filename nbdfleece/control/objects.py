"""Objects that commands make and other commands name: credentials, authorization, and so on.

Invariants
  O1  Ids are unique, whatever the kind.
  O2  What is in use stays. (QEMU lets credentials of a running server go, and an iothread that an
      export runs in.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nbdfleece.base.errors import CommandError, InUse, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nbdfleece.protocol.qmp.values import Json


@dataclass(frozen=True, slots=True)
class ClientCredentials:
    """What a node of the driver nbd goes by; it reads the files itself, at each connection.

    Attributes:
        folder: As `Target` has it.
    """

    folder: str


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

    def resolved(self, options: Json) -> Json:
        """Return options of nodes with folders in place of the ids of client credentials.

        A folder, which has a slash, may be given for an id. A node keeps no hold of the object.

        Raises:
            CommandError: There is no such object, or it is another kind of thing.
        """
        if isinstance(options, list):
            return [self.resolved(each) for each in options]
        if not isinstance(options, Mapping):
            return options
        found = {name: self.resolved(value) for name, value in options.items()}
        name = found.get("tls-creds")
        if found.get("driver") == "nbd" and isinstance(name, str) and "/" not in name:
            found["tls-creds"] = self._client_credentials(name).folder
        return found

    def _client_credentials(self, object_id: str) -> ClientCredentials:
        found = self._objects.get(object_id)
        if found is None:
            raise CommandError(f"No TLS credentials with id '{object_id}'")
        if not found.kind.startswith("tls-creds-"):
            raise CommandError(f"Object with id '{object_id}' is not TLS credentials")
        if not isinstance(found.value, ClientCredentials):
            raise CommandError("Expected TLS credentials for a client endpoint")
        return found.value

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
