"""Run and evaluation directories -> `summary.html`, one file that asks nothing of the network."""

from selfray.summary.page import write_summary

__all__ = ["write_summary"]
