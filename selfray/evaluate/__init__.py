"""Encoders x tasks x dataset -> results: what encoders know, with the uncertainty of it."""

from selfray.evaluate.stage import FORMAT_NAME, TASKS, evaluate, results_table

__all__ = ["FORMAT_NAME", "TASKS", "evaluate", "results_table"]
