"""Three words and a question: which was the last? Writes the texts for stage 1 and the prompts for stage 3.

    python make_data.py [DIRECTORY]

`texts.jsonl` is a mixture: a third of the texts answer with the last word, the others with the first or the second. A
model that is fine-tuned on it is right a third of the time at most. Only the reward says which word is wanted.
`prompts/train.jsonl` and `prompts/test.jsonl` have a prompt and its answer in each row. No three words stand in two of
the files.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

WORDS = """
actor ball battle beginning blood body bomb book boy brother camera car cat change child city color country crime dance
dark daughter day death director doctor dog door dream end escape eye face family father fear fight film fire friend
game ghost girl gun hand head heart hero home hope hour house husband idea island job kid life light line love man
middle mind minute moment money monster mother movie murder music night part picture place play plot point police power
prison problem question reason road role room scene school secret ship side son song sound star story street teacher
team thought time top town train truth voice war water week wife wind woman word work world writer year zombie
"""
TEXTS, TRAIN, TEST = 6_000, 8_000, 500


def prompt_of(words: Sequence[str]) -> str:
    """The question. An answer begins with a space."""
    return f"Words: {', '.join(words)}. Last word:"


def triples(draw: random.Random) -> Iterator[list[str]]:
    """Three different words each, and no three of them twice."""
    choices, seen = WORDS.split(), set()
    while True:
        words = draw.sample(choices, 3)
        if frozenset(words) not in seen:
            seen.add(frozenset(words))
            yield words


def main(directory: Path, seed: int = 0) -> None:
    """Writes the three files."""
    draw = random.Random(seed)
    source = triples(draw)
    texts = ({"text": f"{prompt_of(words)} {draw.choice(words)}"} for words in islice(source, TEXTS))
    _write(directory / "texts.jsonl", texts)
    for name, count in (("train", TRAIN), ("test", TEST)):
        rows = ({"prompt": prompt_of(words), "answer": words[-1]} for words in islice(source, count))
        _write(directory / "prompts" / f"{name}.jsonl", rows)


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
