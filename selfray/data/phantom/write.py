"""`selfray phantom OUT`: draw patients in parallel and write them as a dataset."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2

from selfray.data.dataset import DatasetInfo, DatasetWriter, RadiographDataset, require_empty
from selfray.data.isolated import leave_with_parent
from selfray.data.phantom.contact_sheet import write_contact_sheet
from selfray.data.phantom.findings import FINDINGS
from selfray.data.phantom.patients import patient_rows, plan_patient
from selfray.data.phantom.render import MASK_LABELS
from selfray.data.phantom.scanner import SITES
from selfray.errors import InputError, nearest
from selfray.progress import progress_bar

ROWS_PER_SHARD = 256  # what an interruption loses at most


def write_phantom(
    out: Path,
    *,
    patients: int = 400,
    size: int = 224,
    seed: int = 0,
    sites: tuple[str, ...] = ("A", "B", "C"),
) -> RadiographDataset:
    """Write a dataset of synthetic patients.

    An interruption leaves `OUT.partial`, and the same call continues there.

    Args:
        out: Directory to make.
        patients: Number of patients, >= 1.
        size: Side of the square images in pixels, 32 to 2048.
        seed: Same seed, same patients; >= 0.
        sites: Which of the sites A, B, C and D the patients come from.

    Raises:
        InputError: An argument is out of range, or `out` holds something.
    """
    _require_arguments(patients, size, seed, sites)
    require_empty(out)
    info = DatasetInfo(
        name="phantom",
        origin="synthetic phantom",
        licence="MIT (synthetic)",
        synthetic=True,
        findings=FINDINGS,
        mask_labels=MASK_LABELS,
        pixels=f"drawn: size {size}, seed {seed}, patients {patients}, sites {','.join(sites)}",
    )
    writer = DatasetWriter(out, info, rows_per_shard=ROWS_PER_SHARD)
    done, first = writer.rows_written, 0
    while first < patients and (count := plan_patient(seed, first, sites).images) <= done:
        done, first = done - count, first + 1
    for row in _drawn(range(first, patients), seed, sites, size, patients):
        if done:  # the head of this patient is in the last complete shard
            done -= 1
            continue
        writer.add(row)
    dataset = writer.finish()
    write_contact_sheet(dataset)
    return dataset


def _drawn(
    numbers: range, seed: int, sites: tuple[str, ...], size: int, patients: int
) -> Iterator[dict[str, Any]]:
    """Rows of patients in order, drawn ahead by worker processes."""
    workers = min(os.cpu_count() or 1, len(numbers))
    with progress_bar(
        total=patients, initial=numbers.start, unit="patient", desc="phantom"
    ) as progress:
        if workers <= 1:
            _settle()
            for number in numbers:
                yield from patient_rows(seed, number, sites, size)
                progress.update()
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _settle_worker, (os.getpid(),)) as pool:
            waiting: deque[Future[list[dict[str, Any]]]] = deque()
            try:
                for number in numbers:
                    waiting.append(pool.submit(patient_rows, seed, number, sites, size))
                    if len(waiting) >= 8 * workers:
                        yield from waiting.popleft().result()
                        progress.update()
                while waiting:
                    yield from waiting.popleft().result()
                    progress.update()
            finally:
                for future in waiting:
                    future.cancel()


def _settle() -> None:
    cv2.setNumThreads(1)


def _settle_worker(parent: int) -> None:
    _settle()
    leave_with_parent(parent)
    # Ctrl-C reaches the whole group; the parent alone decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _require_arguments(patients: int, size: int, seed: int, sites: tuple[str, ...]) -> None:
    if patients < 1:
        raise InputError(f"patients is {patients}. Use 1 or more.")
    if not 32 <= size <= 2048:
        raise InputError(f"size is {size} pixels. Use 32 to 2048.")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}. Use a whole number from 0 to 2^63 - 1.")
    if not sites:
        raise InputError(f"no site is given. {nearest('', SITES)}")
    for site in sites:
        if site not in SITES:
            raise InputError(f"site {site!r} is unknown. {nearest(site, SITES)}")
        if sites.count(site) > 1:
            raise InputError(f"site {site!r} is given {sites.count(site)} times. Give it once.")
