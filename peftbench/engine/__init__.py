"""Training and evaluation of packs of runs."""

VERSION = 3
"""Raised whenever a change to the engine changes results; part of every run's id."""
