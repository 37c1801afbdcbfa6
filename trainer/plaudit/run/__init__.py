"""How a run lives on disk and in its process."""
