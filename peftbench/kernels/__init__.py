"""Numerical kernels: a plain PyTorch reference of each."""
