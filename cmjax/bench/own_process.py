"""A process to measure in that brings up its own devices."""

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from cmjax.errors import UserError


@contextlib.contextmanager
def own_process() -> Iterator[ProcessPoolExecutor]:
    """One process, which has no more devices, and threads for them, than what it runs asks for.

    Raises:
        UserError: it has been killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise UserError(
                "a process that measures was killed, most likely since this machine has too little memory: end what "
                "else runs on it, or give a smaller --model or --ep"
            ) from error
