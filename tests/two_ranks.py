"""Two processes of a gloo group, as torchrun would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from micro_run import in_child

from selfray import distributed

RANKS = 2


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_ranks(function: Callable[[int], object]) -> None:
    """Run a function on two ranks of a gloo group, in processes that torchrun's words describe."""
    port = str(_free_port())

    def of_rank(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        function(rank)
        distributed.barrier()  # rank 0 keeps the addresses, which the other may still be asking for
        distributed.stop()

    def both() -> None:
        first = os.fork()
        if first == 0:
            os._exit(in_child(lambda: of_rank(1)) and 1)
        of_rank(0)
        assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0

    assert in_child(both) == 0
