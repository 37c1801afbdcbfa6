"""Preferences in one form: a prompt, its answers, and for each pair of answers how often people preferred each.

Files of `{"prompt", "answers"}`, of `chosen` and `rejected`, and the ranking service's rows are converted to this form.
Failure modes: a tie becomes an order; a prompt has more weight because more people ranked it; a text's answers are on
both sides of the split.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from plaudit.data.conversations import ASSISTANT, Conversation, Prompt, conversation, is_conversation, plain
from plaudit.data.tables import DataError, Table, load_table
from plaudit.wire import rankings as wire

MIN_OVERLAP = 30
"""Minimum number of tasks in common with others for a person's reliability estimate to be used."""


@dataclass(frozen=True)
class Opinion:
    """One person's ranking of the answers to one prompt."""

    prompt: Prompt
    group: str
    """Identifies the text that the prompt comes from. A group is on one side of the split."""
    answers: list[str]
    ranks: list[int]
    """`ranks[i]` is the rank of `answers[i]`: 1 is best, equal ranks are ties."""
    annotator: str = ""
    policies: list[str] = field(default_factory=list)
    """The policy that wrote `answers[i]`, if known."""
    margin: float = 0.0
    """By how much the better of two answers should win, in units of the score."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, and people's preferences."""

    first: int
    second: int
    wins: int
    """How often `first` was preferred."""
    losses: int
    ties: int
    target: float
    """The mean preference for `first`, in [0, 1]: a win counts 1, a tie 1/2, a loss 0."""
    margin: float = 0.0


@dataclass(frozen=True)
class RankedPrompt:
    """One prompt with all of its answers, and all pairs with a preference."""

    prompt: Prompt
    group: str
    answers: list[str]
    policies: list[str]
    pairs: list[Pair]


