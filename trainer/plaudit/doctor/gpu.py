"""The torch build against the GPU's driver, and bitsandbytes against both. By files and nvidia-smi, without torch."""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from plaudit.doctor.findings import Finding, note, ok, output_of, wrong

DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""The oldest Linux driver for each major version of CUDA (NVIDIA's table of minor-version compatibility)."""
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
CPU_LIBRARY = "libbitsandbytes_cpu"


def check_gpu(timeout_s: float) -> Iterator[Finding]:
    """Whether the installed torch can use the GPUs that the driver shows."""
    build = torch_build()
    if build is None:
        yield wrong("gpu", "torch is not installed", "pip install 'plaudit[trainer]'")
        return
    version, cuda = build
    driver = driver_of(timeout_s)
    if isinstance(driver, str):
        if Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists():
            yield wrong("gpu", f"there is an NVIDIA driver, and nvidia-smi fails: {driver}", "nvidia-smi")
        else:
            yield note("gpu", f"torch {version}; no NVIDIA GPU here, so everything runs on the CPU")
        return
    names, found = driver
    shown = f"{', '.join(names)}, driver {'.'.join(map(str, found))}"
    if cuda is None:
        newest = max(major for major, oldest in DRIVERS.items() if found >= oldest or major == min(DRIVERS))
        yield wrong(
            "gpu",
            f"{shown}, but torch {version} is a build for CPUs",
            f"pip install --force-reinstall torch --index-url {_index(newest)}",
        )
        return
    oldest = DRIVERS.get(int(cuda.partition(".")[0]))
    if oldest is not None and found < oldest:
        fitting = max((major for major, least in DRIVERS.items() if found >= least), default=None)
        mend = f"install driver {'.'.join(map(str, oldest))} or newer"
        if fitting is not None:
            mend += f", or: pip install --force-reinstall torch --index-url {_index(fitting)}"
        yield wrong("gpu", f"{shown}, is too old for torch {version}, which is built for CUDA {cuda}", mend)
        return
    yield ok("gpu", f"{shown}; torch {version} is built for CUDA {cuda}")


def check_bitsandbytes(timeout_s: float, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether bitsandbytes has a native library for torch's CUDA, or for the one that BNB_CUDA_VERSION names."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or not spec.submodule_search_locations:
        yield note(
            "bitsandbytes",
            "not installed; only --model.quantization needs it",
            "pip install 'plaudit[trainer]'",
        )
        return
    folder, version = Path(next(iter(spec.submodule_search_locations))), _version("bitsandbytes")
    files = [path.stem for path in folder.glob("libbitsandbytes_*") if path.suffix in (".so", ".dll", ".dylib")]
    built = sorted({match[1] for name in files if (match := re.fullmatch(r"libbitsandbytes_cuda(\d+)", name))}, key=int)
    build = torch_build()
    cuda = None if build is None else build[1]
    has_gpu = not isinstance(driver_of(timeout_s), str)
    named = environment.get("BNB_CUDA_VERSION")
    if not has_gpu or cuda is None:
        if CPU_LIBRARY in files:
            yield ok("bitsandbytes", f"{version}, with its native library for CPUs")
        else:
            yield wrong(
                "bitsandbytes",
                f"{version} has no native library for CPUs in {folder}",
                "pip install --force-reinstall --no-deps bitsandbytes",
            )
        return
    wanted = named or cuda.replace(".", "")
    there = f"its native libraries are for CUDA {', '.join(f'{v[:-1]}.{v[-1]}' for v in built) or 'none'}"
    if wanted in built:
        by = " (BNB_CUDA_VERSION)" if named else ""
        yield ok("bitsandbytes", f"{version}, with a native library for CUDA {wanted[:-1]}.{wanted[-1:]}{by}")
    elif named:
        yield wrong("bitsandbytes", f"{version}: BNB_CUDA_VERSION={named}, but {there}", "unset BNB_CUDA_VERSION")
    else:
        same_major = [v for v in built if v[:-1] == wanted[:-1]]
        mend = "pip install -U bitsandbytes"
        mend += f", or: export BNB_CUDA_VERSION={same_major[-1]}" if same_major else ""
        yield wrong("bitsandbytes", f"{version} can't use the GPU: torch is built for CUDA {cuda}, and {there}", mend)


def check_by_running() -> Iterator[Finding]:
    """Import torch, compute on the GPU, load bitsandbytes: what the other checks only conclude."""
    try:
        import torch

        if not torch.cuda.is_available():
            yield note("gpu", f"torch {torch.__version__} imports and sees no GPU")
        else:
            product = torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
            assert product.sum().item() == 512
            yield ok("gpu", f"torch {torch.__version__} computes on {torch.cuda.get_device_name()}")
    except Exception as error:
        yield wrong("gpu", f"torch can't compute: {_first_line(error)}", "pip install --force-reinstall torch")
    try:
        import bitsandbytes.cextension as native

        loaded = str(getattr(native.lib, "_lib", native.lib))
        yield ok("bitsandbytes", f"its native library is loaded: {loaded:.80}")
    except Exception as error:
        yield wrong("bitsandbytes", f"can't be loaded: {_first_line(error)}", "python -m bitsandbytes")


def torch_build() -> tuple[str, str | None] | None:
    """The version of torch and of the CUDA that it is built for, from its files; None if it isn't installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations)), "version.py")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    cuda = re.search(r"^cuda\b[^=\n]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return _version("torch"), cuda[1] if cuda else None


def driver_of(timeout_s: float) -> tuple[list[str], tuple[int, int]] | str:
    """The GPUs' names and the driver's version (major, minor), as nvidia-smi tells; or why it doesn't."""
    worked, text = output_of(QUERY, timeout_s)
    if not worked:
        return text
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.strip()]
    try:
        names = [row[0] for row in rows]
        major, minor = rows[0][1].split(".")[:2]
        return names, (int(major), int(minor))
    except (IndexError, ValueError):
        return f"its answer can't be read: {text.strip():.60}"


def _index(major: int) -> str:
    return f"https://download.pytorch.org/whl/{ {11: 'cu118', 12: 'cu126', 13: 'cu130'}[major] }"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
