"""Knows the failures of this package that a user can act on."""


class OffloadError(Exception):
    """An expert that cannot be read, or a budget that holds too little.

    `message` names what failed, with names in backticks; `hint` says what to try next, or is None.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
