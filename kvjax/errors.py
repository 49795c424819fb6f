"""The one exception users meet: a clear line about what was expected."""


class KvjaxError(ValueError):
    """Bad input. The message is one line that says what was expected; programs print it and exit non-zero."""
