"""The one exception of the library."""


class PackForcingError(ValueError):
    """A user's mistake, told in one sentence: what is wrong, what was found, and what to do.

    Raised before any sampling starts wherever the mistake can be seen that early; the exception is a block whose
    output is not finite, which can only be seen once it has been computed.
    """
