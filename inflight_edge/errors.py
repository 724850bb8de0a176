"""The one family of errors: every message says which value, expected, got and what to do."""

__all__ = [
    "BundleError",
    "DataError",
    "DependencyError",
    "EngineError",
    "GuardError",
    "InflightError",
    "ModelError",
    "OptionError",
    "ScoreError",
    "SinkError",
    "SourceError",
]


class InflightError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it in one line, exit code 2."""


class BundleError(InflightError):
    """The bundle cannot be trusted or understood: nothing of it is used."""


class GuardError(InflightError):
    """The parameters of a guard break an invariant."""


class ScoreError(InflightError):
    """A scorer was called with arrays it cannot take (shape, dtype, layout)."""


class EngineError(InflightError):
    """An inference engine cannot be built or failed while running."""


class ModelError(InflightError):
    """A classifier cannot be read, or is not of a form that can be guarded."""


class DataError(InflightError):
    """Images or labels are missing, unreadable or do not fit the classifier."""


class OptionError(InflightError):
    """An option's value is out of range or contradicts another one."""


class DependencyError(InflightError):
    """A library that this call needs is not installed."""


class SourceError(InflightError):
    """A source of frames cannot be opened, or broke off; a live one may be opened again.

    final  that will not mend it, a new process may.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class SinkError(InflightError):
    """A sink cannot be opened, or could not deliver an outcome.

    lost  outcomes that are lost with it: one for a write, what a flush or a close says.
    """

    def __init__(self, message: str, *, lost: int = 1) -> None:
        super().__init__(message)
        self.lost = lost
