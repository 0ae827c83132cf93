"""The one exception that means: the user can mend this, and here is how."""


class ClipmillError(Exception):
    """A user's mistake or a broken environment; its text is one line: what, why, and which flag mends it."""
