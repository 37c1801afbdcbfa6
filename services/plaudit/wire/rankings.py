"""Ranked answers: messages of the ranking service and rows of its files. Pydantic and the standard library only.

A person ranks several answers to one prompt. Equal ranks are ties; a rank is a place from 1 (best), without gaps. Wrong
here would be a message that loses who said what: a tie turned into an order, or a skip that disappears.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, model_validator

BATCHES_PATH = "/v1/batches"
ANNOTATORS_PATH = "/v1/annotators"
INVITATION_PATH = "/i"
ASSIGNMENT_PATH = "/a"

MAX_ANSWERS = 9
"""Answers that one task may hold: the keys 1 to 9 rank them."""
MAX_TEXT_CHARS = 200_000
"""Characters of one answer, of one turn, or of a prompt that is one text."""
MAX_TURNS = 200
MAX_ROWS_PER_UPLOAD = 10_000
MAX_NOTE_CHARS = 4_000
MAX_INSTRUCTIONS_CHARS = 20_000
MAX_NUMBER = 2**31 - 1
"""The largest whole number that every database holds in a plain column."""
MAX_PAGE = 5_000
"""Rows that one page of rankings may hold."""

BatchId: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Names a batch, also in URLs: letters, digits, dot, underscore, hyphen."""
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
"""What became of a submission. A `counted` ranking fills one of the task's places; a `surplus` one came when all were
filled, a `late` one after the batch was closed. `skipped` and `flagged` rank nothing; `withdrawn` takes a word back."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Turn(_Message):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


Prompt: TypeAlias = Text | Annotated[list[Turn], Field(min_length=1, max_length=MAX_TURNS)]
"""One text, or the turns of a conversation that the answer continues."""


class Answer(_Message):
    """One answer to a prompt, and where it came from. Annotators see the text alone."""

    id: Id
    text: Text
    policy: Annotated[str, Field(max_length=256)] = ""
    revision: Annotated[str, Field(max_length=256)] = ""
    seed: int | None = None


class AnswersRow(_Message):
    """One line of an answers file: a prompt and its answers, still to be ranked.

    `group` is the hash of the text that the prompt comes from, so that no held-out text is trained on. `id` is a
    content hash (`task_id`), so that uploading a row twice is harmless.
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
    """One line of a rankings file: what one person said about one task, complete in itself.

    `ranks[i]` is the rank of `answers[i]`; `ranks` is empty unless `status` is counted, surplus or late.
    `shown_order` lists indices of `answers` from the first shown to the last; an answer with the same text as an
    earlier one is not shown and has that one's rank. `annotator` is a pseudonym. `version` counts what the person said
    about this task; the highest is in force.
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
                raise ValueError(f"status {self.status!r} goes with empty ranks; got {self.ranks}")
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
    """`POST /v1/batches`: a new batch, or more rows for one that is there. All rows are taken, or none.

    `overlap` people rank a task of the `overlap_share` of tasks that agreement is measured on; one ranks each other.
    """

    id: BatchId
    round: Round = 0
    purpose: Purpose = "train"
    overlap: Annotated[int, Field(ge=1, le=100)] = 3
    overlap_share: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.2
    instructions: Annotated[str, Field(max_length=MAX_INSTRUCTIONS_CHARS)] = ""
    """What the annotators are asked to look for, shown above every task of the batch."""
    rows: Annotated[list[AnswersRow], Field(max_length=MAX_ROWS_PER_UPLOAD)]


class BatchUploaded(_Message):
    """What an upload did."""

    id: BatchId
    added: int
    """Tasks that are new."""
    known: int
    """Tasks that were there already, unchanged."""
    merged_answers: int
    """Answers of the new tasks with the same text as another one of theirs: shown once, ranked the same."""
    identical: int
    """New tasks whose answers are all the same text: nobody is asked."""
    tasks: int
    """Tasks of the batch after the upload."""


class BatchProgress(_Message):
    """`GET /v1/batches/{id}`: how far a batch is. `complete` says that nobody has anything left to do in it."""

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
    """Rankings that the open and the done tasks need together."""
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
    """`GET /v1/batches/{id}/rankings?after=seq&limit=n`: what was said after the cursor, oldest first.

    Of each person and task the newest version alone is listed. A version that replaces one which you have read appears
    behind your cursor: keep the highest version for each pair of task and annotator. `late` rows are left out unless
    `late=true`.
    """

    rows: list[RankingRow]
    after: int
    """The cursor to go on from."""
    more: bool


class Estimate(_Message):
    """A statistic with its 95 % interval by bootstrap over prompts; null where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


