"""The exception for errors that the user can fix."""


class UserError(Exception):
    """An error in the input, as one line that says what is wrong, where, and what to do.

    The command-line tools print it as `error: ...`, without a stack trace, and exit with status 2.
    """
