"""The result files of `benchmarks.gpu.run` as the tables of docs/evidence/gpu.md.

    python -m benchmarks.gpu.render OUT                     prints them
    python -m benchmarks.gpu.render OUT --into docs/evidence/gpu.md  puts them between that file's two marks

Failure modes: a table doesn't say on which card, with which versions, or that something is missing.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
ORDER = ("right", "epoch", "where", "service", "size", "two")
TITLES = {
    "right": "Right?",
    "epoch": "One IMDB epoch",
    "where": "Where the time goes",
    "service": "The reward service on the card",
    "size": "Size",
    "two": "Two processes on one card",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, help="a Markdown file with the two marks")
    arguments = parser.parse_args()
    text = render(arguments.results)
    if arguments.into is None:
        sys.stdout.write(text)
    else:
        arguments.into.write_text(between_marks(arguments.into.read_text(), text))


def render(directory: Path) -> str:
    """All tables of a directory of results."""
    machine = _read(directory / "machine.json")
    lines = [_said_of_the_machine(machine), ""]
    lines += [_table(machine["sections"].get("parts", [])), ""]
    for part in ORDER:
        path = directory / f"{part}.json"
        if not path.is_file():
            continue
        found = _read(path)
        state = "" if found["state"] == "done" else f" ({found['state']})"
        lines += [f"### {TITLES[part]}{state}", ""]
        for section, rows in found["sections"].items():
            lines += [f"{section[:1].upper()}{section[1:]}:", "", _table(rows), ""]
    return "\n".join(lines)


def between_marks(document: str, text: str) -> str:
    """The document with `text` between its marks. `ValueError` if it has none."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for the tables: the document lacks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def _said_of_the_machine(found: Mapping[str, Any]) -> str:
    about = found["sections"]["machine"][0]
    card = about["card"] if about.get("card", "none") != "none" else "no GPU: a rehearsal on the CPU"
    named = [card, *(about[name] for name in ("card_memory",) if name in about)]
    named += [f"driver {about['driver']}, CUDA {about['cuda']}"] if "driver" in about else []
    named += [f"torch {about['torch']}", f"transformers {about['transformers']}", f"Python {about['python']}"]
    sizes = " Tiny sizes: the numbers say nothing." if about.get("tiny") else ""
    return f"{', '.join(named)}, {about['cpus']} CPU cores.{sizes}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        return "nothing"
    numeric = {name for name in columns if all(isinstance(row.get(name, 0), int | float) for row in rows)}
    numeric -= {name for name in columns if any(isinstance(row.get(name), bool) for row in rows)}
    lines = [f"| {' | '.join(_heading(name) for name in columns)} |"]
    lines += [f"| {' | '.join('---:' if name in numeric else '---' for name in columns)} |"]
    lines += [f"| {' | '.join(_cell(row.get(name, '')) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def _heading(name: str) -> str:
    units = {"_ms": ", ms", "_s": ", s", "_gib": ", GiB", "_mib": ", MiB", "_per_s": "/s", "_tflops": ", TFLOP/s"}
    for ending in sorted(units, key=len, reverse=True):
        if name.endswith(ending):
            return f"{name.removesuffix(ending)}{units[ending]}".replace("_", " ")
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return " ".join(str(value).split()).replace("|", "\\|")


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
