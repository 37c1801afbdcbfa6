"""Python's garbage collector, kept from looking through a quarter of a million objects of torch and transformers.

A full collection of them holds up every request for a quarter of a second. They are there to stay, so it need not look
at them; but a model that a reload replaces must be looked at once more, or it would stay in memory for good.

Requests leave nothing to collect: what they made goes with the last reference. So what waits in a full queue, a hundred
objects a request, is looked at through small collections, and through full ones hardly ever.
"""

import gc

FREEZE_AFTER_S = 60.0
"""After a reload: when the last request for the old model is surely over."""
THRESHOLDS = (700, 3, 1000)
"""New objects before a small collection, small ones before a middle one (milliseconds), those before a full one."""


def freeze() -> None:
    """Collect what is garbage now, and never look again at what isn't."""
    gc.set_threshold(*THRESHOLDS)
    gc.unfreeze()  # what was still in use the last time, after two reloads in a row
    gc.collect()
    gc.freeze()


def unfreeze() -> None:
    """Look at everything again."""
    gc.unfreeze()
