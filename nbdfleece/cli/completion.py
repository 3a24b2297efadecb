"""`nbdfleece completion`: scripts for bash, zsh and fish, made from the parser itself.

What stands for a value in help says how it is completed; disks and snapshots are asked of the
daemon while the user types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdfleece import __version__
from nbdfleece.cli import grammar
from nbdfleece.cli.arguments import build_parser
from nbdfleece.cli.exits import DONE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping

    from nbdfleece.cli.grammar import Argument, Command, Option

_FILES: Final = "files"
_FOLDERS: Final = "folders"
_DISKS: Final = "disks"
_SNAPSHOTS: Final = "snapshots"
_EXPORTS: Final = "exports"

_KINDS: Final = {
    "PATH": _FILES,
    "FILE": _FILES,
    "DEST": _FILES,
    "DISK": _DISKS,
    "DISK@NAME": _SNAPSHOTS,
    "DISK|DISK@NAME": _EXPORTS,
}
_NEW_DISKS: Final = (("serve",), ("disk", "add"))  # DISK is a file there


def run(args: argparse.Namespace) -> int:
    """Print the script for one shell."""
    print(script(args.shell), end="")
    return DONE


def script(shell: str) -> str:
    """Return the script for bash, zsh or fish."""
    return _SCRIPTS[shell](grammar.read(build_parser(__version__)))


def _kind_of_value(name: str) -> str:
    if name.startswith("DIR"):
        return _FOLDERS
    return _KINDS.get(name, "")


def _kind(command: Command, argument: Argument) -> str:
    if command.path in _NEW_DISKS:
        return _FILES
    if argument.key == "disk":
        return _DISKS
    return _kind_of_value(argument.name)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# --- bash ----------------------------------------------------------------------------------------

_BASH_HEAD: Final = """\
# bash completion for nbdfleece; made by: nbdfleece completion bash

_nbdfleece() {
    local line=${COMP_LINE:0:COMP_POINT} path= word whole start words= kind=
    whole=${line##*[[:space:]]}
    # bash takes what stands behind one of these for a word of its own.
    start=${whole%"${whole##*[@=:]}"}
    local -a before
    read -ra before <<<"${line%"$whole"}"
    for word in "${before[@]:1}"; do
        case $path/$word in
"""
_BASH_MIDDLE: Final = """\
                path+=/$word ;;
        esac
    done
    COMPREPLY=()
    case $path:${before[-1]} in
"""
_BASH_TAIL: Final = """\
            esac ;;
    esac
    case $kind in
        disks) words+=" $(nbdfleece disk list --quiet 2>/dev/null)" ;;
        snapshots) words+=" $(nbdfleece snapshot list --quiet 2>/dev/null)" ;;
        exports)
            words+=" $(nbdfleece disk list --quiet 2>/dev/null)"
            words+=" $(nbdfleece snapshot list --quiet 2>/dev/null)" ;;
        files | folders)
            compopt -o filenames 2>/dev/null
            local flag=-f
            [[ $kind == folders ]] && flag=-d
            mapfile -t COMPREPLY < <(compgen "$flag" -- "${whole#"$start"}")
            return ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$whole")
    COMPREPLY=("${COMPREPLY[@]#"$start"}")
}

complete -F _nbdfleece nbdfleece
"""


def _bash(program: Command) -> str:
    commands = list(program.walk())
    paths = " | ".join("/" + "/".join(command.path) for command in commands if command.path)
    lines = [_BASH_HEAD, f"            {paths})\n", _BASH_MIDDLE]
    for command in commands:
        path = "".join(f"/{word}" for word in command.path)
        for option in command.options:
            if option.value:
                names = " | ".join(f"{path}:{name}" for name in option.names)
                lines.append(f"        {names}) {_bash_value(option)} ;;\n")
    lines.append("        *)\n            case $path in\n")
    for command in commands:
        path = "".join(f"/{word}" for word in command.path) or '""'
        options = " ".join(name for option in command.options for name in option.names)
        plain = [below.path[-1] for below in command.commands]
        kinds = {_kind(command, argument) for argument in command.arguments} - {""}
        plain += [choice for argument in command.arguments for choice in argument.choices]
        lines.append(f"                {path})\n")
        lines.append(f"                    if [[ $whole == -* ]]; then words={_quoted(options)}\n")
        lines.append(f"                    else words={_quoted(' '.join(plain))}")
        lines.append(f" kind={' '.join(sorted(kinds)[:1])}; fi ;;\n")
    return "".join([*lines, _BASH_TAIL])


def _bash_value(option: Option) -> str:
    if option.choices:
        return f"words={_quoted(' '.join(option.choices))}"
    return f"kind={_kind_of_value(option.value)}"


# --- zsh -----------------------------------------------------------------------------------------

_ZSH_HEAD: Final = """\
#compdef nbdfleece
# zsh completion for nbdfleece; made by: nbdfleece completion zsh

_nbdfleece_disks() {
    local -a found=(${(f)"$(nbdfleece disk list --quiet 2>/dev/null)"})
    compadd -a found
}

_nbdfleece_snapshots() {
    local -a found=(${(f)"$(nbdfleece snapshot list --quiet 2>/dev/null)"})
    compadd -a found
}

_nbdfleece_exports() {
    _nbdfleece_disks
    _nbdfleece_snapshots
}

