"""Service times of judges that were measured, by name, and from a user's own numbers.

Failure modes: a table of another machine. Each says where it was measured; `--times` takes the user's own.
"""

import json
from pathlib import Path

from plaudit.errors import ConfigError
from plaudit.sizing.service_times import ServiceTimes

JUDGES = {
    # One core of a Xeon with AVX-512, fp32 (benchmarks.fleet.calibrate; docs/evidence/reward-speed.md for the base).
    "imdb-distilbert-mini": ServiceTimes(
        ((16.0, 0.00098), (64.0, 0.0012), (256.0, 0.00271), (512.0, 0.0045), (992.0, 0.00825)),
        front_s=0.0008,
        front_text_s=3.5e-5,
        one_core=True,
    ),
    # 21.3 texts of 57 tokens a second alone, 32.5 in batches.
    "distilbert-base": ServiceTimes(((57.0, 0.047), (1024.0, 0.554)), front_s=0.0005, front_text_s=5e-5, one_core=True),
    # The same in int8: 51.5 alone, 76.1 in batches.
    "distilbert-base-int8": ServiceTimes(
        ((57.0, 0.0194), (1024.0, 0.236)), front_s=0.0005, front_text_s=5e-5, one_core=True
    ),
    # An H100, fp16: 32,000 texts of 57 tokens a second without tokenising, 6,900 with it (docs/evidence/gpu.md).
    "distilbert-base-h100": ServiceTimes(((57.0, 0.004), (16_384.0, 0.0129)), front_s=0.0003, front_text_s=1.1e-4),
}
"""The judge's name, and its times for a replica of one core or one GPU."""


def judge_times(name: str) -> ServiceTimes:
    """The times of a judge of `JUDGES`, or of a JSON file: {"table": [[tokens, seconds], …], "front_s": …}.

    Raises:
        ConfigError: there is no such judge, or the file is none.
    """
    if name in JUDGES:
        return JUDGES[name]
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"judge={name!r} is neither a file nor one of {', '.join(JUDGES)}")
    try:
        return ServiceTimes.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'judge={name} is no file of service times ({error}): write {{"table": [[64, 0.01], [1024, 0.1]]}}, '
            "tokens of a batch and its seconds"
        ) from error
