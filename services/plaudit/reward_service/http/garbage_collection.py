"""Settings of Python's garbage collector for short pauses.

torch and transformers make a quarter of a million objects that live as long as the process. A full collection visits
them all and stops every request for a quarter of a second, so they are frozen: moved out of the collector's sight. A
reload replaces the model, so they are unfrozen for a while, or the old model would never be freed.

Requests make no reference cycles, so the collector finds nothing among their objects. A full queue holds about a
hundred objects a request; young collections visit them, and full ones are made rare.

Failure modes: a pause of all requests; a replaced model that stays in memory.
"""

import gc

FREEZE_AFTER_S = 60.0
"""How long after a reload to freeze again: by then the last request to the old model is answered."""
THRESHOLDS = (700, 3, 1000)
"""Thresholds of generations 0, 1 and 2: new objects, generation-0 collections, generation-1 collections."""


def freeze() -> None:
    """Collect the garbage, and exclude every object that is left from later collections."""
    gc.set_threshold(*THRESHOLDS)
    gc.unfreeze()  # after two reloads in a row, a model may still be frozen
    gc.collect()
    gc.freeze()


def unfreeze() -> None:
    """Include all objects in collections again."""
    gc.unfreeze()
