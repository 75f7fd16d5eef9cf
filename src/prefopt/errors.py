"""What can go wrong, as a tree.

    PrefoptError                 everything that prefopt raises on purpose
    ├── ConfigError              settings that are unknown, of the wrong type or at odds with each other
    ├── DataError                files, rows or tokens that cannot be trained on
    ├── ModelError               a model, tokenizer or adapter that cannot be loaded or used
    └── RunError                 a run that cannot start, go on or be resumed
        └── RunStopped           a run that was asked to stop, and saved where it stood

Each message says what was given, what is allowed and what to do. The command line prints the
message and exits with 2; a traceback is a bug in prefopt.
"""


class PrefoptError(Exception):
    """Base of every error that a user can cause and mend.

    Attributes:
        told: another process of the run says it already, so that the command line of this one need not.
    """

    told = False


class ConfigError(PrefoptError):
    """Settings that are unknown, of the wrong type or at odds with each other."""


class DataError(PrefoptError):
    """Files, rows or tokens that cannot be trained on."""


class ModelError(PrefoptError):
    """A model, tokenizer or adapter that cannot be loaded or used."""


class RunError(PrefoptError):
    """A run that cannot start, go on or be resumed."""


class RunStopped(RunError):
    """A run that was asked to stop, and saved where it stood. The command line exits with 130."""
