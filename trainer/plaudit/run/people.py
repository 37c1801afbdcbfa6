"""Waiting for people who rank."""

import time

from plaudit.run.progress import Counting
from plaudit.run.rankings import RankingAdmin, RankingsUnavailable
from plaudit.wire import rankings as wire


def wait_for_people(
    admin: RankingAdmin, batch: str, counting: Counting, *, patience_s: float, poll_s: float
) -> wire.BatchProgress:
    """Wait until nobody has anything left to do in the batch, or an administrator has closed it.

    `counting` shows how many rankings there are.

    Raises:
        RankingsUnavailable: people have not finished within `patience_s`, or the service is away.
    """
    deadline = time.monotonic() + patience_s
    counted = 0
    while True:
        progress = admin.progress(batch)
        counting.add(progress.counted - counted)
        counted = progress.counted
        if progress.complete or progress.closed_at is not None:
            return progress
        left = deadline - time.monotonic()
        if left <= 0:
            raise RankingsUnavailable(
                f"people have ranked {progress.counted} of {progress.wanted} in batch {batch!r} of {admin.url}, and "
                f"people_patience_s={patience_s:g} is over; go on when they are done"
            )
        counting.waiting(f"waiting for people: {progress.counted} of {progress.wanted} rankings in batch {batch}")
        time.sleep(min(poll_s, left))
