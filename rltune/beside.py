"""Work in a thread for as long as a block runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(work: Callable[[threading.Event], object]) -> Iterator[None]:
    """Run ``work`` in a thread for as long as the block runs.

    Args:
        work: Is handed an event, which is set once the block has ended, however it did, and is waited for then. It
            should raise nothing: nobody would hear of it.
    """
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
