"""The commands behind ``python -m peftbench``, one module each."""
