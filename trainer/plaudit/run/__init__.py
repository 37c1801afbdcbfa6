"""Infrastructure of a run: checkpoints, metrics, files, signals, progress, and the ranking service's client."""
