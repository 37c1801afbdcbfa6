"""The stages, one module for each command."""
