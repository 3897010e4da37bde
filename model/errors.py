"""The ways a run can end that are not a bug, and the exit codes that scripts may rely on."""

EXIT_FAULT = 1
"""Something broke: a bug, a disk, a server."""
EXIT_USER = 2
"""The user's mistake: one line says which field or file, and the cure."""
EXIT_STOPPED = 75
"""Stopped on request (or by a fault outside), everything saved: the same command goes on. EX_TEMPFAIL of sysexits.h."""


class UserError(ValueError):
    """A user's mistake. The message is one line that names the field or file and the cure; exit code 2."""


class Stopped(Exception):
    """The work was stopped resumably; exit code 75."""


class Interrupted(BaseException):
    """A signal asks the main thread to end what it is doing. Like KeyboardInterrupt it is no Exception: libraries swallow those, and
    `Thread.start` takes one for its own failure and breaks the thread that it has just started."""


class NoWholeCheckpoint(RuntimeError):
    """Checkpoints lie there, but none is whole; the message lists what was found. Never a reason to start at step 0."""


class NotSaved(RuntimeError):
    """The last checkpoint could not be written; the message is one line."""


class TooManyBadSteps(RuntimeError):
    """Training does not get better by going on; the message is one line that says what was seen and what to try."""


class SaidByFirst(Exception):
    """What the first rank raised and says; the others end in the same way without a word."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error
