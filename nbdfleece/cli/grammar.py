"""The command line as data, read from its parser: for completion, manual page and reference."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Option:
    """An option; `value` is what stands for its value in help, empty for a switch."""

    names: tuple[str, ...]
    value: str
    choices: tuple[str, ...]
    repeats: bool
    text: str

    @property
    def usage(self) -> str:
        """The names and the value, as in a list of options."""
        names = ", ".join(self.names)
        return f"{names} {self.value}" if self.value else names


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument that is no option: the parser's name for it, the people's, how often it comes."""

    key: str
    name: str
    choices: tuple[str, ...]
    is_optional: bool
    repeats: bool
    text: str

    @property
    def usage(self) -> str:
        """The name, as in a synopsis."""
        name = f"{self.name}..." if self.repeats else self.name
        return f"[{name}]" if self.is_optional else name


@dataclass(frozen=True, slots=True)
class Command:
    """A command, or a group of them.

    Attributes:
        path: The words that lead to it; none: the program.
        summary: A line for lists of commands.
        text: What it does.
        example: A command line.
        options: Without those that are not built.
        arguments: In their order.
        commands: Of a group; empty for a command.
    """

    path: tuple[str, ...]
    summary: str
    text: str
    example: str
    options: tuple[Option, ...]
    arguments: tuple[Argument, ...]
    commands: tuple[Command, ...]

    def walk(self) -> Iterator[Command]:
        """Yield it and all below it."""
        yield self
        for command in self.commands:
            yield from command.walk()


def read(parser: argparse.ArgumentParser) -> Command:
    """Return the command that a parser reads, with all below it."""
    return _read(parser, (), "")


def _read(parser: argparse.ArgumentParser, path: tuple[str, ...], summary: str) -> Command:
    options: list[Option] = []
    arguments: list[Argument] = []
    commands: list[Command] = []
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to look at a parser
        if action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - likewise
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
            commands += [
                _read(below, (*path, name), texts.get(name, ""))
                for name, below in action.choices.items()
            ]
        elif action.option_strings:
            options.append(_option(action))
        else:
            arguments.append(
                Argument(
                    action.dest,
                    _name(action),
                    _choices(action),
                    action.nargs in ("?", "*"),
                    action.nargs in ("+", "*"),
                    action.help or "",
                )
            )
    return Command(
        path,
        summary,
        parser.description or "",
        (parser.epilog or "").removeprefix("example: "),
        tuple(options),
        tuple(arguments),
        tuple(commands),
    )


def _option(action: argparse.Action) -> Option:
    has_value = action.nargs != 0
    return Option(
        tuple(action.option_strings),
        _name(action) if has_value else "",
        _choices(action),
        type(action).__name__ == "_AppendAction",
        action.help or "",
    )


def _name(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    choices = _choices(action)
    return "|".join(choices) if choices else action.dest.upper()


def _choices(action: argparse.Action) -> tuple[str, ...]:
    return tuple(str(choice) for choice in action.choices or ())
