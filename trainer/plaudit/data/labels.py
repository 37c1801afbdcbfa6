"""The meaning of a label column: which value is which label of a classifier, told with the number of rows of each.

Failure modes: stars read as indices of names, so that four stars teach something else than good; values that are left
out without a message.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from plaudit.data.sources import Label
from plaudit.errors import ConfigError

V = TypeVar("V")
NEGATIVE_POSITIVE = ("NEGATIVE", "POSITIVE")
"""The default names. Only with these are stars and common words understood."""
NEGATIVE_WORDS = frozenset({"negative", "neg", "bad", "no", "dislike", "down", "unhappy", "thumbs down"})
POSITIVE_WORDS = frozenset({"positive", "pos", "good", "yes", "like", "up", "happy", "thumbs up"})
NEUTRAL_WORDS = frozenset({"neutral", "mixed", "neither", "none"})


@dataclass(frozen=True)
class LabelReading:
    """The mapping from values of a label column to label names."""

    names: tuple[str, ...]
    index: Mapping[str, int]
    """Keys are values as text (see `spelled`). Rows with other values are left out."""
    class_names: tuple[str, ...] | None = None
    explanation: str = ""
    """How the values were read, if that is not obvious."""

    def lines(self, labels: Sequence[Label]) -> list[str]:
        """A summary for people: each value with its name and number of rows, and names without rows."""
        counts = Counter(spelled(label) for label in labels)
        lines = [self.explanation] if self.explanation else []
        for value, i in sorted(self.index.items(), key=lambda entry: (entry[1], entry[0])):
            own = f" ({self.class_names[int(value)]})" if self.class_names and value.isdigit() else ""
            lines.append(f"label {value}{own} is {self.names[i]}: {counts[value]} rows")
        lines += [
            f"label {value} is left out: {counts[value]} rows" for value in sorted(counts) if value not in self.index
        ]
        unused = [name for i, name in enumerate(self.names) if i not in self.index.values()]
        return lines + [f"label {name}: no row, so nothing can be learnt about it" for name in unused]


def spelled(label: Label) -> str:
    """A label as text: whole numbers without a decimal point, true and false as 1 and 0."""
    text = str(label).strip()
    if text.lower() in ("true", "false"):
        return "1" if text.lower() == "true" else "0"
    return text.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text


def read_labels(
    labels: Sequence[Label],
    names: Sequence[str],
    class_names: Sequence[str] | None = None,
    label_map: Sequence[str] = (),
) -> LabelReading:
    """The meaning of the labels: names, or indices of names from 0; or what `label_map` (VALUE=NAME) says.

    If they could be either, they are names if all of them are. `class_names` are the source's own names of 0, 1, ...;
    if they are the same words in another order, they are matched by word, not by position. With the default names,
    stars and common words are understood as well.

    Raises:
        ConfigError: a label has no meaning; some are names and all of them could be numbers; or only one is left.
    """
    names = tuple(names)
    values = sorted({spelled(label) for label in labels})
    if len(values) < 2:
        raise ConfigError(
            f"every text has the label {', '.join(values)}: a classifier learns nothing from one label; add texts with "
            "another, or name another column with --label-column"
        )
    if label_map:
        return _with_two(LabelReading(names, _mapped(values, names, label_map)))
    by_name = {value: names.index(value) for value in values if value in names}
    by_number = {value: int(value) for value in values if value.isdigit() and int(value) < len(names)}
    if len(by_name) == len(values):
        return LabelReading(names, by_name)
    if len(by_number) < len(values):
        understood = (_words(values) or _stars(values)) if names == NEGATIVE_POSITIVE else None
        if understood is not None:
            return _with_two(understood)
        unknown = [value for value in values if value not in by_name and value not in by_number]
        raise ConfigError(
            f"labels {', '.join((unknown or values)[:5])} are neither numbers below {len(names)} nor among "
            f"label_names={', '.join(names)}; give --label-names in the order of the labels, or say what each value "
            f"means, as in --label-map {values[0]}={names[0]} {values[-1]}={names[-1]} (others are left out)"
        )
    if by_name:
        as_numbers = ", ".join(f"{value} is {names[i]!r}" for value, i in by_number.items())
        as_names = ", ".join(f"{value} is {names[i]!r}" for value, i in by_name.items())
        raise ConfigError(
            f"labels {', '.join(values)} with label_names={', '.join(names)} can be read in two ways: as numbers that "
            f"count the names from 0 ({as_numbers}), or as the names ({as_names}, the others unknown); give names "
            "that are no numbers, in the order of the labels"
        )
    if class_names is not None:
        own, wanted = ([name.casefold() for name in some] for some in (class_names, names))
        if set(own) & set(wanted):
            missing = [class_names[i] for i in by_number.values() if own[i] not in wanted]
            if missing:
                raise ConfigError(
                    f"the data call labels {', '.join(class_names)}, and label_names={', '.join(names)} lacks "
                    f"{', '.join(missing)}: give --label-names {' '.join(class_names)}"
                )
            by_number = {value: wanted.index(own[i]) for value, i in by_number.items()}
    return LabelReading(names, by_number, None if class_names is None else tuple(class_names))


def _mapped(values: Sequence[str], names: tuple[str, ...], label_map: Sequence[str]) -> dict[str, int]:
    """The index of each value that `label_map` names. Raises `ConfigError` for a value or a name that isn't there."""
    index = {}
    for entry in label_map:
        value, _, name = entry.rpartition("=")
        value = spelled(value)
        if name not in names:
            raise ConfigError(f"label_map={entry!r}: {name!r} is not among label_names={', '.join(names)}")
        if value not in values:
            raise ConfigError(f"label_map={entry!r}: no row has the label {value!r}; there are {', '.join(values[:9])}")
        index[value] = names.index(name)
    return index


