"""Progress in a log: lines, and few of them. Signals in long work: none is lost, none kills."""

import os
import signal
import threading

import pytest

from selfray import progress
from selfray.progress import collected_signals, progress_bar


def test_in_a_log_progress_is_lines_with_a_rate_and_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    with progress_bar(total=4, unit="image", desc="ingest") as bar:
        for _ in range(4):
            bar.update()
    written = capsys.readouterr().err
    assert "\r" not in written
    lines = written.splitlines()
    assert all(line.startswith("ingest: ") and "image/s" in line for line in lines)
    assert " 50%" in written and "100%" in lines[-1] and "<00:0" in written


def test_short_work_leaves_no_line_in_a_log(capsys):
    with progress_bar(total=2, unit="image") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_bar_stays_on_its_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress_bar(total=1, unit="image") as bar:
        bar.update()
    assert capsys.readouterr().err.startswith("\r")


@pytest.mark.parametrize("total", [None, 3])
def test_a_bar_may_be_switched_off(capsys, total):
    with progress_bar(total=total, disable=True) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_signals_are_collected_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with collected_signals() as caught:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert caught == [signal.SIGTERM, signal.SIGINT]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_handler_that_somebody_else_set_meanwhile_stays():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with collected_signals():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_signals_are_the_callers():
    before, during = signal.getsignal(signal.SIGTERM), []

    def work():
        with collected_signals():
            during.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [before]
