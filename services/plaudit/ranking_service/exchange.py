"""File formats of other projects: TRL, HH, summarize-from-feedback, and plain {"prompt", "answers"}.

All of them hold pairs of a better and a worse answer, without ties, skips or flags. The export reports how many ties it
dropped.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plaudit.wire import rankings as wire
from plaudit.wire.rankings import RankingRow, Turn

PairFormat = Literal["trl", "hh", "summarize"]
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
UNKNOWN = "imported"
"""The annotator of rows that name none."""
AT = "1970-01-01T00:00:00.000Z"
"""The time of rows that have none: a constant, so that importing a file twice changes nothing."""


@dataclass
class Dropped:
    """What an export left out."""

    ties: int = 0
    rows: int = 0
    """Skips, flags and withdrawn rankings."""


def pairs_of(rows: Iterable[RankingRow], form: PairFormat, dropped: Dropped) -> Iterator[dict[str, Any]]:
    """One object for each pair of a better and a worse answer. `dropped` counts what is left out."""
    for row in rows:
        if not row.ranks:
            dropped.rows += 1
            continue
        for i, j in itertools.combinations(row.shown_order, 2):
            if row.ranks[i] == row.ranks[j]:
                dropped.ties += 1
                continue
            yield _WRITERS[form](row, i, j)


def rows_of(objects: Iterable[Any], form: PairFormat | Literal["ranked"], batch: str) -> list[RankingRow]:
    """Rankings from objects of another project. Raises `ValueError` with the number of the first bad row."""
    rows: list[RankingRow] = []
    seen: dict[str, int] = {}
    for number, item in enumerate(objects, start=1):
        try:
            row = _READERS[form](item, batch)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"row {number}: {reason}; expected {EXPECTED[form]}") from None
        # A pair may be judged more than once; each judgement is taken as another person's.
        times = seen.get(row.id, 0)
        seen[row.id] = times + 1
        rows.append(row if not times else _another_person(row, times))
    return rows


EXPECTED: Mapping[str, str] = {
    "trl": 'strings or messages {"prompt", "chosen", "rejected"}, or messages without a prompt',
    "hh": '{"chosen", "rejected"} with turns that begin with "\\n\\nHuman:" and "\\n\\nAssistant:"',
    "summarize": '{"info": {"post"}, "summaries": [{"text"}, {"text"}], "choice": 0 or 1}',
    "ranked": '{"prompt", "answers"} with at least two answers, the best first',
}


def turns_of_hh(text: str) -> list[Turn]:
    """The turns of an HH transcript. Raises `ValueError` if it isn't one."""
    head, *rest = HH_TURN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if head or not rest:
        raise ValueError('the text does not begin with "\\n\\nHuman:" or "\\n\\nAssistant:"')
    return [Turn(role=HH_ROLES[who], content=said) for who, said in zip(rest[::2], rest[1::2], strict=True)]  # type: ignore[arg-type]