class AnnotatorReport(_Message):
    """What one person did. `reliability` is from Crowd-BT: 1 never contradicts the order, 0.5 answers at random."""

    annotator: str
    rankings: int
    skipped: int
    flagged: int
    overlapping_tasks: int
    tie_rate: float | None
    pair_agreement: float | None
    """With everybody else, over the pairs of answers that both judged."""
    reliability: float | None
    weight: float | None
    """max(0, 2 x reliability - 1): what the person's word is worth beside a person who is always right."""
    median_seconds: float | None


class AgreementReport(_Message):
    """`GET /v1/batches/{id}/agreement`."""

    batch: str
    rankings: int
    overlapping_tasks: int
    """Tasks ranked by two people or more; everything below comes from them."""
    pairs_compared: int
    tie_rate: float | None
    pair_agreement: Estimate
    chance: float | None
    """The pair agreement of people who tie as often as these and otherwise answer at random."""
    kappa: Estimate
    """(pair agreement - chance) / (1 - chance)."""
    tau_b: Estimate
    tau_b_undefined: int
    """Pairs of rankings left out of tau-b because one of them ties everything."""
    alpha: Estimate
    """Krippendorff's, ordinal."""
    annotators: list[AnnotatorReport]


class Invite(_Message):
    """`POST /v1/annotators`: one more person. The name stays in the database; exports carry a pseudonym."""

    name: Annotated[str, Field(max_length=200)] = ""
    role: Role = "annotator"


class Invited(_Message):
    """The answer to an invitation. The token is shown this once; the database holds a hash of it."""

    annotator: str
    role: Role
    token: str
    link: str


class AnnotatorInfo(_Message):
    """`GET /v1/annotators`: one of the people, as an administrator sees them."""

    annotator: str
    name: str
    role: Role
    disabled: bool
    rankings: int


class ShownAnswer(_Message):
    """An answer as an annotator gets it: nothing says which policy wrote it."""

    id: Id
    text: Text


class TaskView(_Message):
    """`GET /` with `Accept: application/json`: the task that this person is to rank next.

    Programs send the invitation's token as `Authorization: Bearer TOKEN`; no cookie and no CSRF token is needed then.
    `key` and `version` go back with the submission: `key` makes sending twice harmless, `version` is what the person
    saw, so that two edits of one ranking are noticed.
    """

    assignment: str
    task: Id
    batch: BatchId
    prompt: Prompt
    answers: list[ShownAnswer]
    """In the order of this person's page."""
    ranks: dict[Id, Rank]
    """What is ranked so far: a draft, or the ranking that is edited."""
    note: Note
    key: Id
    version: int
    """Versions there are of this person's word on this task; 0 before the first."""
    lease_until: str


class NoTask(_Message):
    """`GET /` with `Accept: application/json` when there is nothing to rank for this person now."""

    assignment: None = None
    waiting: bool
    """Whether others still hold tasks that may come free."""


class RankingSubmit(_Message):
    """`POST /a/{assignment}/ranking`: a rank for every answer shown. Equal ranks are ties; gaps are closed."""

    key: Id
    version: Version
    ranks: dict[Id, int]
    note: Note = ""
    seconds: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """Time spent on the page as the client measured it; without it, the time since the task was handed out."""


class SkipSubmit(_Message):
    """`POST /a/{assignment}/skip`, and `/undo`, which takes back the newest version."""

    key: Id
    version: Version


class FlagSubmit(_Message):
    """`POST /a/{assignment}/flag`: the task goes to somebody else, and the reason is kept."""

    key: Id
    version: Version
    flags: Annotated[list[Flag], Field(min_length=1, max_length=5)]
    note: Note = ""


class DraftSave(_Message):
    """`PUT /a/{assignment}/draft`: what is ranked so far. Renews the lease."""

    version: Version
    ranks: dict[Id, Rank]
    note: Note = ""


class DraftSaved(_Message):
    """The answer to a draft."""

    lease_until: str


class Accepted(_Message):
    """The answer to a submission. `replayed` says that it had been recorded before and was not recorded again."""

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
