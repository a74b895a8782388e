"""Knows the failures of this package that a user can act on."""


class QuantError(Exception):
    """A checkpoint that cannot be read, a scheme that does not fit, a file that cannot be written.

    `message` names what failed, with names in backticks; `hint` says what to try next, or is None.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
