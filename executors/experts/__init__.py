"""Mixtures of experts: routing, rows in expert order, grouped matmuls, exchange between ranks."""
