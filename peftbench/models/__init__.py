"""Backbones: where their files are (`source`), loading them frozen (`load`), and the roles of their parts (`roles`)."""
