"""Hyperparameter search: one Optuna study a method, whose trials train side by side as a sweep's runs do.

Layout of `<results>/<sweep.name>/search/`: ``study.db`` (SQLite) or ``journal.log``, unless a database is named;
``best-<method>.yaml``, which ``sweep experiment=<file>`` runs again; ``report/``.

Every study has the user attributes ``method``, ``model``, ``task``, ``metric``, ``direction``, ``objectives``,
``space``, ``seed``, ``sampler``, ``pruner`` and ``fixed`` (what all trials have in common); every finished trial
``run_id``, ``status`` (its record's), ``seconds`` and ``step``. Parameters are named by their keys
(``train.learning_rate``), intermediate values are the validation metric by optimizer step.
"""

FOLDER = "search"
"""Beside ``runs`` in a search's results."""
STUDY_ATTRIBUTES = (
    *("method", "model", "task", "metric", "direction", "objectives"),
    *("space", "seed", "sampler", "pruner", "fixed"),
)
TRIAL_ATTRIBUTES = ("run_id", "status", "seconds", "step")
LOST = "lost"
"""The status of a trial whose worker is gone; another with its parameters stands in for it."""
