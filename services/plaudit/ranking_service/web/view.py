"""The pages, from templates. Texts are shown unchanged, and nothing in them is executed.

Every text is escaped, and control characters that a browser would hide are shown as symbols.

Failure modes: a text that runs as script; two different texts that look the same.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from fastapi import Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from plaudit.ranking_service.exchange import turns_of_hh
from plaudit.ranking_service.store.submissions import Judgement, ShownTask
from plaudit.wire import rankings as wire

LONG_CHARS = 3000
"""A longer text is folded at about this length; the rest is shown on request."""
FOLD_WITHIN = 600
"""How far back the fold may move, to end at a paragraph or a word."""
SYMBOLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: "␡", 0xFEFF: "⟨BOM⟩"}
ROLES = {"system": "Instructions", "user": "Person", "assistant": "Assistant"}
FLAGS: Mapping[str, str] = {
    "harmful": "It is harmful or upsetting",
    "private": "It names a private person",
    "broken": "The text is broken or cut off",
    "language": "It is in a language that I don't read",
    "other": "Something else (say what in the note)",
}
STATUS_WORDS: Mapping[str, str] = {
    "counted": "Ranked",
    "surplus": "Ranked (one more than needed)",
    "late": "Ranked after the end",
    "skipped": "Skipped",
    "flagged": "Flagged",
}


@dataclass(frozen=True)
class Progress:
    """The progress of the person and of the batch."""

    mine: int
    done: int
    wanted: int

    @property
    def percent(self) -> int:
        """The batch's progress in percent."""
        return 100 * self.done // self.wanted if self.wanted else 0


@dataclass(frozen=True)
class Body:
    """A text in two parts: shown, and shown on request."""

    head: str
    rest: str

    @property
    def rest_words(self) -> int:
        """Words in the folded part."""
        return len(self.rest.split())


@dataclass(frozen=True)
class Card:
    """An answer on the page."""

    id: str
    letter: str
    body: Body
    rank: int | None


def body(text: str) -> Body:
    """A text for display, folded if it is long."""
    visible = text.translate(SYMBOLS)
    if len(visible) <= LONG_CHARS + FOLD_WITHIN:
        return Body(visible, "")
    start = LONG_CHARS - FOLD_WITHIN
    places = [m.start() for m in re.finditer(r"\n\n", visible[start:LONG_CHARS])] or [
        m.start() for m in re.finditer(r"\s", visible[start:LONG_CHARS])
    ]
    cut = start + places[-1] if places else LONG_CHARS
    return Body(visible[:cut], visible[cut:])


def turns(prompt: str | Sequence[wire.Turn]) -> list[tuple[str, str, Body]]:
    """The prompt as turns: role, speaker, text. A plain text is one turn without a role, unless it is a transcript."""
    listed = prompt
    if isinstance(prompt, str):
        try:
            listed = turns_of_hh(prompt) if re.match(r"\s*Human:", prompt) else []
        except ValueError:
            listed = []
        if not listed:
            return [("", "", body(prompt))]
    return [(turn.role, ROLES[turn.role], body(turn.content)) for turn in listed]  # type: ignore[union-attr]


def cards(shown: ShownTask, ranks: Mapping[str, int]) -> list[Card]:
    """The answers, in the order of this person's page."""
    return [
        Card(answer.id, chr(ord("A") + i), body(answer.text), ranks.get(answer.id))
        for i, answer in enumerate(shown.answers)
    ]


@cache
def static_files() -> Mapping[str, tuple[bytes, str]]:
    """The files under /static: bytes and media type, by a name that contains a hash of the content."""
    types = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
    found = {}
    for name in ("page.css", "page.js", "icon.svg"):
        data = resources.files("plaudit.ranking_service.web").joinpath("static", name).read_bytes()
        stem, kind = name.split(".")
        found[f"{stem}.{hashlib.sha256(data).hexdigest()[:12]}.{kind}"] = data, types[kind]
    return found


def static_path(name: str) -> str:
    """The URL path of a static file."""
    stem, kind = name.split(".")
    return next(f"/static/{path}" for path in static_files() if path.startswith(f"{stem}.") and path.endswith(kind))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("plaudit.ranking_service.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"static": static_path, "flags": FLAGS, "status_words": STATUS_WORDS}
    environment.filters["number"] = _number
    environment.filters["share"] = _share
    environment.filters["visible"] = lambda value: value.translate(SYMBOLS)
    return environment


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def page(template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **context: Any) -> Response:
    """A page, with a content security policy that allows only our own script, style sheet and images."""
    nonce = secrets.token_urlsafe(16)
    html = _environment().get_template(template).render(nonce=nonce, **context)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, status_code=status, headers={"content-security-policy": policy, **(headers or {})})


def task_page(
    shown: ShownTask,
    *,
    csrf: str,
    who: str,
    admin: bool,
    progress: Progress,
    undo: tuple[str, int] | None,
    word: Judgement | None = None,
    alert: str = "",
    recorded: Judgement | None = None,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The page where a task is ranked. The form is filled with `word`, else the draft, else the current judgement."""
    filled = word or shown.draft or shown.current or Judgement("ranking")
    letters = {answer.id: chr(ord("A") + i) for i, answer in enumerate(shown.answers)}
    return page(
        "task.html",
        status=status,
        headers=headers,
        shown=shown,
        instructions=shown.instructions.translate(SYMBOLS),
        turns=turns(shown.prompt),
        cards=cards(shown, filled.ranks),
        places=range(1, len(shown.answers) + 1),
        note=filled.note.translate(SYMBOLS),
        chosen_flags=filled.flags,
        csrf=csrf,
        who=who,
        admin=admin,
        progress=progress,
        undo=undo,
        undo_key=None if undo is None else wire.content_hash("undo", *undo),
        alert=alert,
        recorded=None if recorded is None else in_words(recorded, letters),
        sent=None if recorded is None or word is None else in_words(word, letters),
        form_is_newer=word is not None,
        data=json.dumps({"assignment": shown.assignment, "version": shown.version, "who": who}),
    )


def in_words(word: Judgement, letters: Mapping[str, str]) -> str:
    """A judgement in one line: B, then A and C (tied), then D."""
    if word.kind != "ranking":
        return {"skip": "Skipped", "flag": "Flagged", "withdraw": "Taken back"}[word.kind]
    places: dict[int, list[str]] = {}
    for answer, rank in word.ranks.items():
        places.setdefault(rank, []).append(letters.get(answer, "?"))
    listed = [" and ".join(sorted(places[rank])) for rank in sorted(places)]
    return ", then ".join(f"{names} (tied)" if " and " in names else names for names in listed)
