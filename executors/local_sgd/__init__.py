"""Replicas that train apart and meet every so many steps (`forerun.local_sgd`)."""

from .outer import Outer

__all__ = ["Outer"]
