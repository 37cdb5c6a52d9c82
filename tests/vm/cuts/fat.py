"""Reads files from a FAT file system as a boot loader does: first table, no repair, no cache.

Source: Microsoft, "FAT: General Overview of On-Disk Format", 1.03.
"""

import struct
from collections.abc import Callable

# Reads so many bytes at that offset of the partition.
Read = Callable[[int, int], bytes]

ATTRIBUTE_FOLDER, ATTRIBUTE_LABEL, ATTRIBUTE_LONG_NAME = 0x10, 0x08, 0x0F


class Damaged(Exception):
    """A boot loader would not find the file."""


class Fat:
    """A FAT12, FAT16 or FAT32 file system."""

    def __init__(self, read: Read) -> None:
        self.read = read
        boot = read(0, 512)
        if boot[510:512] != b"\x55\xaa":
            raise Damaged("the boot sector has no signature")
        (self.sector, per_cluster, reserved, tables, roots, small, _, table16) = struct.unpack_from(
            "<HBHBHHBH", boot, 11
        )
        large, table32 = struct.unpack_from("<II", boot, 32)
        if self.sector not in (512, 1024, 2048, 4096) or not per_cluster or not tables:
            raise Damaged("the boot sector makes no sense")
        table = table16 or table32
        self.cluster = per_cluster * self.sector
        self.root = (reserved + tables * table) * self.sector
        self.root_bytes = roots * 32
        self.data = self.root + -(-self.root_bytes // self.sector) * self.sector
        self.clusters = ((small or large) * self.sector - self.data) // self.cluster
        self.bits = 12 if self.clusters < 4085 else 16 if self.clusters < 65525 else 32
        self.root_cluster = struct.unpack_from("<I", boot, 44)[0] if self.bits == 32 else 0
        self.table = read(reserved * self.sector, table * self.sector)

    def file(self, path: str) -> bytes:
        """The content of a file."""
        *folders, name = path.strip("/").split("/")
        cluster = self.root_cluster
        for folder in folders:
            attributes, cluster, _ = self._find(cluster, folder)
            if not attributes & ATTRIBUTE_FOLDER:
                raise Damaged(f"{folder} is no folder")
        attributes, cluster, size = self._find(cluster, name)
        if attributes & ATTRIBUTE_FOLDER:
            raise Damaged(f"{name} is a folder")
        content = self._chain(cluster) if size else b""
        if len(content) < size:
            raise Damaged(f"{path} has {size} bytes, but clusters for {len(content)}")
        return content[:size]

    def _find(self, folder: int, wanted: str) -> tuple[int, int, int]:
        """Attributes, first cluster and size of a name."""
        content = self._chain(folder) if folder else self.read(self.root, self.root_bytes)
        parts: dict[int, str] = {}
        for at in range(0, len(content), 32):
            entry = content[at : at + 32]
            if entry[0] == 0:
                break
            attributes = entry[11]
            if entry[0] == 0xE5:
                parts = {}
                continue
            if attributes & 0x3F == ATTRIBUTE_LONG_NAME:
                text = entry[1:11] + entry[14:26] + entry[28:32]
                parts[entry[0] & 0x1F] = text.decode("utf-16-le", "replace").split("\0")[0]
                continue
            long_name = "".join(parts[number] for number in sorted(parts))
            parts = {}
            base, extension = entry[:8].rstrip(b" "), entry[8:11].rstrip(b" ")
            short = (base + (b"." + extension if extension else b"")).decode("cp437")
            if attributes & ATTRIBUTE_LABEL or wanted.lower() not in (
                long_name.lower(),
                short.lower(),
            ):
                continue
            high, low, size = struct.unpack_from("<H4xHI", entry, 20)
            return attributes, low | (high << 16 if self.bits == 32 else 0), size
        raise Damaged(f"there is no {wanted}")

    def _chain(self, cluster: int) -> bytes:
        """The content of all clusters from one on."""
        content, seen = [], set()
        while 2 <= cluster < self.clusters + 2:
            if cluster in seen:
                raise Damaged(f"the chain of cluster {cluster} is a ring")
            seen.add(cluster)
            content.append(self.read(self.data + (cluster - 2) * self.cluster, self.cluster))
            cluster = self._next(cluster)
        if cluster < (1 << self.bits) - 8 & 0x0FFFFFFF:
            raise Damaged(f"a chain of clusters ends in {cluster:#x}")
        return b"".join(content)

    def _next(self, cluster: int) -> int:
        if self.bits == 32:
            return struct.unpack_from("<I", self.table, cluster * 4)[0] & 0x0FFFFFFF
        if self.bits == 16:
            return struct.unpack_from("<H", self.table, cluster * 2)[0]
        pair = struct.unpack_from("<H", self.table, cluster * 3 // 2)[0]
        return pair >> 4 if cluster & 1 else pair & 0xFFF
