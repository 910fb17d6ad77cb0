"""Does a native call let other threads run?"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


def lets_other_threads_run(action: Callable[[], object]) -> bool:
    """Whether this thread gets the interpreter's lock while another is inside of `action`.

    The other thread is never made to give it up, so that this can only be where `action` does so. Tried again and
    again, because on a busy machine this thread may wake up too late; once is not enough, because the first thread of a
    process may give it up by itself.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        return sum(_runs_beside(action) for _ in range(40)) >= 3
    finally:
        sys.setswitchinterval(interval)


def _runs_beside(action: Callable[[], object]) -> bool:
    events = []

    def work() -> None:
        events.append("start")
        action()
        events.append("end")

    thread = threading.Thread(target=work)
    thread.start()
    events.append("beside")
    thread.join()
    return events == ["start", "beside", "end"]