@dataclass
class LeftOut:
    """Counts of what is left out of training, by reason."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int = 1) -> None:
        """Add to the count of a reason."""
        if count:
            self.counts[what] = self.counts.get(what, 0) + count

    def lines(self) -> list[str]:
        """For people."""
        return [f"left out: {count} {what}" for what, count in self.counts.items()]


def load_opinions(source: str, left_out: LeftOut) -> list[Opinion]:
    """Opinions from a file, a data set directory or a hub id, in any of the three forms.

    Raises:
        DataError: it can't be read, has none of the forms, or a row doesn't match its form.
    """
    table = load_table(source)
    names = set(table.columns)
    if {"task", "annotator", "ranks"} <= names:
        return opinions_of_rankings(_ranking_rows(table, source), left_out)
    if {"prompt", "answers"} <= names:
        return [_ranked(row, f"{source}, row {number}") for number, row in _rows(table)]
    if {"chosen", "rejected"} <= names:
        rows = list(_rows(table))
        no_prompts = _mostly_begin_apart([row for _, row in rows])
        return [_preference(row, f"{source}, row {number}", no_prompts) for number, row in rows]
    raise DataError(
        f"{source} has the columns {', '.join(table.columns) or '(none)'}; preferences are prompt and answers (best "
        "first), or chosen and rejected with or without a prompt, or the ranking service's rows"
    )


def opinions_of_rankings(rows: Iterable[wire.RankingRow], left_out: LeftOut) -> list[Opinion]:
    """Opinions from the ranking service's rows: only the newest version for each person and task.

    Rankings made to evaluate policies, and rankings of held-out texts, are left out.
    """
    newest: dict[tuple[str, str, str], wire.RankingRow] = {}
    for row in rows:
        key = (row.batch, row.task, row.annotator)
        if key not in newest or newest[key].version < row.version:
            newest[key] = row
    opinions = []
    for key in sorted(newest):
        row = newest[key]
        if not row.ranks:
            left_out.add(f"tasks {row.status}")
        elif row.purpose == "evaluation" or row.split == "held_out":
            left_out.add("rankings of evaluations or of held-out texts")
        else:
            answers = [answer.text for answer in row.answers]
            policies = [answer.policy for answer in row.answers]
            prompt: Prompt = row.prompt if isinstance(row.prompt, str) else wire.as_json(row.prompt)
            opinions.append(Opinion(prompt, row.group, answers, row.ranks, row.annotator, policies))
    return opinions


def merged(
    opinions: Sequence[Opinion], left_out: LeftOut, weights: Mapping[str, float] | None = None
) -> list[RankedPrompt]:
    """One row for each prompt of each group, in the order in which they first appear.

    Answers with the same text are merged. `weights` are the annotators' weights, by default 1. Pairs that everyone
    ties, and pairs without any annotator of positive weight, are left out.
    """
    by_prompt: dict[tuple[str, str], list[Opinion]] = {}
    for opinion in opinions:
        by_prompt.setdefault((opinion.group, _key(opinion.prompt)), []).append(opinion)
    rows = []
    for (group, _), said in by_prompt.items():
        row = _merged(group, said, left_out, weights or {})
        if row.pairs:
            rows.append(row)
        else:
            left_out.add("prompts without a pair that anybody tells apart")
    return rows


def _merged(group: str, said: Sequence[Opinion], left_out: LeftOut, weights: Mapping[str, float]) -> RankedPrompt:
    place: dict[str, int] = {}
    policies: list[str] = []
    counts: dict[tuple[int, int], list[float]] = {}
    """By pair: wins, losses, ties, total weight, weighted wins plus half ties, weighted signed margins."""
    for opinion in said:
        weight = weights.get(opinion.annotator, 1.0)
        told_apart = dict.fromkeys(opinion.answers)
        for i, text in enumerate(opinion.answers):
            if text not in place:
                place[text] = len(place)
                policies.append(opinion.policies[i] if opinion.policies else "")
        ranks = dict(zip(reversed(opinion.answers), reversed(opinion.ranks), strict=True))
        left_out.add("answers with the same text as another to their prompt", len(opinion.answers) - len(told_apart))
        for one, other in combinations(told_apart, 2):
            first, second = (one, other) if place[one] < place[other] else (other, one)
            seen = counts.setdefault((place[first], place[second]), [0.0] * 6)
            won, lost = ranks[first] < ranks[second], ranks[first] > ranks[second]
            for index, more in enumerate(
                (
                    float(won),
                    float(lost),
                    float(not won and not lost),
                    weight,
                    weight * (1.0 if won else 0.0 if lost else 0.5),
                    weight * opinion.margin * (won - lost),
                )
            ):
                seen[index] += more
    pairs = []
    for (i, j), (wins, losses, ties, total, points, margins) in sorted(counts.items()):
        if not wins and not losses:
            left_out.add("pairs that everybody ties")
        elif not total:
            left_out.add("pairs ranked by people without a weight alone")
        else:
            pairs.append(Pair(i, j, int(wins), int(losses), int(ties), points / total, margins / total))
    return RankedPrompt(said[0].prompt, group, list(place), policies, pairs)


def is_validation(group: str, fraction: float) -> bool:
    """Whether a group's rows are held out from the training of a reward model.

    A salted hash of the group, read as a number in [0, 1), is below `fraction`. The salt makes it independent of the
    hash that selected the training texts.
    """
    return _place(group) < fraction


def _place(group: str) -> float:
    digest = hashlib.sha256(b"reward model\0" + group.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split(
    rows: Sequence[RankedPrompt], fraction: float, left_out: LeftOut
) -> tuple[list[RankedPrompt], list[RankedPrompt]]:
    """Training and validation rows. All rows of a group are on one side.

    If no group's hash is below `fraction`, the group with the smallest hash is held out. A validation prompt is not
    trained on even if it also occurs in another group. Nor is a validation answer that has no prompt.
    """
    groups = {row.group for row in rows}
    held_out = {group for group in groups if is_validation(group, fraction)}
    if not held_out and len(groups) > 1:
        held_out = {min(groups, key=_place)}
    validation = [row for row in rows if row.group in held_out]
    known = {what for row in validation for what in _identities(row)}
    training = [row for row in rows if row.group not in held_out and known.isdisjoint(_identities(row))]
    left_out.add("training prompts that are held out with another text", len(rows) - len(training) - len(validation))
    return training, validation


def _identities(row: RankedPrompt) -> list[str]:
    """What may not be on both sides of a split: the prompt, or without one, the answers."""
    return [_key(row.prompt)] if row.prompt else row.answers


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _rows(table: Table) -> Iterable[tuple[int, dict[str, Any]]]:
    for index in range(len(table)):
        yield index + 1, {name: plain(values[index]) for name, values in table.columns.items()}


def _ranking_rows(table: Table, source: str) -> list[wire.RankingRow]:
    rows = []
    for number, row in _rows(table):
        try:
            rows.append(wire.RankingRow.model_validate({k: v for k, v in row.items() if v is not None}))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"{source}, row {number}: no ranking ({where}: {first['msg']})") from None
    return rows


def _ranked(row: dict[str, Any], where: str) -> Opinion:
    prompt, answers, ranks = row["prompt"], row["answers"], row.get("ranks")
    if is_conversation(prompt):
        prompt = conversation(prompt, f"{where}, prompt")
    if (
        not isinstance(prompt, str | list)
        or not isinstance(answers, list)
        or len(answers) < 2
        or not all(isinstance(answer, str) for answer in answers)
    ):
        raise DataError(
            f"{where}: expected a string `prompt` and a list `answers` of at least two strings, best first; got "
            f"prompt={prompt!r:.60}, answers={answers!r:.60}"
        )
    if ranks is None:
        ranks = list(range(1, len(answers) + 1))
    elif not isinstance(ranks, list) or len(ranks) != len(answers) or not all(_is_whole(rank) for rank in ranks):
        raise DataError(
            f"{where}: ranks={ranks!r:.60} for {len(answers)} answers; give each one whole number, 1 for the best, "
            "equal numbers for ties"
        )
    _require_characters((prompt, *answers), where)
    return Opinion(prompt, _group(row, prompt), answers, ranks)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mostly_begin_apart(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether most of the pairs of texts without a prompt have no common beginning.

    Then the texts are not answers to prompts, and the few that both begin with "I" or "This movie" do so by chance.
    """
    pairs = [(row["chosen"], row["rejected"]) for row in rows if row.get("prompt") is None]
    beginnings = [_of_transcripts(*pair)[0] for pair in pairs if all(isinstance(text, str) for text in pair)]
    return 2 * sum(not beginning for beginning in beginnings) > len(beginnings)


