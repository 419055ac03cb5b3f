"""Training and evaluation of packs of runs."""

VERSION = 4
"""Raised whenever a change to the engine changes results; part of every run's id."""
