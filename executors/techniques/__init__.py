"""Techniques as changes to the module that runs; one file per technique."""
