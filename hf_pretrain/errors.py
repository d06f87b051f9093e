"""The exceptions whose message is all that a user needs."""


class InputError(ValueError):
    """Raised for input that a user can mend: a file, an option, a checkpoint.

    The message is one line that names the argument, its value and the fix; the programs print it and exit with status 2.
    """


class RunError(RuntimeError):
    """Raised when a run cannot go on although its input is right: a full disk, a dead process, a loss that is not finite.

    The message is one line that says what happened, what is left of the run and how it goes on; the programs print it and
    exit with status 1.
    """


class Terminated(KeyboardInterrupt):
    """Raised where a program is to end at once because of SIGTERM; as after an interrupt, what is open is closed."""


class StoppedError(RunError):
    """Raised when training has stopped early because of SIGTERM, with a whole checkpoint; the programs exit with status 143."""
