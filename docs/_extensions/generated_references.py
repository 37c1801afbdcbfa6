"""Directives whose content comes from the code, so that no page repeats it.

`{plaudit-commands}`   every command of `plaudit` with its flags, from the parser that reads the command line
`{plaudit-services}`   the flags of `plaudit-reward` and `plaudit-rank`, from their settings
`{plaudit-api}`        the objects that it lists, one a line, with signatures and docstrings
`{plaudit-presets}`    the presets as they are

Failure modes: a flag without its default or help; a public object that doesn't exist any more (an error of the build).
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tyro
from docutils import nodes
from docutils.statemachine import StringList
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from plaudit import cli

DEFAULT = re.compile(r"\s*\((?:default: (?P<default>.*?)|(?P<required>required))\)\Z", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Flag:
    """A setting, as the reference shows it."""

    name: str
    kind: str
    default: str
    text: str


def flags_of(command: str) -> list[Flag]:
    """The flags of `plaudit COMMAND`, in the order of --help."""
    config_type = cli.COMMANDS[command].config_type
    with warnings.catch_warnings():
        # The arguments as argparse has them; tyro has no other list of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(
            cli._CommandLine[config_type],
            default=cli._CommandLine(settings=config_type()),
            registry=cli._registry(),
        )
    return [flag_of(action) for action in parser._actions if "--help" not in action.option_strings]


def flag_of(action: argparse.Action) -> Flag:
    """A flag from its argparse action. tyro puts the default at the end of the help."""
    text = (action.help or "").replace("%%", "%")
    found = DEFAULT.search(text)
    default = (found["default"] or ("" if found["default"] is not None else "required")) if found else ""
    name = ", ".join(action.option_strings) or str(action.dest)
    kind = "" if isinstance(action, argparse.BooleanOptionalAction) else str(action.metavar or "")
    return Flag(name, kind, default, text[: found.start()] if found else text)


def setting_flags(settings: type[BaseModel], prefix: str) -> list[Flag]:
    """The flags of a service's settings; each is also an environment variable."""
    return [
        Flag(
            f"--{name.replace('_', '-')}",
            f"{prefix}{name.upper()}",
            "required" if field.is_required() else default_of(field),
            (field.description or "").replace("\n", " "),
        )
        for name, field in settings.model_fields.items()
    ]


def default_of(field: FieldInfo) -> str:
    """A default as the command line takes it."""
    value = field.default if field.default is not PydanticUndefined else ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def described(flags: Iterable[Flag]) -> list[str]:
    """The Markdown of a list of settings: a definition list, which a phone shows as well as a screen."""
    lines = []
    for flag in flags:
        default = "required" if flag.default == "required" else f"default {code(flag.default)}" if flag.default else ""
        kind = code(flag.kind.replace("{None}|", "").replace("|{None}", ""))
        lines += [
            " · ".join(part for part in (code(flag.name), kind, default) if part),
            f": {escaped(flag.text) or '—'}",
            "",
        ]
    return lines


