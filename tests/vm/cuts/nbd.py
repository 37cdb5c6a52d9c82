"""A disk with a volatile write cache, whose power can be cut, and that can fail: an NBD server.

Killing QEMU alone loses nothing that the guest has handed over: the host keeps it. Here a write
stays in the cache until the guest flushes it. A cut keeps, loses or tears each write in the cache,
as a seed decides. A cut at the n-th write is exact: the disk answers nothing after it.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, fixed newstyle, simple
replies. Neither trim nor zeros are offered, so that QEMU sends writes.
"""

import errno
import mmap
import os
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512
READ, WRITE, CLOSE, FLUSH = 0, 1, 2, 3
FUA = 1
OPTION_MAGIC = 0x49484156454F5054
REPLY_MAGIC = 0x3E889045565A9
ACK, INFO, UNSUPPORTED = 1, 3, 0x80000001
# Flags of the export: they are valid, it can flush, it can write through.
EXPORT_FLAGS = 1 | 1 << 2 | 1 << 3


@dataclass
class Fault:
    """Requests that the disk answers with an error."""

    kind: int
    # Bytes of the disk; a request that touches one of them fails.
    where: range
    # So many of them go well first.
    skip: int = 0
    # So many fail then; None: all.
    count: int | None = None
    error: int = errno.EIO
    hits: int = 0

    def strikes(self, kind: int, offset: int, length: int) -> bool:
        """Whether this request fails. Counts."""
        touched = kind == FLUSH or (offset < self.where.stop and offset + length > self.where.start)
        if kind != self.kind or not touched:
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.count is not None and self.hits >= self.count:
            return False
        self.hits += 1
        return True


@dataclass(frozen=True)
class Lost:
    """What a cut did to the writes in the cache."""

    kept: int
    torn: int
    lost: int

    def __str__(self) -> str:
        return f"{self.kept} writes kept, {self.torn} torn, {self.lost} lost"


class Disk:
    """A disk image behind a volatile cache. All methods may be called from any thread."""

    def __init__(self, image: Path) -> None:
        self._file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        self.bytes = os.fstat(self._file).st_size
        # What the guest sees. The writes that are not flushed are in this mapping only.
        self._seen = mmap.mmap(self._file, self.bytes, flags=mmap.MAP_PRIVATE)
        # Copies of the unflushed writes, oldest first, by their offset.
        self._cache: list[tuple[int, bytes]] = []
        self._lock = threading.RLock()
        self.writes = 0
        self.flushes = 0
        self.faults: list[Fault] = []
        self.is_cut = False
        self._cut_at: int | None = None
        self._on_cut: Callable[[], None] = lambda: None

    def cut_after(self, writes: int, then: Callable[[], None]) -> None:
        """Cuts the power so many writes from now, and calls `then`, on the disk's thread."""
        with self._lock:
            self._cut_at = self.writes + writes
            self._on_cut = then

    def stop(self) -> None:
        """The power is gone: from now on nothing is answered and nothing is taken."""
        with self._lock:
            self.is_cut = True

    def settle(self, seed: str) -> Lost:
        """Decides what the medium keeps of the cache after a cut, and closes the disk."""
        chance = random.Random(seed)
        keep = chance.choice((0.1, 0.5, 0.9))
        tear = chance.choice((0.0, 0.2, 0.6))
        kept = torn = lost = 0
        with self._lock:
            self.is_cut = True
            for offset, data in self._cache:
                if chance.random() < tear and len(data) > SECTOR:
                    torn += 1
                    for at in range(0, len(data), SECTOR):
                        if chance.random() < 0.5:
                            os.pwrite(self._file, data[at : at + SECTOR], offset + at)
                elif chance.random() < keep:
                    kept += 1
                    os.pwrite(self._file, data, offset)
                else:
                    lost += 1
            self.close()
        return Lost(kept, torn, lost)

    def close(self) -> None:
        """What is in the cache is lost."""
        with self._lock:
            self.is_cut = True
            self._cache.clear()
            self._seen.close()
            os.close(self._file)

    def read(self, offset: int, length: int) -> bytes:
        """What the guest sees."""
        with self._lock:
            return self._seen[offset : offset + length]

    def write(self, offset: int, data: bytes, through: bool) -> None:
        """Into the cache, or through it."""
        with self._lock:
            self._seen[offset : offset + len(data)] = data
            if through:
                self._forget(offset, len(data))
                os.pwrite(self._file, data, offset)
            else:
                self._cache.append((offset, data))
            self.writes += 1
            if self.writes == self._cut_at:
                self.is_cut = True
                self._on_cut()

    def _forget(self, offset: int, length: int) -> None:
        """Takes a range out of the cache: something newer is on the medium."""
        rest = []
        for begin, data in self._cache:
            end = begin + len(data)
            if begin < offset:
                rest.append((begin, data[: max(0, offset - begin)]))
            if end > offset + length:
                first = max(begin, offset + length)
                rest.append((first, data[first - begin :]))
            # Nothing of it is left that is not in these two, or it lay elsewhere as a whole.
        self._cache = [(begin, data) for begin, data in rest if data]

    def flush(self) -> None:
        """Everything that was written is on the medium."""
        with self._lock:
            for offset, data in self._cache:
                os.pwrite(self._file, data, offset)
            self._cache.clear()
            self.flushes += 1

    def fails(self, kind: int, offset: int, length: int) -> int:
        """The error that a request meets; 0: none."""
        with self._lock:
            for fault in self.faults:
                if fault.strikes(kind, offset, length):
                    return fault.error
        return 0


