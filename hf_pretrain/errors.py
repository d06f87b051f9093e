"""The one exception that means "your input, not our bug"."""


class InputError(ValueError):
    """Raised for input that a user can mend: a file, an option, a checkpoint.

    The message is one line that names the argument, its value and the fix; the programs print it and exit with status 2.
    """
