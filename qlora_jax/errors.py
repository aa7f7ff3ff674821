"""The one exception for what a user can mend: bad files, bad config values, impossible requests."""


class InputError(ValueError):
    """What was found, what was expected and how to mend it, in one line. Commands print it and exit with status 2."""