class Server:
    """Serves one disk to one client at a time, until it is closed or the power is cut."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self.disk = disk
        self.path = path
        self.error: Exception | None = None
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="nbd", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the client's connection, too. What was wrong with a request is raised here."""
        self.disk.stop()
        for end in (self._listener, self._client):
            if end is not None:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()
        self._thread.join()
        self.path.unlink(missing_ok=True)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        while not self.disk.is_cut:
            try:
                self._client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._agree(self._client):
                    self._serve(self._client)
            except (ConnectionError, OSError, EOFError):
                # The client is gone, or we are closed.
                pass
            except Exception as error:  # told by close()
                self.error = error
                return
            finally:
                if not self.disk.is_cut:
                    self._client.close()

    def _agree(self, client: socket.socket) -> bool:
        """The handshake; whether the client wants the disk."""
        client.sendall(b"NBDMAGIC" + struct.pack(">QH", OPTION_MAGIC, 3))
        _receive(client, 4)
        while True:
            _, option, length = struct.unpack(">QII", _receive(client, 16))
            _receive(client, length)

            def reply(kind: int, data: bytes = b"", option: int = option) -> None:
                client.sendall(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(data)) + data)

            match option:
                case 1:
                    client.sendall(struct.pack(">QH", self.disk.bytes, EXPORT_FLAGS))
                    return True
                case 2:
                    reply(ACK)
                    return False
                case 6 | 7:
                    reply(INFO, struct.pack(">HQH", 0, self.disk.bytes, EXPORT_FLAGS))
                    reply(INFO, struct.pack(">HIII", 3, SECTOR, 4096, 32 << 20))
                    reply(ACK)
                    if option == 7:
                        return True
                case _:
                    reply(UNSUPPORTED)

    def _serve(self, client: socket.socket) -> None:
        disk = self.disk
        while True:
            header = _receive(client, 28)
            _, flags, kind, handle, offset, length = struct.unpack(">IHHQQI", header)
            data = _receive(client, length) if kind == WRITE else b""
            if disk.is_cut or kind == CLOSE:
                return
            error = 0 if kind != READ and kind != WRITE and kind != FLUSH else disk.fails(
                kind, offset, length
            )
            answer = b""
            if not error:
                match kind:
                    case 0:
                        answer = disk.read(offset, length)
                    case 1:
                        disk.write(offset, data, bool(flags & FUA))
                    case 3:
                        disk.flush()
                    case _:
                        error = errno.EINVAL
            if disk.is_cut:
                return
            client.sendall(struct.pack(">IIQ", 0x67446698, error, handle) + answer)


def _receive(client: socket.socket, length: int) -> bytes:
    content = bytearray(length)
    view, at = memoryview(content), 0
    while at < length:
        got = client.recv_into(view[at:])
        if not got:
            raise EOFError
        at += got
    return bytes(content)
