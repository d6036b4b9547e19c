"""Frozen weights in few bits: their formats, how they are made, and where they come from."""
