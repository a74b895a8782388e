"""Knows how a failure the user can act on is carried: what failed, and what to try next."""


class MoecliError(Exception):
    """A failure for a reason the user can act on.

    `message` names what failed, with names in backticks; `hint`, when there is one, gives the next
    command to try. The command line prints both and exits with `exit_code`.
    """

    def __init__(self, message: str, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
