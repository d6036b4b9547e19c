"""Measuring a run: live tensors, collectives, where the time went, and the report of it all."""
