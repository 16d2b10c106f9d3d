"""`python -m stages.stage6_parallel.worker PARENT CONFIG`: a rank that rank 0 started. Not for the hand."""

import logging
import os
import sys
import threading
import time


def main() -> None:
    parent, config = int(sys.argv[1]), sys.argv[2]
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    # Rank 0 logs the rest.
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    # Imported late: that takes seconds, in which the parent may be gone already.
    import msgspec

    from stages.stage6_parallel.engine import EngineConfig, build

    build(msgspec.json.decode(config, type=EngineConfig))  # ends the process when rank 0 does


def _die_with(parent: int) -> None:
    """However the parent ends, and whatever the main thread waits for."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