def escaped(text: str) -> str:
    """A help text as Markdown: only its `code` is markup."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>{}\[\]|$])", r"\\\1", part) for part in parts)


def code(text: str) -> str:
    """A text as code; nothing for an empty one."""
    return f"`{' '.join(text.split())}`" if text.strip() else ""


class _Generated(SphinxDirective):
    has_content = True

    def section(self, name: str, lines: list[str], title: str | None = None) -> nodes.section:
        made = nodes.section(ids=[nodes.make_id(name)], names=[nodes.fully_normalize_name(name)])
        made += nodes.title("", "", nodes.literal(text=title or name))
        self.state.document.note_implicit_target(made, made)
        self.parse(lines, made)
        return made

    def parse(self, lines: list[str], into: nodes.Element) -> None:
        self.state.nested_parse(StringList(lines, source=self.env.docname), 0, into)

    def depends_on(self, module: str) -> None:
        self.env.note_dependency(str(inspect.getsourcefile(importlib.import_module(module))))


class Commands(_Generated):
    """Every command of `plaudit`."""

    def run(self) -> list[nodes.Node]:
        """One section for each command."""
        made: list[nodes.Node] = []
        for name, command in cli.COMMANDS.items():
            self.depends_on(command.config_type.__module__)
            summary = f"{command.summary[0].upper()}{command.summary[1:]}."
            lines = [summary, "", "```bash", command.example, "```", "", *described(flags_of(name))]
            made.append(self.section(f"plaudit {name}", lines))
        return made


class Services(_Generated):
    """The flags of the two services."""

    def run(self) -> list[nodes.Node]:
        """One section for each command."""
        from plaudit.ranking_service import settings as rank
        from plaudit.reward_service import settings as reward

        commands = {"plaudit-reward": (reward.Settings, "REWARD_")}
        for name, found in vars(rank).items():
            if inspect.isclass(found) and issubclass(found, rank._Command) and found is not rank._Command:
                commands[f"plaudit-rank {name.lower()}"] = (found, "RANK_")
        self.depends_on(rank.__name__)
        self.depends_on(reward.__name__)
        return [
            self.section(name, [*first_paragraph(settings), "", *described(setting_flags(settings, prefix))])
            for name, (settings, prefix) in commands.items()
        ]


def first_paragraph(documented: type) -> list[str]:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].splitlines()


class Presets(_Generated):
    """The preset settings."""

    def run(self) -> list[nodes.Node]:
        """One section for each file."""
        made: list[nodes.Node] = []
        for path in sorted(Path(cli.__file__).parent.glob("presets/*.yaml")):
            self.env.note_dependency(str(path))
            made.append(
                self.section(
                    path.stem, ["```yaml", *path.read_text().rstrip().splitlines(), "```"], f"--config {path.stem}"
                )
            )
        return made


class Api(_Generated):
    """Public objects with signatures and docstrings."""

    def run(self) -> list[nodes.Node]:
        """Entries of the Python domain."""
        holder = nodes.container()
        for line in self.content:
            if line.strip():
                module, _, name = line.strip().rpartition(".")
                self.depends_on(module)
                self.parse([*entry(module, name, getattr(importlib.import_module(module), name)), ""], holder)
        return holder.children


def entry(module: str, name: str, found: Any) -> list[str]:
    """The Markdown of one object, members of a class included."""
    text = docstring(found)
    if not inspect.isclass(found):
        return fence(3, "py:function", f"{module}.{name}{signature(found)}", text)
    shown = "" if issubclass(found, BaseException) else signature(found)
    kind = "py:exception" if issubclass(found, BaseException) else "py:class"
    body = [*text, ""]
    fields = (
        {f.name: repr(f.default) for f in dataclasses.fields(found) if f.default is not dataclasses.MISSING}
        if dataclasses.is_dataclass(found)
        else {}
    )
    notes = cli._field_docstrings(found) if dataclasses.is_dataclass(found) or issubclass(found, BaseModel) else {}
    for field, note in notes.items():
        value = [f":value: {fields[field]}", ""] if field in fields else []
        body += [*fence(4, "py:attribute", field, [*value, note]), ""]
    own = {
        key: value
        for cls in reversed(found.__mro__[:-1])
        if cls.__module__.startswith("plaudit")
        for key, value in vars(cls).items()
    }
    for key, value in own.items():
        target = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if key.startswith("_") and key != "__call__":
            continue
        if isinstance(value, property):
            body += [*fence(4, "py:property", key, docstring(value)), ""]
        elif inspect.isfunction(target) and target.__doc__:
            body += [*fence(4, "py:method", f"{key}{signature(target)}", docstring(target)), ""]
    return fence(5, kind, f"{module}.{name}{shown}", body)


def fence(ticks: int, directive: str, title: str, body: list[str]) -> list[str]:
    """A MyST directive."""
    return ["`" * ticks + f"{{{directive}}} {title}", *body, "`" * ticks]


def signature(found: Any) -> str:
    """Parameters with defaults and without annotations: their types are in the docstring where they matter."""
    try:
        made = inspect.signature(found)
    except (TypeError, ValueError):
        return "()"
    parameters = [
        p.replace(
            annotation=inspect.Parameter.empty, default=_Shown(p.default) if p.default is not p.empty else p.empty
        )
        for p in made.parameters.values()
        if p.name != "self"
    ]
    return str(made.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


class _Shown:
    """A default whose repr fits into a signature."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        text = repr(self.value)
        return text if len(text) < 40 and "<" not in text and " at 0x" not in text else "..."


def docstring(found: Any) -> list[str]:
    """A docstring as Markdown: its sections "Raises:" and "Returns:" become lists."""
    lines: list[str] = []
    for line in (inspect.getdoc(found) or "").splitlines():
        if re.fullmatch(r"(Raises|Returns|Args|Attributes|Yields):", line):
            lines += ["", f"**{line}**", ""]
        elif re.match(r"    \w[\w., ]*: ", line):
            name, _, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}")
        elif line.startswith("    ") and lines and lines[-1].startswith(("- ", "  ")):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return lines


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("plaudit-commands", Commands)
    app.add_directive("plaudit-services", Services)
    app.add_directive("plaudit-presets", Presets)
    app.add_directive("plaudit-api", Api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
