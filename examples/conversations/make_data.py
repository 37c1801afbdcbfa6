"""Conversations about films. Writes one file for each stage, and one to judge the judge with.

    python make_data.py [DIRECTORY]

| file | a row | for |
| --- | --- | --- |
| `talks.jsonl` | `messages`: system, user, assistant; half of the answers praise | `plaudit sft` |
| `preferences.jsonl` | `prompt` (messages), `chosen`, `rejected`: people prefer praise | `plaudit reward-model` |
| `held_out.jsonl` | the same, about other films | `plaudit evaluate-judge` |
| `prompts/train.jsonl`, `prompts/test.jsonl` | `messages` of the user alone | `plaudit ppo`, `plaudit evaluate` |

No film is in two of the files.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

SYSTEM = "Answer in one sentence."
FIRST = "old young lost last first little secret silent broken perfect dark blue small lonely happy angry"
HEROES = "doctor teacher soldier writer mother father brother sister captain king queen dancer singer actor detective"
PLACES = "house city school prison island war forest river train ship street hotel hospital village theater"
PRAISE = "wonderful great beautiful brilliant excellent perfect amazing lovely fantastic"
BLAME = "terrible annoying pathetic horrible ridiculous tedious awful disappointing boring"
THINGS = "story acting music script ending cast film"
TALKS, PREFERENCES, HELD_OUT, TRAIN, TEST = 1_500, 400, 100, 1_024, 200

Message = dict[str, str]


def films(draw: random.Random) -> Iterator[str]:
    """Titles, each once."""
    titles = [f"The {a} {b} of the {c}" for a, b, c in product(FIRST.split(), HEROES.split(), PLACES.split())]
    draw.shuffle(titles)
    return iter(titles)


def question(film: str) -> Message:
    """What the user asks."""
    return {"role": "user", "content": f"How did you like {film}?"}


def answer(draw: random.Random, *, praise: bool) -> str:
    """A sentence that praises a film, or doesn't."""
    words = (PRAISE if praise else BLAME).split()
    return f"The {draw.choice(THINGS.split())} was {draw.choice(words)} and the whole was {draw.choice(words)}."


def talk(draw: random.Random, film: str) -> dict[str, Any]:
    """A whole conversation."""
    said = answer(draw, praise=draw.random() < 0.5)
    return {"messages": [{"role": "system", "content": SYSTEM}, question(film), {"role": "assistant", "content": said}]}


def preference(draw: random.Random, film: str) -> dict[str, Any]:
    """A prompt with the answer that people prefer and the other one."""
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, question(film)],
        "chosen": [{"role": "assistant", "content": answer(draw, praise=True)}],
        "rejected": [{"role": "assistant", "content": answer(draw, praise=False)}],
    }


def main(directory: Path, seed: int = 0) -> None:
    """Writes the files."""
    draw = random.Random(seed)
    titles = films(draw)
    _write(directory / "talks.jsonl", (talk(draw, film) for film in islice(titles, TALKS)))
    _write(directory / "preferences.jsonl", (preference(draw, film) for film in islice(titles, PREFERENCES)))
    _write(directory / "held_out.jsonl", (preference(draw, film) for film in islice(titles, HELD_OUT)))
    for name, count in (("train", TRAIN), ("test", TEST)):
        rows = ({"messages": [question(film)]} for film in islice(titles, count))
        _write(directory / "prompts" / f"{name}.jsonl", rows)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
