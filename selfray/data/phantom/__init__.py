"""Synthetic patients drawn from a 3-D anatomy by physics; never presented as real."""

from selfray.data.phantom.write import write_phantom

__all__ = ["write_phantom"]
