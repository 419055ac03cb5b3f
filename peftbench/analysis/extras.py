"""Libraries of the extra `stats`, imported where they are used: a report without them says what it leaves out."""

import importlib
import importlib.util
from typing import Any

from peftbench.errors import UserError

LIBRARIES = {"moocore": "moocore", "scikit_posthocs": "scikit-posthocs", "statsmodels": "statsmodels"}
"""Module → distribution."""
INSTALL = "pip install 'peftbench[stats]'"


def load(module: str) -> Any:
    """Import a module of the extra, such as ``statsmodels.stats.multitest``.

    Raises:
        UserError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        raise UserError(
            f"statistics need {LIBRARIES.get(top, top)}, which cannot be imported ({error}); {INSTALL}"
        ) from error


def missing() -> list[str]:
    """Return the distributions of the extra that are not installed."""
    return [name for module, name in LIBRARIES.items() if importlib.util.find_spec(module) is None]
