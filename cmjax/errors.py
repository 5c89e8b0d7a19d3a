"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in what the user gave: one clear line, which the command prints before it ends with status 2."""
