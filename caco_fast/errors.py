"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Bad input, named in one line: what is wrong, where, and what to do.

    The command-line tools print it as `error: ...` and exit with status 2; no stack trace is shown.
    """
