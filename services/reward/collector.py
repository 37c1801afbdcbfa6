"""Python's garbage collector, kept from looking through a quarter of a million objects of torch and transformers.

A full collection of them holds up every request for a quarter of a second. They are there to stay, so it need not look
at them; but a model that a reload replaces must be looked at once more, or it would stay in memory for good.
"""

import gc

SETTLE_S = 60.0
"""After a reload: when the last request for the old model is surely over."""


def settle() -> None:
    """Collect what is garbage now, and never look again at what isn't."""
    gc.unfreeze()  # what was still in use the last time, after two reloads in a row
    gc.collect()
    gc.freeze()


def unsettle() -> None:
    """Look at everything again."""
    gc.unfreeze()
