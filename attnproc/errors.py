"""Errors and warnings. A message has three parts: what came, what was expected, what to do."""


class AttnProcError(Exception):
    """Base of every error this package raises on purpose."""


class SettingsError(AttnProcError, ValueError):
    """A setting, preset, plan or argument is not valid."""


class UnsupportedError(AttnProcError, RuntimeError):
    """The combination of model, processor and run is not supported (always raised under `strict=True`)."""


class AttnProcWarning(UserWarning):
    """Something runs, but not as asked; given once per reason."""
