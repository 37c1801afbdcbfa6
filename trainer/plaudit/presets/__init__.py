"""Preset settings as YAML files, installed with the package."""

from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def find(path: Path) -> Path:
    """The YAML file of the preset with this name. Paths of existing files, and all other paths, are returned unchanged.

    `demo`, `demo.yaml` and `presets/demo.yaml` (its path in a checkout) are the same preset.
    """
    preset = HERE / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.is_file() or path.parent not in (Path(), Path("presets")) or not preset.is_file():
        return path
    return preset
