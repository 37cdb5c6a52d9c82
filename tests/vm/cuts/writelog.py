"""Reads what QEMU's `blklogwrites` driver recorded, and rebuilds the disks that a power cut leaves.

The format is that of Linux's dm-log-writes (QEMU's block/blklogwrites.c, the kernel's
Documentation/admin-guide/device-mapper/log-writes.rst): a superblock of one sector, then for each
request one sector with its header, and behind it the data of a write.

A disk is never copied. It is the file before the first write, and a table that says which sector was
written when: a state of a disk of gigabytes costs what was written since the last flush.
"""

import mmap
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512
MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
# In a table of sectors: it was discarded, or written with zeros.
ZEROS = -1


class BadLog(Exception):
    """The file is not a log of writes, or not a whole one."""


@dataclass(frozen=True)
class Request:
    """One request of the guest, in sectors of 512 bytes."""

    number: int
    flags: int
    sector: int
    sectors: int
    # Where the data lies in the log, or ZEROS.
    data: int

    def table(self) -> dict[int, int]:
        """Which sector it writes, and where in the log its new content lies."""
        if self.data == ZEROS:
            return dict.fromkeys(range(self.sector, self.sector + self.sectors), ZEROS)
        return {
            self.sector + index: self.data + index * SECTOR for index in range(self.sectors)
        }


class WriteLog:
    """All requests, in the order in which the guest's were done."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if path.stat().st_size < SECTOR:
                raise BadLog(f"{path} has no superblock: was nothing written?")
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, entries, sector_size = struct.unpack_from("<QQQI", self.bytes, 0)
        if magic != MAGIC or version != 1:
            raise BadLog(f"{path} is not a log of writes: magic {magic:#x}, version {version}")
        if sector_size % SECTOR or sector_size == 0:
            raise BadLog(f"{path} has sectors of {sector_size} bytes")
        self.requests: list[Request] = []
        scale = sector_size // SECTOR
        at = sector_size
        for number in range(entries):
            if at + sector_size > len(self.bytes):
                raise BadLog(f"{path} ends at request {number} of {entries}")
            sector, sectors, flags, length = struct.unpack_from("<QQQQ", self.bytes, at)
            at += sector_size
            data = ZEROS if flags & DISCARD else at
            if flags & MARK:
                at += -(-length // sector_size) * sector_size
                continue
            if not flags & DISCARD:
                at += sectors * sector_size
            if at > len(self.bytes):
                raise BadLog(f"{path} ends in the data of request {number} of {entries}")
            self.requests.append(Request(number, flags, sector * scale, sectors * scale, data))


class Disk:
    """A disk after some of the requests: reads as a file would."""

    def __init__(self, base: mmap.mmap, log: WriteLog) -> None:
        self.base = base
        self.log = log
        # What is on the medium for good, and what this state adds to it.
        self.durable: dict[int, int] = {}
        self.added: dict[int, int] = {}
        # Told of each table that becomes durable.
        self.watchers: list[Callable[[dict[int, int]], None]] = []

    @staticmethod
    def of(image: Path, log: WriteLog) -> "Disk":
        """The disk as it was before the first request."""
        with image.open("rb") as file:
            return Disk(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), log)

    def __len__(self) -> int:
        return len(self.base)

    def harden(self, table: dict[int, int]) -> None:
        """These sectors are on the medium for good."""
        self.durable.update(table)
        for watcher in self.watchers:
            watcher(table)

    def where(self, sector: int) -> int | None:
        """Where in the log a sector's content lies; None if it never was written."""
        place = self.added.get(sector)
        return self.durable.get(sector) if place is None else place

    def sector(self, number: int) -> bytes:
        """The content of one sector."""
        place = self.where(number)
        if place is None:
            return self.base[number * SECTOR : (number + 1) * SECTOR]
        return self.content(place)

    def content(self, place: int) -> bytes:
        """What lies at a place in the log."""
        return bytes(SECTOR) if place == ZEROS else self.log.bytes[place : place + SECTOR]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at any place."""
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        content = bytearray(self.base[first * SECTOR : last * SECTOR])
        for number, place in self.written(first, last):
            at = (number - first) * SECTOR
            content[at : at + SECTOR] = self.content(place)
        begin = offset - first * SECTOR
        return bytes(content[begin : begin + length])

    def written(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The sectors of a range that differ from the first image in their place."""
        for table, below in ((self.durable, None), (self.added, self.durable)):
            if last - first < len(table):
                found = ((number, table[number]) for number in range(first, last) if number in table)
            else:
                found = ((n, place) for n, place in table.items() if first <= n < last)
            for number, place in found:
                if below is not None or number not in self.added:
                    yield number, place

    def save(self, path: Path) -> None:
        """Writes it out whole, with holes where there are zeros, so that a machine can boot it."""
        chunk = 1 << 20
        with path.open("wb") as file:
            file.truncate(len(self.base))
            for offset in range(0, len(self.base), chunk):
                content = self.base[offset : offset + chunk]
                if content.count(0) != len(content):
                    file.seek(offset)
                    file.write(content)
            for number, place in {**self.durable, **self.added}.items():
                file.seek(number * SECTOR)
                file.write(self.content(place))