def _preference(row: dict[str, Any], where: str, no_prompts: bool) -> Opinion:
    """A row with `chosen` and `rejected`. `no_prompts`: a common beginning of two texts is not their prompt."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if is_conversation(chosen) and is_conversation(rejected):
        before, *both = _of_conversations(chosen, rejected, prompt, where)
    elif isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
        whole = prompt is not None or no_prompts
        before, *both = (prompt or "", chosen, rejected) if whole else _of_transcripts(chosen, rejected)
    else:
        raise DataError(
            f"{where}: chosen={chosen!r:.40} and rejected={rejected!r:.40} with prompt={prompt!r:.40}; give all as "
            "texts, or all as conversations"
        )
    margin = row.get("margin")
    if margin is not None:
        try:
            margin = float(margin)
        except (TypeError, ValueError):
            raise DataError(f"{where}: margin={margin!r:.40} is no number") from None
        if not abs(margin) < float("inf"):
            raise DataError(f"{where}: margin={margin} is not finite")
    _require_characters((before, *both), where)
    ranks = [1, 1] if both[0] == both[1] else [1, 2]
    # Without a prompt, each row is its own group.
    group = _group(row, before if before else "".join(sorted(both)))
    return Opinion(before, group, both, ranks, margin=margin or 0.0)


def _of_conversations(chosen: Any, rejected: Any, prompt: Any, where: str) -> tuple[Prompt, str, str]:
    """The prompt and both answers: the assistant's last turns, and the conversation before them."""
    better, worse = conversation(chosen, f"{where}, chosen"), conversation(rejected, f"{where}, rejected")
    before: Conversation = []
    if better[0]["role"] == ASSISTANT and prompt is not None:
        before = (
            conversation(prompt, f"{where}, prompt")
            if is_conversation(prompt)
            else [{"role": "user", "content": str(prompt)}]
        )
    elif better[:-1] == worse[:-1]:
        before, better, worse = better[:-1], better[-1:], worse[-1:]
    if not before or len(better) != 1 or len(worse) != 1 or {better[0]["role"], worse[0]["role"]} != {ASSISTANT}:
        raise DataError(
            f"{where}: chosen has {len(better)} turns and rejected {len(worse)}; they must differ in the assistant's "
            "last turn alone, which follows on a prompt"
        )
    return before, better[0]["content"], worse[0]["content"]


def _of_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common beginning of two texts and both continuations, split after "Assistant:" or between words."""
    alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    alike = min(len(chosen), len(rejected)) if alike is None else alike
    speaker = chosen.rfind("\n\nAssistant:", 0, alike)
    if speaker >= 0:
        alike = speaker + len("\n\nAssistant:")
    else:
        while alike and not chosen[alike - 1 : alike + 1].startswith(" ") and not chosen[alike:].startswith(" "):
            alike -= 1
        alike -= chosen[:alike].endswith(" ")
    return chosen[:alike], chosen[alike:], rejected[alike:]


def _group(row: Mapping[str, Any], prompt: Prompt) -> str:
    group = row.get("group")
    if isinstance(group, str) and group:
        return group
    return wire.content_hash("group", prompt)


def _require_characters(texts: Iterable[Prompt], where: str) -> None:
    for text in texts:
        try:
            _key(text).encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: {text!r:.60} holds half a character (a lone surrogate); remove it") from None
