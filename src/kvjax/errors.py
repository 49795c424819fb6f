"""The one exception users meet: a clear line about what was expected."""

LONGEST = 1000  # characters


class KvjaxError(ValueError):
    """Bad input. The message is one line that says what was expected; programs print it and exit non-zero."""

    def __init__(self, message: str) -> None:
        # Names and values from a damaged file may hold anything, of any length.
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2 - 5]} [...] {line[-LONGEST // 2 + 5 :]}"
        super().__init__(line)
