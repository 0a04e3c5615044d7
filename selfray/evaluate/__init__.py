"""Encoders x tasks x dataset -> results: what encoders know, with the uncertainty of it."""

from selfray.evaluate.judge import FROZEN_PROBES
from selfray.evaluate.presets import preset_rows
from selfray.evaluate.report_writing import ReportTask
from selfray.evaluate.stage import DEFAULT_TASKS, FORMAT_NAME, TASKS, compare, evaluate
from selfray.evaluate.tables import results_table

__all__ = [
    "DEFAULT_TASKS",
    "FORMAT_NAME",
    "FROZEN_PROBES",
    "TASKS",
    "ReportTask",
    "compare",
    "evaluate",
    "preset_rows",
    "results_table",
]
