"""Checks of the environment, one file a subject. Nothing here imports torch unless it is asked to."""