def _stars(values: Sequence[str]) -> LabelReading | None:
    """Numbers as ratings: two values, values on both sides of 0, 0 to 4, up to five stars, or up to ten."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        return None
    lowest, highest = min(numbers.values()), max(numbers.values())
    if len(numbers) == 2:
        return _split(numbers, lambda n: n == lowest, lambda n: n == highest, "the higher of two labels is POSITIVE")
    if lowest < 0 < highest:
        return _split(numbers, lambda n: n < 0, lambda n: n > 0, "labels are numbers around 0")
    if lowest == 0 and highest == 4:
        return _split(numbers, lambda n: n < 2, lambda n: n > 2, "labels are ratings from 0 to 4")
    if lowest >= 0 and 4 <= highest <= 5:
        return _split(numbers, lambda n: n < 3, lambda n: n > 3, "labels are up to five stars")
    if lowest >= 0 and 5 < highest <= 10:
        return _split(numbers, lambda n: n < 5, lambda n: n > 6, "labels are points up to ten")
    return None


def _words(values: Sequence[str]) -> LabelReading | None:
    """Common words for good and bad, in any case."""
    folded = {value: value.casefold() for value in values}
    if not set(folded.values()) <= NEGATIVE_WORDS | POSITIVE_WORDS | NEUTRAL_WORDS:
        return None
    return _split(folded, NEGATIVE_WORDS.__contains__, POSITIVE_WORDS.__contains__, "labels are words")


def _split(
    values: Mapping[str, V], negative: Callable[[V], bool], positive: Callable[[V], bool], what: str
) -> LabelReading:
    index = {value: 0 for value, read in values.items() if negative(read)}
    index |= {value: 1 for value, read in values.items() if positive(read)}
    return LabelReading(NEGATIVE_POSITIVE, index, explanation=f"{what}; --label-map says otherwise if that is wrong")


def _with_two(reading: LabelReading) -> LabelReading:
    if len(set(reading.index.values())) < 2:
        there = ", ".join(reading.index) or "no value"
        raise ConfigError(
            f"only {there} would be learnt, all as one label, and a classifier learns nothing from one; say what each "
            "value means, as in --label-map 1=NEGATIVE 5=POSITIVE"
        )
    return reading
