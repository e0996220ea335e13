"""Where a tensor lies: in the process's own memory or in a file that it has mapped. Linux alone says so."""

from pathlib import Path

from torch import Tensor


def mapped_file(tensor: Tensor) -> Path | None:
    """Return the file whose mapping holds a tensor's first value, None if it lies in no file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        first, end = (int(address, 16) for address in span.split("-"))
        if first <= tensor.data_ptr() < end:
            return Path(path[0]) if path and path[0].startswith("/") else None
    return None


def is_mapped(tensor: Tensor, path: Path) -> bool:
    """Return whether a tensor lies in the mapping of a file."""
    return mapped_file(tensor) == path.resolve()
