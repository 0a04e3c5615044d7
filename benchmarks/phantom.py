"""Images a second that `selfray phantom` draws and writes, all masks and reports included.

    python benchmarks/phantom.py [--patients 60] [--size 224] [--repeats 3]

Prints minimum, median and maximum over the repeats, start-up of the workers included. The aim is
8 images a second at 224 × 224 on two cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from selfray.data.phantom import write_phantom


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=60)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    speeds = []
    for repeat in range(given.repeats):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            dataset = write_phantom(
                Path(folder) / "phantom", patients=given.patients, size=given.size, seed=repeat
            )
            speeds.append(len(dataset) / (time.perf_counter() - began))
    print(
        f"phantom, {given.patients} patients at {given.size}: {statistics.median(speeds):.1f} "
        f"images/s ({min(speeds):.1f} to {max(speeds):.1f}), {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