# Calls the function of the command that has been typed, in front of which stands $1.
_nbdfleece_go() {
    local function=$1_${words[2]//-/_}
    (( CURRENT-- ))
    shift words
    (( $+functions[$function] )) && $function
}
"""
_ZSH_TAIL: Final = """
if [[ $funcstack[1] == _nbdfleece ]]; then
    _nbdfleece "$@"
else
    compdef _nbdfleece nbdfleece
fi
"""
_ZSH_ACTIONS: Final[Mapping[str, str]] = {
    _FILES: "_files",
    _FOLDERS: "_files -/",
    _DISKS: "_nbdfleece_disks",
    _SNAPSHOTS: "_nbdfleece_snapshots",
    _EXPORTS: "_nbdfleece_exports",
    "": " ",
}


def _zsh(program: Command) -> str:
    return "".join([_ZSH_HEAD, *map(_zsh_command, program.walk()), _ZSH_TAIL])


def _zsh_command(command: Command) -> str:
    name = "_".join(["_nbdfleece", *(word.replace("-", "_") for word in command.path)])
    specs = [spec for option in command.options for spec in _zsh_option(option)]
    if command.commands:
        texts = [
            f"        {_quoted(f'{below.path[-1]}:{below.summary}')}\n"
            for below in command.commands
        ]
        return (
            f"\n{name}() {{\n    local -a commands=(\n{''.join(texts)}    )\n"
            f"    if (( CURRENT > 2 )); then\n        _nbdfleece_go {name}\n"
            f"    elif [[ $PREFIX == -* ]]; then\n        _arguments{_zsh_specs(specs)}\n"
            "    else\n        _describe command commands\n    fi\n}\n"
        )
    specs += [_zsh_argument(command, argument) for argument in command.arguments]
    return f"\n{name}() {{\n    _arguments -s{_zsh_specs(specs)}\n}}\n"


def _zsh_specs(specs: list[str]) -> str:
    return "".join(f" \\\n        {_quoted(spec)}" for spec in specs)


def _zsh_option(option: Option) -> list[str]:
    text = option.text.translate({ord("["): "\\[", ord("]"): "\\]", ord(":"): "\\:"})
    value = ""
    if option.value:
        action = f"({' '.join(option.choices)})" if option.choices else ""
        value = f":{_zsh_name(option.value)}:"
        value += action or _ZSH_ACTIONS[_kind_of_value(option.value)]
    repeat = "*" if option.repeats else ""
    return [f"{repeat}{name}[{text}]{value}" for name in option.names]


def _zsh_argument(command: Command, argument: Argument) -> str:
    action = f"({' '.join(argument.choices)})" if argument.choices else ""
    action = action or _ZSH_ACTIONS[_kind(command, argument)]
    where = "*" if argument.repeats else ""
    optional = ":" if argument.is_optional and not argument.repeats else ""
    return f"{where}:{optional}{_zsh_name(argument.name)}:{action}"


def _zsh_name(name: str) -> str:
    return name.replace(":", "\\:")


# --- fish ----------------------------------------------------------------------------------------

_FISH_HEAD: Final = """\
# fish completion for nbdfleece; made by: nbdfleece completion fish

# Whether what has been typed begins with these words.
function __nbdfleece_at
    set -l typed (commandline -opc)[2..-1]
    test (count $typed) -ge (count $argv)
    or return 1
    for index in (seq (count $argv))
        test "$typed[$index]" = "$argv[$index]"
        or return 1
    end
end

# Whether what has been typed is just these words.
function __nbdfleece_is
    test (count (commandline -opc)) -eq (math (count $argv) + 1)
    and __nbdfleece_at $argv
end

function __nbdfleece_disks
    nbdfleece disk list --quiet 2>/dev/null
end

function __nbdfleece_snapshots
    nbdfleece snapshot list --quiet 2>/dev/null
end

complete -c nbdfleece -f
"""
_FISH_ACTIONS: Final[Mapping[str, str]] = {
    _FILES: "-F",
    _FOLDERS: "-a '(__fish_complete_directories)'",
    _DISKS: "-a '(__nbdfleece_disks)'",
    _SNAPSHOTS: "-a '(__nbdfleece_snapshots)'",
    _EXPORTS: "-a '(__nbdfleece_disks; __nbdfleece_snapshots)'",
}


def _fish(program: Command) -> str:
    lines = [_FISH_HEAD]
    for command in program.walk():
        words = " ".join(command.path)
        at = f"complete -c nbdfleece -n '__nbdfleece_at {words}'"
        exact = f"complete -c nbdfleece -n '{f'__nbdfleece_is {words}'.strip()}'"
        lines += [
            f"{exact} -a {below.path[-1]} -d {_fish_quoted(below.summary)}\n"
            for below in command.commands
        ]
        if command.commands:
            at = exact
        lines += [f"{at} {_fish_option(option)}\n" for option in command.options]
        for argument in command.arguments:
            if argument.choices:
                lines.append(f"{at} -a {_fish_quoted(' '.join(argument.choices))}\n")
            elif kind := _kind(command, argument):
                lines.append(f"{at} {_FISH_ACTIONS[kind]}\n")
    return "".join(lines)


def _fish_option(option: Option) -> str:
    parts = [
        f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names
    ]
    if option.choices:
        parts.append(f"-x -a {_fish_quoted(' '.join(option.choices))}")
    elif option.value:
        kind = _kind_of_value(option.value)
        parts.append(f"-r {_FISH_ACTIONS[kind]}" if kind else "-x")
    return " ".join([*parts, f"-d {_fish_quoted(option.text)}"])


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS: Final[Mapping[str, Callable[[Command], str]]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
