"""Import a library that only some calls need, inside the call that needs it."""

from __future__ import annotations

import importlib
from typing import Any

from inflight_edge.errors import DependencyError

__all__ = ["require"]


def require(module: str, remedy: str) -> Any:
    """Import ``module`` and return it.  Raises DependencyError with the cause and the remedy in one line."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library of the package does not load
        cause = " ".join(str(error).split())
        raise DependencyError(f"{module}: needed here and cannot be imported ({cause}); {remedy}") from error
