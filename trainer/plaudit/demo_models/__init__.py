"""The embedded models: a policy and a reward model in miniature. They travel with the package."""

from pathlib import Path

HERE = Path(__file__).parent


def resolve(model: str | Path) -> str:
    """The directory of the embedded model of this name; any other name, or a directory that exists, as it is.

    `imdb-gpt2-mini` and `models/imdb-gpt2-mini`, its path in a checkout, are the same model. So is its path in another
    environment, which adapters trained there remember.
    """
    path = Path(model)
    embedded = HERE / path.name
    is_name = path.parent in (Path(), Path("models")) or path.parts[-3:-1] == HERE.parts[-2:]
    if path.exists() or not is_name or not (embedded / "config.json").is_file():
        return str(model)
    return str(embedded)
