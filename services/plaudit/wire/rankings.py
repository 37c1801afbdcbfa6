"""Ranked answers: messages of the ranking service and rows of its files. Pydantic and the standard library only.

A person ranks several answers to one prompt. Ranks count from 1 (best) without gaps; equal ranks are ties.

Failure modes: a message that turns a tie into an order, drops a skip, or loses the annotator.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, model_validator

BATCHES_PATH = "/v1/batches"
ANNOTATORS_PATH = "/v1/annotators"
INVITATION_PATH = "/i"
ASSIGNMENT_PATH = "/a"

MAX_ANSWERS = 9
"""Bound on the answers of one task: the keys 1 to 9 rank them."""
MAX_TEXT_CHARS = 200_000
"""Bound on the characters of one answer, of one turn, or of a prompt that is one text."""
MAX_TURNS = 200
MAX_ROWS_PER_UPLOAD = 10_000
MAX_NOTE_CHARS = 4_000
MAX_INSTRUCTIONS_CHARS = 20_000
MAX_NUMBER = 2**31 - 1
"""The largest whole number that fits an integer column of every database."""
MAX_PAGE = 5_000
"""Bound on the rows of one page of rankings."""

BatchId: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""The name of a batch, safe in URLs: letters, digits, dot, underscore, hyphen."""
Id: TypeAlias = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")]
"""Any identifier without spaces, such as a content hash."""
Text: TypeAlias = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Note: TypeAlias = Annotated[str, Field(max_length=MAX_NOTE_CHARS)]
Rank: TypeAlias = Annotated[int, Field(ge=1, le=MAX_ANSWERS)]
Round: TypeAlias = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Version: TypeAlias = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Split: TypeAlias = Literal["train", "held_out"]
Purpose: TypeAlias = Literal["train", "evaluation"]
Role: TypeAlias = Literal["annotator", "admin"]
Flag: TypeAlias = Literal["harmful", "private", "broken", "language", "other"]
"""Why a person sets a task aside: harmful, names a private person, broken text, a language they can't read, other."""
Status: TypeAlias = Literal["counted", "surplus", "late", "skipped", "flagged", "withdrawn"]
"""The outcome of a submission. A `counted` ranking is one of those that the task needs; a `surplus` one came when the
task had enough, a `late` one after the batch was closed. `skipped` and `flagged` rank nothing; `withdrawn` undoes an
earlier submission."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Turn(_Message):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


Prompt: TypeAlias = Text | Annotated[list[Turn], Field(min_length=1, max_length=MAX_TURNS)]
"""One text, or the turns of a conversation that the answer continues."""
Row = TypeVar("Row", bound=_Message)


class Answer(_Message):
    """One answer to a prompt, and its origin. Annotators see only the text."""

    id: Id
    text: Text
    policy: Annotated[str, Field(max_length=256)] = ""
    revision: Annotated[str, Field(max_length=256)] = ""
    seed: int | None = None


class AnswersRow(_Message):
    """One line of an answers file: a prompt and its answers, still to be ranked.

    `group` is a hash of the text that the prompt comes from: it keeps held-out texts out of training. `id` is a content
    hash (`task_id`), so that uploading a row twice changes nothing.
    """

    id: Id
    group: Id
    split: Split = "train"
    prompt: Prompt
    batch: BatchId
    answers: Annotated[list[Answer], Field(min_length=2, max_length=MAX_ANSWERS)]

    @model_validator(mode="after")
    def _answers_are_told_apart(self) -> "AnswersRow":
        _refuse_repeated([answer.id for answer in self.answers])
        return self


class RankingRow(_Message):
    """One line of a rankings file: one person's judgement of one task, with the task itself.

    `ranks[i]` is the rank of `answers[i]`; `ranks` is empty unless `status` is counted, surplus or late.
    `shown_order` lists indices of `answers` from the first shown to the last; an answer with the same text as an
    earlier one is not shown and has that one's rank. `annotator` is a pseudonym. `version` counts the person's
    submissions for this task; the highest one is valid.
    """

    id: Id
    task: Id
    group: Id
    batch: BatchId
    round: Round = 0
    purpose: Purpose = "train"
    split: Split = "train"
    prompt: Prompt
    answers: Annotated[list[Answer], Field(min_length=2, max_length=MAX_ANSWERS)]
    ranks: Annotated[list[Rank], Field(max_length=MAX_ANSWERS)]
    annotator: Id
    status: Status
    flags: list[Flag] = []
    note: Note = ""
    seconds: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    shown_order: list[Annotated[int, Field(ge=0, lt=MAX_ANSWERS)]]
    at: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
    """UTC, to the millisecond."""
    version: Annotated[int, Field(ge=1, le=MAX_NUMBER)]

    @model_validator(mode="after")
    def _is_whole(self) -> "RankingRow":
        _refuse_repeated([answer.id for answer in self.answers])
        if self.status in ("skipped", "flagged", "withdrawn"):
            if self.ranks:
                raise ValueError(f"status {self.status!r} needs empty ranks; got {self.ranks}")
        elif not self.ranks:
            raise ValueError(f"status {self.status!r} needs {len(self.answers)} ranks, one for each answer; got none")
        if self.ranks:
            if len(self.ranks) != len(self.answers):
                raise ValueError(f"{len(self.ranks)} ranks for {len(self.answers)} answers; give each answer one rank")
            if self.ranks != dense(self.ranks):
                raise ValueError(f"ranks {self.ranks} leave a place out; without gaps they are {dense(self.ranks)}")
        if len(set(self.shown_order)) != len(self.shown_order):
            raise ValueError(f"shown_order {self.shown_order} names an answer twice")
        if any(index >= len(self.answers) for index in self.shown_order):
            raise ValueError(f"shown_order {self.shown_order} goes beyond the {len(self.answers)} answers")
        return self


class BatchUpload(_Message):
    """`POST /v1/batches`: a new batch, or more rows for an existing one. All rows are stored, or none.

    Agreement is measured on a share `overlap_share` of the tasks: `overlap` people rank each of these. One person ranks
    each of the other tasks.
    """

    id: BatchId
    round: Round = 0
    purpose: Purpose = "train"
    overlap: Annotated[int, Field(ge=1, le=100)] = 3
    overlap_share: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.2
    instructions: Annotated[str, Field(max_length=MAX_INSTRUCTIONS_CHARS)] = ""
    """Instructions for the annotators, shown above every task of the batch."""
    rows: Annotated[list[AnswersRow], Field(max_length=MAX_ROWS_PER_UPLOAD)]


class BatchUploaded(_Message):
    """The result of an upload."""

    id: BatchId
    added: int
    """Tasks that are new."""
    known: int
    """Tasks that existed already, unchanged."""
    merged_answers: int
    """Answers of the new tasks with the same text as another answer of the task: shown once, with one rank."""
    identical: int
    """New tasks whose answers all have the same text: nobody ranks them."""
    tasks: int
    """Tasks of the batch after the upload."""


class BatchProgress(_Message):
    """`GET /v1/batches/{id}`: the progress of a batch. `complete` means that no task of it is open."""

    id: BatchId
    round: int
    purpose: Purpose
    overlap: int
    overlap_share: float
    created_at: str
    closed_at: str | None
    complete: bool
    tasks: int
    open: int
    done: int
    parked: int
    """Tasks set aside because three people skipped or flagged them."""
    identical: int
    wanted: int
    """Rankings that the open and the done tasks need in total."""
    counted: int
    surplus: int
    late: int
    skipped: int
    flagged: int
    annotators: int
    """People who ranked at least one task."""
    last_seq: int
    """The cursor of the newest submission, as `rankings?after=` takes it."""


class RankingsPage(_Message):
    """`GET /v1/batches/{id}/rankings?after=seq&limit=n`: submissions after the cursor, oldest first.

    Only the newest version for each person and task is listed. A version that replaces one which you have read appears
    after your cursor, so keep the highest version for each pair of task and annotator. `late` rows are listed only with
    `late=true`.
    """

    rows: list[RankingRow]
    after: int
    """The cursor for the next page."""
    more: bool


class Estimate(_Message):
    """A statistic with its 95 % bootstrap interval over prompts; null if it is not defined."""

    value: float | None
    low: float | None
    high: float | None


class AnnotatorReport(_Message):
    """One person's statistics. `reliability` is from Crowd-BT: 1 always follows the order, 0.5 answers at random."""

    annotator: str
    rankings: int
    skipped: int
    flagged: int
    overlapping_tasks: int
    tie_rate: float | None
    pair_agreement: float | None
    """With all other people, over the pairs of answers that both ranked."""
    reliability: float | None
    weight: float | None
    """max(0, 2 x reliability - 1): the weight relative to a person who is always right."""
    median_seconds: float | None


