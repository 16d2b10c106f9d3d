"""Six engines behind one interface, each swapping in the part that its stage teaches."""

from importlib import import_module
from typing import cast

from stages.interface import Stage

_STAGES = {
    1: "stages.stage1_naive.engine",
    2: "stages.stage2_paged.engine",
    3: "stages.stage3_radix.engine",
    4: "stages.stage4_chunked.engine",
    5: "stages.stage5_overlap.engine",
    6: "stages.stage6_parallel.engine",
}
LATEST = max(_STAGES)


def load_stage(number: int = LATEST) -> Stage:
    """Import the engine module of stage `number`; the others stay unimported.

    Raises:
        ValueError: there is no such stage.
    """
    if number not in _STAGES:
        raise ValueError(f"there is no stage {number}; the stages are {', '.join(map(str, _STAGES))}")
    return cast(Stage, import_module(_STAGES[number]))
