"""What was measured, with all that it takes to measure it again, as one JSON file."""

import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

Json = dict[str, Any]
_PACKAGES = ("torch", "triton", "flashinfer-python", "flash-attn", "flash-attn-4", "transformers")


def environment() -> Json:
    """This machine's hardware, and the versions, commit and command line of this process."""
    import torch  # late: who only compares files or talks to a server does without

    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu(),
        "versions": {"python": platform.python_version()} | {p: v for p in _PACKAGES if (v := _version(p))},
        "commit": commit(),
        "command": "python -m minisgl.bench " + shlex.join(sys.argv[1:]),
    }


def save(path: Path, record: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def load(path: Path) -> Json:
    """A file that `save` wrote.

    Raises:
        ValueError: it is missing or not a record.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # not there, not UTF-8, not JSON
        raise ValueError(f"{path} cannot be read: {error}") from error
    results = record.get("results") if isinstance(record, dict) else None
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ValueError(f'{path} is not a result of this program: it has no list "results" of objects')
    return cast(Json, record)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu() -> str:
    """The name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def commit() -> str | None:
    """The commit of the code that runs, marked `-dirty` if it differs from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
