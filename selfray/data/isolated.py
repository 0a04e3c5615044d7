"""Run native decoders in processes of their own, so that a crash costs one file and not the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")

SECONDS_PER_JOB = 120
"""CPU seconds after which a decoder counts as stuck; J2K of 16 megapixels takes some 5 s."""

CRASHED = "the decoder crashed, or was still busy after 2 minutes"

# Far above what an image of 100 megapixels needs, far below what a machine of this use has.
_ADDRESS_SPACE_BYTES = 16 << 30


def each_in_processes(
    work: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int | None = None
) -> Iterator[Outcome | str]:
    """Map a function over jobs in processes, in order, surviving the death of a process.

    When a worker dies, the jobs that were under way are repeated one by one, each alone in a
    process, and the one that kills it again is found.

    Args:
        work: Importable function of one job.
        jobs: Picklable.
        workers: Processes; one a core if None.

    Yields:
        The outcome of each job; for one that kills its process, the string `CRASHED`.
    """
    workers = workers or len(os.sched_getaffinity(0))
    next_job, ahead = 0, 4 * workers
    while next_job < len(jobs):
        under_way: deque[Future[Outcome]] = deque()
        with _Pool(workers) as pool:
            first = next_job
            try:
                for job in jobs[first : first + ahead]:
                    under_way.append(pool.submit(_timed, work, job))
                while under_way:
                    outcome = under_way[0].result()
                    under_way.popleft()
                    next_job += 1
                    waiting = next_job + len(under_way)
                    if waiting < len(jobs):
                        under_way.append(pool.submit(_timed, work, jobs[waiting]))
                    yield outcome
                return
            except BrokenProcessPool:
                suspects = jobs[next_job : next_job + ahead]
        next_job += len(suspects)
        yield from _one_by_one(work, deque(suspects))


def _one_by_one(work: Callable[[Job], Outcome], jobs: deque[Job]) -> Iterator[Outcome | str]:
    """Each job alone in a process, which the next one uses too if it is still alive."""
    while jobs:
        with _Pool(1) as pool:
            try:
                pool.submit(os.getpid).result()
            except BrokenProcessPool:
                # Not the job's doing. A script without that line is the usual cause.
                raise RuntimeError(
                    "no worker process starts; call this below `if __name__ == '__main__':`"
                ) from None
            try:
                while jobs:
                    outcome = pool.submit(_timed, work, jobs[0]).result()
                    jobs.popleft()
                    yield outcome
            except BrokenProcessPool:
                jobs.popleft()
                yield CRASHED


class _Pool(ProcessPoolExecutor):
    def __init__(self, workers: int) -> None:
        # Spawned: a fork would copy this process's threads' locks (OpenCV, Arrow) as they stand.
        context = multiprocessing.get_context("spawn")
        super().__init__(
            workers, mp_context=context, initializer=_prepare_worker, initargs=(os.getpid(),)
        )

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        # Here processes start. Ctrl-C goes to the whole group and must not reach them before
        # they ignore it, which would end them with a traceback each.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def __exit__(self, *_: object) -> None:
        # Do not wait for jobs that nobody will ask for (an interruption).
        self.shutdown(wait=True, cancel_futures=True)


def leave_with_parent(parent: int) -> None:
    """From now on, end this process when its parent was killed, whatever it waits for.

    Args:
        parent: Process number.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare_worker(parent: int) -> None:
    import resource

    import cv2

    leave_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent acts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    cv2.setNumThreads(1)
    # Native decoders complain on standard error, through the progress bar, about files that are
    # quarantined with a reason anyway.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > _ADDRESS_SPACE_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_BYTES, hard))


def _timed(work: Callable[[Job], Outcome], job: Job) -> Outcome:
    # The default action of SIGPROF ends the process, also one that is stuck in native code. It
    # counts CPU time: on a machine that is busy with other things, a good file may take long.
    signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_JOB)
    try:
        return work(job)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
