"""Records → frames, statistics, tables, figures, report: pure functions that never import torch."""
