"""Modules of one's own to plan and run: `forerun plan --model examples.mixer:build ...`."""