@dataclass(frozen=True)
class Cut:
    """What a power cut left: a name that tells how to make it again, and whether writes were torn."""

    name: str
    # How many requests the guest had made.
    after: int
    lost: int = 0
    torn: int = 0

    @property
    def is_prefix(self) -> bool:
        """Nothing is lost or torn: the disk as it was between two requests."""
        return self.lost == 0 and self.torn == 0


@dataclass
class Sampling:
    """Which of the many states are looked at."""

    seed: int
    # Of the requests that fill a slot, one in so many.
    bulk_one_in: int = 16
    # Of all other requests, one in so many.
    others_one_in: int = 1
    # Random losses for each place where a cut is tried and something can get lost.
    losses: int = 2
    # Sectors that the medium writes as a whole: 1 for 512 bytes, 8 for 4 KiB.
    atom: int = 1
    # Ranges of sectors that are written in bulk.
    bulk: list[range] = field(default_factory=list)

    def is_bulk(self, request: Request) -> bool:
        """Whether it is one of the many that fill a slot."""
        return any(request.sector in part for part in self.bulk)


def states(disk: Disk, sampling: Sampling) -> Iterator[Cut]:
    """Turns `disk` into one state after the other.

    Every prefix of the requests (in bulk: one in so many), and for each of them random losses of
    what was not flushed: a request is kept, lost, or torn, which means that any of its sectors
    may be old or new.
    """
    pending: list[dict[int, int]] = []
    bulk = others = 0
    yield from _prefix(disk, pending, 0)
    for done, request in enumerate(disk.log.requests, 1):
        if request.sectors:
            if sampling.is_bulk(request):
                bulk += 1
                look = bulk % sampling.bulk_one_in == 0
            else:
                others += 1
                look = others % sampling.others_one_in == 0
            pending.append(request.table())
            if look:
                yield from _prefix(disk, pending, done)
                for number in range(sampling.losses):
                    seed = f"{sampling.seed}:{done}:{number}"
                    yield from _loss(disk, pending, done, seed, sampling.atom)
        if request.flags & FLUSH:
            for table in pending:
                disk.harden(table)
            pending.clear()
        elif request.flags & FUA and request.sectors:
            # It alone is safe; what waits in the cache for the same sectors is older.
            table = pending.pop()
            disk.harden(table)
            for older in pending:
                for sector in older.keys() & table.keys():
                    del older[sector]
    yield from _prefix(disk, pending, len(disk.log.requests))


def _prefix(disk: Disk, pending: list[dict[int, int]], done: int) -> Iterator[Cut]:
    disk.added = {}
    for table in pending:
        disk.added.update(table)
    yield Cut(f"after request {done}", done)


def _loss(
    disk: Disk, pending: list[dict[int, int]], done: int, seed: str, atom: int
) -> Iterator[Cut]:
    """One random loss; nothing if it happens to lose nothing, which is the prefix again."""
    chance = random.Random(seed)
    keep = chance.choice((0.1, 0.5, 0.9))
    tear = chance.choice((0.0, 0.2, 0.6))
    disk.added = {}
    lost = torn = 0
    for table in pending:
        if chance.random() < tear and len({n // atom for n in table}) > 1:
            torn += 1
            new = {n: chance.random() < 0.5 for n in {n // atom for n in table}}
            disk.added.update({n: table[n] for n in table if new[n // atom]})
        elif chance.random() < keep:
            disk.added.update(table)
        else:
            lost += 1
    if lost or torn:
        yield Cut(f"after request {done}, loss {seed}", done, lost, torn)
