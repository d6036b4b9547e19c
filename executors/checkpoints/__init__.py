"""Checkpoints of a run: written whole or not at all, read back into any layout."""
