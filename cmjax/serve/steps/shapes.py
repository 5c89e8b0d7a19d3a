"""Sizes that steps are padded to."""


def round_up(value: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-value // multiple) * multiple


def bucket(value: int, multiple: int) -> int:
    """The next multiple of `multiple` times a power of two: few shapes, so few compilations."""
    return multiple << max(0, (-(-value // multiple) - 1).bit_length())
