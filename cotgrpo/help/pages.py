"""The help of a command, short or whole; options that do not exist; completion for shells."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence

from cotgrpo.commands.parsers import COMMANDS, DESCRIPTION, HelpFormatter
from cotgrpo.help.index import Command, Option, read_index, stored_index
from cotgrpo.help.short import EXAMPLES, LINES, LINES_OF_COMMANDS, MATTER_MOST, NAMES_ELSEWHERE, NEEDED
from cotgrpo.terminal import did_you_mean

HELP_FLAGS = ("-h", "--help", "--help-all")
SHELLS = ("bash", "zsh", "fish")
FOLDERS = ("--run_dir", "--out", "--student.path", "--teacher.path", "--grpo.init_from", "--checkpoint.folder")
FILES = ("--config", "--data.train", "--data.test", "--questions", "--student", "--ghosts", "--edited", "--json")


class ShortFormatter(HelpFormatter):
    """The formatter, with options of any length next to their lines."""

    def __init__(self, prog: str) -> None:
        super(HelpFormatter, self).__init__(prog, max_help_position=36)


def overview() -> str:
    """Return the help of `cotgrpo` itself."""
    parser = new_parser("cotgrpo COMMAND [--option VALUE ...]", DESCRIPTION)
    commands = "\n".join(f"    {name:12}{line}" for name, line in COMMANDS.items())
    options = parser.add_argument_group("options")
    options.add_argument("-h", "--help", action="store_true", help="show this help")
    options.add_argument("--version", action="store_true", help="show the version")
    options.add_argument("--print-completion", metavar="SHELL", help=completion_line())
    examples = "\n".join(f"  {EXAMPLES[name][0]}" for name in ("quickstart", "sft", "grpo", "eval"))
    text = parser.format_help().replace("\noptions:", f"\ncommands, in the order of use:\n{commands}\n\noptions:")
    return f"{text}\nexamples:\n{examples}\n"


def completion_line() -> str:
    """Return the line of help on completion."""
    return f"show the completion of {', '.join(SHELLS[:-1])} or {SHELLS[-1]}"


def new_parser(usage: str, description: str, formatter: type[HelpFormatter] = HelpFormatter) -> argparse.ArgumentParser:
    """Return a parser that only formats."""
    return argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=formatter, add_help=False, allow_abbrev=False
    )


def help_text(command: str, arguments: Sequence[str]) -> str:
    """Return the help that the arguments of a command ask for.

    It has what matters most, or every option with `--help-all`. A command with few options always shows them. A part of
    `bench` has its own help.
    """
    name = f"{command} {arguments[0]}" if arguments and f"{command} {arguments[0]}" in read_index() else command
    found = read_index()[name]
    is_short = "--help-all" not in arguments
    text = short_text(name, found) if is_short and name in MATTER_MOST else whole_text(name, found, is_short)
    examples = EXAMPLES[command] if name == command else (f"cotgrpo {name}",)
    lines = "\n".join(f"  {example}" for example in examples)
    text += f"\n{'example' if len(examples) == 1 else 'examples'}:\n{lines}\n"
    rest = f"\nAll {len(found.options)} options, by section: cotgrpo {name} --help-all\n"
    return text + (rest if is_short and command != "bench" else "")


def short_text(name: str, command: Command) -> str:
    """Return what matters most of a command: a line for each setting."""
    parser = new_parser(
        f"cotgrpo {name} [--config FILE.yaml] [--option VALUE ...]", command.description, ShortFormatter
    )
    group = parser.add_argument_group("settings that matter most, with their defaults")
    for key in MATTER_MOST[name]:
        option = next(option for option in command.options if f"--{key}" in option.flags)
        line = LINES_OF_COMMANDS.get((name, key)) or LINES[key]
        needed = key in NEEDED.get(name, ())
        default = " [needed]" if needed else f" [{option.default}]" if option.default not in ("", "[]") else ""
        group.add_argument(f"--{key}", action="store_true", help=escaped(line + default))
    return parser.format_help()


def whole_text(name: str, command: Command, is_short: bool) -> str:
    """Return all options of a command. A short help leaves out those on several processes."""
    usage = {"bench": "bench PART", "compare": "compare RUN RUN ..."}.get(name, name)
    parser = new_parser(f"cotgrpo {usage} [--option VALUE ...]", command.description)
    add_help_options(parser.add_argument_group("help"))
    for group in command.groups:
        if is_short and group.title == "distributed":
            continue
        add = parser.add_argument_group(group.title, escaped(group.description) or None)
        for option in group.options:
            add_option(add, option)
    return parser.format_help()


def add_option(group: argparse._ActionsContainer, option: Option) -> argparse.Action:
    """Add an option to a parser that formats, or to its group."""
    if not option.flags:
        return group.add_argument(option.metavar, help=escaped(option.help))
    if not option.metavar:
        return group.add_argument(*option.flags, action="store_true", help=escaped(option.help))
    return group.add_argument(*option.flags, metavar=option.metavar, help=escaped(option.help))


def escaped(text: str) -> str:
    """Return a text that argparse shows as it is."""
    return text.replace("%", "%%")


def find_unknown_option(command: str, arguments: Sequence[str]) -> str | None:
    """Return what is wrong with the first option that a command does not know.

    None: there is no such option, or the command's own parser has to say so, since the index is old.
    """
    name, index = command, stored_index()
    if index is None:
        return None
    if command == "bench":
        parts = [option.metavar for option in index[command].options if not option.flags]
        if not arguments or arguments[0] not in parts:
            return unknown_part(parts, arguments[0]) if arguments and not arguments[0].startswith("-") else None
        name = f"{command} {arguments[0]}"
    known = [flag for flag in index[name].flags if flag.startswith("--")]
    for argument in arguments:
        flag = argument.partition("=")[0]
        if argument == "--":
            break
        if not argument.startswith("--") or " " in argument or flag in known:
            continue
        if any(flag.startswith(f"{each}.") for each in known):  # a key of a mapping
            continue
        if command == "bench" and any(each.startswith(flag) for each in known):  # its parser takes abbreviations
            continue
        names = [each[2:] for each in known if not each.endswith("+")]
        bare = flag[2:].replace("-", "_")
        ours = NAMES_ELSEWHERE.get(bare, "").format(stage=command)
        ours = ours or next((each for each in names if each.rpartition(".")[2] == bare), "")
        hint = f" Did you mean --{ours}?" if ours in names else ""
        return f"Unknown option {flag}.{hint or did_you_mean(flag[2:], [*names, 'help', 'help-all'], '--')}"
    return None


def unknown_part(parts: Sequence[str], given: str) -> str:
    """Return what is wrong with the name of a part of `bench`."""
    near = difflib.get_close_matches(given, parts, n=1)
    return f"bench has no part {given!r}. " + (f"Did you mean {near[0]}?" if near else f"Choose {', '.join(parts)}.")


def completion(shell: str) -> str:
    """Return the script that completes commands and options in a shell of `SHELLS`."""
    import shtab

    index = read_index()
    parser = argparse.ArgumentParser(prog="cotgrpo", add_help=False)
    add_help_options(parser)
    parser.add_argument("--version", action="store_true", help="show the version")
    parser.add_argument("--print-completion", choices=SHELLS, help=completion_line())
    commands = parser.add_subparsers()
    for name, line in COMMANDS.items():
        own = commands.add_parser(name, help=line, add_help=False)
        add_completed_options(own, index[name])
        parts = [option for option in index[name].options if not option.flags and f"{name} {option.metavar}" in index]
        if not parts:
            continue
        inner = own.add_subparsers()
        for part in parts:
            of_part = inner.add_parser(part.metavar, help=escaped(part.help), add_help=False)
            add_completed_options(of_part, index[f"{name} {part.metavar}"])
    return str(shtab.complete(parser, shell=shell))


def add_help_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that show a help."""
    parser.add_argument("-h", "--help", action="store_true", help="show what matters most")
    parser.add_argument("--help-all", action="store_true", help="show every option, by section")


def add_completed_options(parser: argparse.ArgumentParser, command: Command) -> None:
    """Add the options of a command, with the words, files or folders that complete their values."""
    import shtab

    add_help_options(parser)
    for option in command.options:
        if not option.flags and option.metavar[:1] != "[":  # a part, which has a parser of its own
            continue
        help = escaped(first_sentence(option.help))
        if not option.metavar:
            parser.add_argument(*option.flags, action="store_true", help=help)
            continue
        words = re.fullmatch(r"\{([\w.,-]+)\}", option.metavar)
        choices = words[1].split(",") if words else None
        if option.flags:
            action = parser.add_argument(*option.flags, choices=choices, help=help)
        else:
            action = parser.add_argument("runs", nargs="*", help=help)
        if {*FOLDERS} & {*option.flags} or not option.flags:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif {*FILES} & {*option.flags}:
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def first_sentence(text: str) -> str:
    """Return the first sentence of a help, without its default."""
    return re.split(r"(?<=\.) | \(default: ", text, maxsplit=1)[0]
