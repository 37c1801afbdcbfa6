"""Runs a module as on macOS with an arm64 processor, as far as Linux can show that.

    python -m harness.other_system MODULE ...

There is no uvloop, no /proc, no glibc (malloc_trim, mallopt, prctl), no packet filter and no oneDNN. `sys.platform` is
darwin from then on; the libraries that look at it while they are imported have been imported before.
"""

import ctypes
import pathlib
import runpy
import sys
import sysconfig
from typing import Any

import accelerate  # noqa: F401
import datasets  # noqa: F401
import fastapi  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
import uvicorn  # noqa: F401

NOT_THERE = "/proc"
_library, _read_text, _write_text, _is_dir = (
    *(ctypes.CDLL, pathlib.Path.read_text),
    *(pathlib.Path.write_text, pathlib.Path.is_dir),
)


class _NoFunctions:
    """A C library that lacks what only glibc has."""


def library(name: str | None = None, *arguments: Any, **options: Any) -> Any:
    return _NoFunctions() if name is None else _library(name, *arguments, **options)


def read_text(path: pathlib.Path, *arguments: Any, **options: Any) -> str:
    if str(path).startswith(NOT_THERE):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return _read_text(path, *arguments, **options)


def write_text(path: pathlib.Path, *arguments: Any, **options: Any) -> int:
    if str(path).startswith(NOT_THERE):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return _write_text(path, *arguments, **options)


def is_dir(path: pathlib.Path, **options: Any) -> bool:
    return not str(path).startswith(NOT_THERE) and _is_dir(path, **options)


def main() -> None:
    ctypes.CDLL = library  # type: ignore[assignment,misc]
    pathlib.Path.read_text = read_text  # type: ignore[method-assign,assignment]
    pathlib.Path.write_text = write_text  # type: ignore[method-assign,assignment]
    pathlib.Path.is_dir = is_dir  # type: ignore[method-assign,assignment]
    sys.modules["uvloop"] = None  # type: ignore[assignment]
    torch.backends.mkldnn.is_available = lambda: False
    sysconfig.get_config_vars()  # a file that is named by the system
    sys.platform = "darwin"
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
