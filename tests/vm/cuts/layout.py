"""The partitions of a disk image, read from its GPT."""

import struct
from collections.abc import Callable
from dataclasses import dataclass

SECTOR = 512


class NoTable(Exception):
    """There is no GPT, or it lacks a partition."""


@dataclass(frozen=True)
class Partition:
    """A range of sectors."""

    name: str
    first: int
    sectors: int

    @property
    def range(self) -> range:
        """Its sectors."""
        return range(self.first, self.first + self.sectors)

    @property
    def offset(self) -> int:
        """Where it begins, in bytes."""
        return self.first * SECTOR

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.sectors * SECTOR


def partitions(read: Callable[[int, int], bytes]) -> dict[str, Partition]:
    """All partitions by their names."""
    header = read(SECTOR, SECTOR)
    if header[:8] != b"EFI PART":
        raise NoTable("there is no GPT")
    where, count, size = struct.unpack_from("<QII", header, 72)
    table = read(where * SECTOR, count * size)
    found = {}
    for at in range(0, len(table), size):
        entry = table[at : at + size]
        if entry[:16] == bytes(16):
            continue
        first, last = struct.unpack_from("<QQ", entry, 32)
        name = entry[56:128].decode("utf-16-le").split("\0")[0]
        found[name] = Partition(name, first, last - first + 1)
    return found