class AgreementReport(_Message):
    """`GET /v1/batches/{id}/agreement`."""

    batch: str
    rankings: int
    overlapping_tasks: int
    """Tasks ranked by at least two people; the statistics below are computed from them."""
    pairs_compared: int
    tie_rate: float | None
    pair_agreement: Estimate
    chance: float | None
    """The expected pair agreement of people who tie as often as these, and otherwise answer at random."""
    kappa: Estimate
    """(pair agreement - chance) / (1 - chance)."""
    tau_b: Estimate
    tau_b_undefined: int
    """Pairs of rankings without tau-b, because one of them ties everything."""
    alpha: Estimate
    """Krippendorff's, ordinal."""
    annotators: list[AnnotatorReport]


class Invite(_Message):
    """`POST /v1/annotators`: invite a person. The name stays in the database; exports carry a pseudonym."""

    name: Annotated[str, Field(max_length=200)] = ""
    role: Role = "annotator"


class Invited(_Message):
    """The answer to `Invite`. The token is shown only here; the database holds a hash of it."""

    annotator: str
    role: Role
    token: str
    link: str


class AnnotatorInfo(_Message):
    """`GET /v1/annotators`: one person, as administrators see them."""

    annotator: str
    name: str
    role: Role
    disabled: bool
    rankings: int