def hh_of_turns(prompt: str | Sequence[Turn], answer: str) -> str:
    """An HH transcript that ends with the answer. A prompt that is one text becomes the human's turn."""
    turns = [Turn(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    return _transcript([*turns, Turn(role="assistant", content=answer)])


def _transcript(turns: Sequence[Turn]) -> str:
    names = {"user": "Human", "assistant": "Assistant", "system": "Human"}
    return "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in turns)


def _better(row: RankingRow, i: int, j: int) -> tuple[str, str]:
    first, second = row.answers[i].text, row.answers[j].text
    return (first, second) if row.ranks[i] < row.ranks[j] else (second, first)


def _trl(row: RankingRow, i: int, j: int) -> dict[str, Any]:
    chosen, rejected = _better(row, i, j)
    if isinstance(row.prompt, str):
        return {"prompt": row.prompt, "chosen": chosen, "rejected": rejected}
    return {
        "prompt": wire.as_json(row.prompt),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _hh(row: RankingRow, i: int, j: int) -> dict[str, Any]:
    chosen, rejected = _better(row, i, j)
    return {"chosen": hh_of_turns(row.prompt, chosen), "rejected": hh_of_turns(row.prompt, rejected)}


def _summarize(row: RankingRow, i: int, j: int) -> dict[str, Any]:
    post = row.prompt if isinstance(row.prompt, str) else _transcript(row.prompt)
    return {
        "info": {"id": row.task, "post": post, "title": None, "subreddit": None},
        "summaries": [
            {"text": row.answers[k].text, "policy": row.answers[k].policy or None, "note": None} for k in (i, j)
        ],
        "choice": 0 if row.ranks[i] < row.ranks[j] else 1,
        "worker": row.annotator,
        "batch": row.batch,
        "split": {"train": "train", "held_out": "valid1"}[row.split],
        "extra": {"note": row.note} if row.note else {},
    }


_WRITERS = {"trl": _trl, "hh": _hh, "summarize": _summarize}


def _ranking(
    batch: str,
    prompt: str | list[Turn],
    answers: list[wire.Answer],
    ranks: list[int],
    *,
    annotator: str = UNKNOWN,
    split: wire.Split = "train",
) -> RankingRow:
    task = wire.new_answers_row(batch, prompt, answers, split=split)
    return RankingRow(
        id=wire.content_hash("imported", task.id, annotator, ranks),
        task=task.id,
        group=task.group,
        batch=batch,
        split=split,
        prompt=prompt,
        answers=answers,
        ranks=ranks,
        annotator=annotator,
        status="counted",
        shown_order=[i for i in range(len(answers)) if all(answers[i].text != other.text for other in answers[:i])],
        at=AT,
        version=1,
    )


def _another_person(row: RankingRow, times: int) -> RankingRow:
    annotator = f"{row.annotator}-{times + 1}"
    return row.model_copy(
        update={"annotator": annotator, "id": wire.content_hash("imported", row.task, annotator, row.ranks)}
    )


def _two(first: str, second: str, policies: tuple[str, str] = ("", "")) -> list[wire.Answer]:
    if first == second:
        raise ValueError("both answers are the same text")
    return [wire.new_answer(text, policy=policy) for text, policy in zip((first, second), policies, strict=True)]


def _from_trl(item: Any, batch: str) -> RankingRow:
    chosen, rejected = item["chosen"], item["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = item["prompt"]
        if not isinstance(prompt, str):
            raise ValueError("prompt is not a string, and chosen and rejected are")
        return _ranking(batch, prompt, _two(chosen, rejected), [1, 2])
    before = item.get("prompt", [])
    if not before:  # TRL's implicit prompt: what both conversations begin with
        before, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
        if item["rejected"][:-1] != before:
            raise ValueError("chosen and rejected differ before their last message")
    if len(chosen) != 1 or len(rejected) != 1:
        raise ValueError(f"chosen has {len(chosen)} messages and rejected {len(rejected)}; one each is taken")
    turns = [Turn.model_validate(turn) for turn in before]
    return _ranking(batch, turns, _two(chosen[0]["content"], rejected[0]["content"]), [1, 2])


def _from_hh(item: Any, batch: str) -> RankingRow:
    chosen, rejected = turns_of_hh(item["chosen"]), turns_of_hh(item["rejected"])
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last turn")
    if not chosen[:-1]:
        raise ValueError("there is one turn alone; a prompt and an answer are needed")
    return _ranking(batch, chosen[:-1], _two(chosen[-1].content, rejected[-1].content), [1, 2])


def _from_summarize(item: Any, batch: str) -> RankingRow:
    info = item["info"]
    prompt = info.get("post") or info.get("article")
    if not isinstance(prompt, str):
        raise ValueError("info has neither a post nor an article")
    first, second = item["summaries"]
    choice = item["choice"]
    if choice not in (0, 1):
        raise ValueError(f"choice is {choice!r}, not 0 or 1")
    policies = (first.get("policy") or "", second.get("policy") or "")
    answers = _two(first["text"], second["text"], policies)
    split: wire.Split = "train" if item.get("split", "train") == "train" else "held_out"
    ranks = [1, 2] if choice == 0 else [2, 1]
    return _ranking(batch, prompt, answers, ranks, annotator=item.get("worker") or UNKNOWN, split=split)


def _from_ranked(item: Any, batch: str) -> RankingRow:
    prompt, listed = item["prompt"], item["answers"]
    if not isinstance(prompt, str) or not isinstance(listed, list) or len(listed) < 2:
        raise ValueError(f"prompt is {prompt!r:.40} and answers are {listed!r:.40}")
    if len(set(listed)) != len(listed):
        raise ValueError("two answers are the same text")
    answers = [wire.new_answer(text) for text in listed]
    return _ranking(batch, prompt, answers, list(range(1, len(answers) + 1)))


_READERS = {"trl": _from_trl, "hh": _from_hh, "summarize": _from_summarize, "ranked": _from_ranked}


def lines(rows: Iterable[Any]) -> Iterator[str]:
    """JSON lines of models or plain objects."""
    for row in rows:
        yield (row.model_dump_json() if isinstance(row, RankingRow) else json.dumps(row, ensure_ascii=False)) + "\n"
