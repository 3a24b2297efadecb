"""Transactions: actions that take effect together, at one instant, or not at all.

::

    begin all -> [ prepare all -> commit all ] -> clean all         [ ]: what is drained stays so
                        | one refuses
                        `-> abort the prepared, latest first -> clean

An action drains what it changes before it changes it (`Transaction.quieten`), and all stays
drained until everything is committed. So the points in time of all actions are one instant, and
each action sees what those before it have done. Most commands that are actions too are carried
out as a transaction of one.

Invariants
  A1  One transaction at a time (`Context.transacting`).
  A2  `commit` cannot fail: whatever may be refused is refused in `begin` or `prepare`.
  A3  Guests wait for `prepare` and `commit` only; `begin` and `clean` go on beside them.

Follows: QEMU blockdev.c (qmp_transaction).
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from nbdfleece.base.errors import CommandError, NbdfleeceError
from nbdfleece.block.drain import quiet
from nbdfleece.control.command import Command
from nbdfleece.jobs.group import JobGroup
from nbdfleece.protocol.qmp.schema import Arguments

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from nbdfleece.block.node import Node
    from nbdfleece.control.command import Context
    from nbdfleece.protocol.qmp.schema import Struct, Type, Union
    from nbdfleece.protocol.qmp.values import Json

_log = logging.getLogger(__name__)


class Action:
    """One action, which by itself does nothing. Its first paragraph is the text of the command.

    Args:
        transaction: That it is part of.
        arguments: Checked.

    Attributes:
        result: What the command returns.
    """

    result: Json = {}  # noqa: RUF012 - JSON values are never changed

    def __init__(self, transaction: Transaction, arguments: Arguments) -> None:
        self.transaction = transaction
        self.context = transaction.context
        self.arguments = arguments

    def nodes(self) -> Iterable[Node]:
        """Return the nodes, of those that exist now, to be drained before `prepare` changes any."""
        return ()

    async def begin(self) -> None:
        """Do what is slow and nobody can see, without the effects of earlier actions.

        Raises:
            NbdfleeceError: The transaction is refused; `clean` follows.

        Cancel: `clean` follows.
        """

    async def prepare(self) -> None:
        """Do everything that may be refused, so that `commit` and `abort` are both possible.

        Raises:
            NbdfleeceError: The transaction is refused. All that `prepare` has done is undone.

        Cancel: as after an error.
        """

    def commit(self) -> None:
        """Make it so; every action has been prepared."""

    async def abort(self) -> None:
        """Undo `prepare`; what later actions have done is undone already.

        Raises:
            NbdfleeceError: Something stays; it is logged.
        """

    async def clean(self) -> None:
        """Finish what need not be done in the drained section, after `commit` or without it.

        Raises:
            NbdfleeceError: Something stays; it is logged.
        """


@dataclass(frozen=True, slots=True)
class ActionKind:
    """A kind of action.

    Attributes:
        name: As on the wire.
        arguments: What it takes.
        make: Makes one; a class.
        can_be_grouped: It makes a job, so that `completion-mode` means something to it.
    """

    name: str
    arguments: Struct | Union
    make: Callable[[Transaction, Arguments], Action]
    can_be_grouped: bool = False

    def command(self, returns: Type, *, features: tuple[str, ...] = ()) -> Command:
        """Return the command that carries out one such action."""

        async def run(context: Context, arguments: Arguments) -> Json:
            transaction = Transaction(context)
            (action,) = await transaction.run([(self, arguments)])
            return action.result

        run.__doc__ = self.make.__doc__
        return Command(self.name, self.arguments, run, returns=returns, features=features)


Asked: TypeAlias = tuple[ActionKind, Arguments]


class Transaction:
    """Actions that are carried out together, once.

    Args:
        context: What they work on.
        grouped: Their jobs succeed together or not at all.

    Attributes:
        context: What they work on.
        group: For the jobs; None: each is on its own.
    """

    def __init__(self, context: Context, *, grouped: bool = False) -> None:
        self.context = context
        self.group = JobGroup() if grouped else None
        self._kinds: list[ActionKind] = []
        self._actions: list[Action] = []
        self._locks = AsyncExitStack()
        self._locked: set[asyncio.Lock] = set()
        self._sections = AsyncExitStack()
        self._drained: set[Node] = set()

    async def run(self, asked: Sequence[Asked]) -> Sequence[Action]:
        """Carry out all, in this order, and return them; or none.

        Raises:
            NbdfleeceError: The first refusal. Everything is as before.

        Cancel: everything is as before, or the transaction is complete.
        """
        self._kinds = [kind for kind, _ in asked]
        self._actions = [kind.make(self, arguments) for kind, arguments in asked]
        async with self._locks:
            await self.lock(self.context.transacting)
            begun: list[Action] = []
            try:
                for action in self._actions:
                    begun.append(action)
                    await action.begin()
                async with self._sections:
                    await self._prepare()
                    for action in self._actions:
                        action.commit()
            except BaseException:
                await _clean(begun)
                raise
            await _clean(begun)
        return self._actions

    async def lock(self, lock: asyncio.Lock) -> None:
        """Hold a lock until all is clean; actions of one transaction share it."""
        if lock not in self._locked:
            await self._locks.enter_async_context(lock)
            self._locked.add(lock)

    async def quieten(self, action: Action) -> None:
        """Drain the nodes of an action until everything is committed; for `prepare` only.

        The first time the nodes of later actions, as far as they are there, are drained with them,
        so that guests are stopped once, and what does not become idle stops nobody for long.

        Raises:
            CommandError: The requests on the nodes do not end.

        Cancel: safe.
        """
        actions = [action] if self._drained else self._actions[self._actions.index(action) :]
        while wanted := self._wanted(actions):
            # Only one's own section counts: that of somebody else may end at any time.
            await self._sections.enter_async_context(quiet(*wanted))
            self._drained |= wanted.keys()

    def _wanted(self, actions: Iterable[Action]) -> dict[Node, None]:
        found = dict.fromkeys(node for action in actions for node in action.nodes())
        return {node: None for node in found if node not in self._drained}

    async def _prepare(self) -> None:
        """Prepare all actions, or none.

        Raises:
            NbdfleeceError: The first refusal.
        """
        prepared: list[Action] = []
        try:
            for kind, action in zip(self._kinds, self._actions, strict=True):
                self._check_mode(kind)
                await action.prepare()
                prepared.append(action)
        except BaseException:
            for action in reversed(prepared):
                try:
                    await action.abort()
                except NbdfleeceError as error:
                    _log.error("transaction: not all could be undone: %s", error)
            raise

    def _check_mode(self, kind: ActionKind) -> None:
        """Refuse `grouped` for what makes no job.

        Raises:
            CommandError: It is wanted.
        """
        if self.group is not None and not kind.can_be_grouped:
            raise CommandError(
                f"Action '{kind.name}' does not support Transaction property "
                "completion-mode = grouped"
            )


@asynccontextmanager
async def between_transactions(context: Context, *, wanted: bool) -> AsyncIterator[None]:
    """Hold transactions up, if `wanted`: for who takes a bitmap into use.

    What a transaction has prepared may be taken back: nobody is to see it before.
    """
    async with AsyncExitStack() as held:
        if wanted:
            await held.enter_async_context(context.transacting)
        yield


async def _clean(actions: Iterable[Action]) -> None:
    for action in actions:
        try:
            await action.clean()
        except NbdfleeceError as error:
            _log.error("transaction: %s", error)