class ShownAnswer(_Message):
    """An answer as annotators see it, without its policy."""

    id: Id
    text: Text


class TaskView(_Message):
    """`GET /` with `Accept: application/json`: the next task for this person.

    Programs send the invitation's token as `Authorization: Bearer TOKEN`, and need neither cookie nor CSRF token. `key`
    and `version` are sent back with the submission: `key` makes it idempotent, and `version` reveals a concurrent edit.
    """

    assignment: str
    task: Id
    batch: BatchId
    prompt: Prompt
    answers: list[ShownAnswer]
    """In the order in which this person sees them."""
    ranks: dict[Id, Rank]
    """The ranks so far: of a draft, or of the ranking that is edited."""
    note: Note
    key: Id
    version: int
    """The number of this person's submissions for this task."""
    lease_until: str


class NoTask(_Message):
    """`GET /` with `Accept: application/json` if there is no task for this person now."""

    assignment: None = None
    waiting: bool
    """Whether other people hold tasks that they may still give up."""


class RankingSubmit(_Message):
    """`POST /a/{assignment}/ranking`: a rank for every answer shown. Equal ranks are ties; gaps are closed."""

    key: Id
    version: Version
    ranks: dict[Id, int]
    note: Note = ""
    seconds: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """Time on the page, as measured by the client; without it, the time since the task was assigned."""


class SkipSubmit(_Message):
    """`POST /a/{assignment}/skip`, and `/undo`, which withdraws the newest version."""

    key: Id
    version: Version


class FlagSubmit(_Message):
    """`POST /a/{assignment}/flag`: the task goes to another person, and the reason is stored."""

    key: Id
    version: Version
    flags: Annotated[list[Flag], Field(min_length=1, max_length=5)]
    note: Note = ""


class DraftSave(_Message):
    """`PUT /a/{assignment}/draft`: the ranks so far. Renews the lease."""

    version: Version
    ranks: dict[Id, Rank]
    note: Note = ""


class DraftSaved(_Message):
    """The answer to a draft."""

    lease_until: str


class Accepted(_Message):
    """The answer to a submission. `replayed` means that it was already recorded, and not recorded again."""

    assignment: str
    version: int
    status: Status
    replayed: bool


PROMPT: TypeAdapter[Any] = TypeAdapter(Prompt)


def dense(ranks: Sequence[int]) -> list[int]:
    """The same order without gaps: [1, 3, 3, 7] is [1, 2, 2, 3]."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)), start=1)}
    return [places[rank] for rank in ranks]


def content_hash(*parts: object) -> str:
    """A hash of JSON values, the same on every machine: 128 bits in hexadecimal."""
    canonical = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:32]


def as_json(prompt: str | list[Turn]) -> Any:
    """A prompt as JSON values."""
    return prompt if isinstance(prompt, str) else [turn.model_dump() for turn in prompt]


def group_of(prompt: str | list[Turn]) -> str:
    """The group of a prompt whose source text is not known: a hash of the prompt itself."""
    return content_hash("group", as_json(prompt))


def rows_of(lines: str, kind: type[Row]) -> list[Row]:
    """The rows of JSON lines. Only a newline ends a row: texts may contain U+2028, U+0085 and others at which
    `str.splitlines` splits.
    """
    return [kind.model_validate_json(line) for line in lines.split("\n") if line]


def new_answer(text: str, *, policy: str = "", revision: str = "", seed: int | None = None) -> Answer:
    """An answer whose id is a hash of its content."""
    identity = content_hash("answer", text, policy, revision, seed)
    return Answer(id=identity, text=text, policy=policy, revision=revision, seed=seed)


def task_id(batch: str, prompt: str | list[Turn], answers: Iterable[Answer]) -> str:
    """The id of a task: a hash of batch, prompt and answers."""
    return content_hash("task", batch, as_json(prompt), [answer.model_dump() for answer in answers])


def new_answers_row(
    batch: str,
    prompt: str | list[Turn],
    answers: Sequence[Answer],
    *,
    group: str | None = None,
    split: Split = "train",
) -> AnswersRow:
    """A row for a file or an upload, with ids made from the content."""
    return AnswersRow(
        id=task_id(batch, prompt, answers),
        group=group or group_of(prompt),
        split=split,
        prompt=prompt,
        batch=batch,
        answers=list(answers),
    )


def _refuse_repeated(ids: Sequence[str]) -> None:
    for index, identity in enumerate(ids):
        if identity in ids[:index]:
            raise ValueError(f"answers {ids.index(identity)} and {index} have the same id {identity!r}")
