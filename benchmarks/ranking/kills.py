"""Rankings under load with kills: nothing may be lost, doubled or given out twice, on both databases.

    python -m benchmarks.ranking.kills [--people 50] [--tasks 600] [--kills 3] [--only sqlite]

A quarter of the tasks wants three people, so 600 tasks are 900 rankings. Everybody ranks without a pause, a fifth of
the submits is sent twice at the same moment, and the service gets SIGKILL several times. The disk's fsync rate stands
beside the times: on SQLite and on PostgreSQL every ranking waits for the disk.
"""

import argparse
import platform
import tempfile
from pathlib import Path

from harness.load.rankings import Account, fsync_rate, storm
from harness.machine.postgres import PostgresServer
from harness.ranking_service import RankingService

COLUMNS = (
    *("database", "rankings", "doubled", "lost", "duplicated", "over", "twice", "wrong"),
    *("a second", "p50 of a submit", "p95", "fsyncs a second"),
)


def main() -> None:
    """Run on the databases that were asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--tasks", type=int, default=600)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--only", choices=["sqlite", "postgresql"])
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {options.people} people, {options.kills} kills")
    print(f"| {' | '.join(COLUMNS)} |")
    print("| --- " * len(COLUMNS) + "|")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rate = fsync_rate(directory)
        if options.only != "postgresql":
            print(line("SQLite", run(str(directory / "rankings.db"), options), rate), flush=True)
        if options.only != "sqlite":
            server = PostgresServer(durable=True)
            try:
                print(line("PostgreSQL", run(server.url(), options), rate), flush=True)
            finally:
                server.remove()


def run(database: str, options: argparse.Namespace) -> Account:
    """One storm on a fresh service."""
    service = RankingService(database)
    try:
        return storm(service, people=options.people, tasks=options.tasks, kills=options.kills)
    finally:
        service.kill()


def line(database: str, account: Account, rate: float) -> str:
    """A row of the table."""
    counts = (account.rankings, account.doubled, *account.faults)
    speed = account.rankings / account.seconds
    times = f"{account.quantile_ms(0.5):.0f} ms | {account.quantile_ms(0.95):.0f} ms"
    return f"| {database} | {' | '.join(map(str, counts))} | {speed:.0f} | {times} | {rate:.0f} |"


if __name__ == "__main__":
    main()
