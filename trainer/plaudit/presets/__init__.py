"""Recorded settings, as YAML files. They travel with the package."""

from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def find(path: Path) -> Path:
    """The file of the preset of this name; a file that exists, and any other path, as it is.

    `demo`, `demo.yaml` and `presets/demo.yaml`, its path in a checkout, are the same preset.
    """
    preset = HERE / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.is_file() or path.parent not in (Path(), Path("presets")) or not preset.is_file():
        return path
    return preset
