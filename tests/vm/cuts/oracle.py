"""Says what a machine would make of a disk, without starting it.

What must be true of every disk that a power cut leaves:
* the boot script finds a slot, and that slot is a whole image;
* as long as an update is not confirmed, the old slot is whole, and the boot loader comes back to it;
* the file system of the data partition is in order once its journal was replayed;
* the state file loads, is as old as the last flush at most, and tells nothing that is not so.
"""

import mmap
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from boards import uboot as environment
from boards.tryboot import SLOT_OF_PARTITION, boot_partition

from cuts import bootscript
from cuts.fat import Damaged, Fat, Read
from cuts.layout import SECTOR, Partition, partitions
from cuts.statefile import NotUnderstood, Saved, lies
from cuts.writelog import Cut, Disk

CHUNK = 1 << 20
TOOLS = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}


class SlotWatch:
    """Keeps count of the sectors in which a slot differs from an image: no hashing per state."""

    def __init__(self, disk: Disk, part: Partition, image: Path) -> None:
        self.disk, self.part = disk, part
        with image.open("rb") as file:
            self.image = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self.image) > part.bytes:
            raise ValueError(f"{image} does not fit into {part.name}")
        self.range = range(part.first, part.first + -(-len(self.image) // SECTOR))
        self.differing: set[int] = set()
        for offset in range(0, len(self.image), CHUNK):
            there = disk.base[part.offset + offset : part.offset + offset + CHUNK]
            if there[: len(self.image) - offset] != self.image[offset : offset + CHUNK]:
                first = part.first + offset // SECTOR
                last = min(self.range.stop, first + CHUNK // SECTOR)
                self.differing.update(
                    n
                    for n in range(first, last)
                    if disk.base[n * SECTOR : (n + 1) * SECTOR] != self._wanted(n)
                )
        disk.watchers.append(self._hardened)

    def _wanted(self, sector: int) -> bytes:
        at = (sector - self.part.first) * SECTOR
        return self.image[at : at + SECTOR]

    def _agrees(self, sector: int, place: int) -> bool:
        wanted = self._wanted(sector)
        return self.disk.content(place)[: len(wanted)] == wanted

    def _hardened(self, table: dict[int, int]) -> None:
        for sector, place in table.items():
            if sector in self.range:
                if self._agrees(sector, place):
                    self.differing.discard(sector)
                else:
                    self.differing.add(sector)

    @property
    def is_whole(self) -> bool:
        """Whether the slot holds exactly this image."""
        left = len(self.differing)
        for sector, place in self.disk.added.items():
            if sector in self.range:
                agrees = self._agrees(sector, place)
                if sector in self.differing:
                    left -= agrees
                elif not agrees:
                    left += 1
        return left == 0


class Region:
    """A partition whose verdict is kept as long as it does not change."""

    def __init__(self, disk: Disk, part: Partition) -> None:
        self.disk, self.part = disk, part
        self.version = 0
        disk.watchers.append(self._hardened)

    def _hardened(self, table: dict[int, int]) -> None:
        if any(sector in self.part.range for sector in table):
            self.version += 1

    @property
    def key(self) -> tuple[int, frozenset[tuple[int, int]]]:
        """Two states with the same key have the same content here."""
        added = ((n, place) for n, place in self.disk.added.items() if n in self.part.range)
        return self.version, frozenset(added)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the partition."""
        return self.disk.read(self.part.offset + offset, length)


@dataclass(frozen=True)
class BootLoader:
    """What a boot loader does with a disk."""

    # Name of the partition with its variables.
    partition: str
    # Reads that partition. The slots of the next starts, if what boots never does anything, and
    # the files that could not be read.
    starts: Callable[[Read], tuple[list[str | None], list[str]]]


SCRIPTS = Path(__file__).resolve().parents[3] / "packaging/boot"
ENVIRONMENTS = ("grubenv", "grubenv.spare")


def grub(script: Path = SCRIPTS / "grub/grub.cfg") -> BootLoader:
    """GRUB with the shipped script, and its variables on a FAT partition."""

    def starts(read: Read) -> tuple[list[str | None], list[str]]:
        blocks: bootscript.Blocks = {}
        for name in ENVIRONMENTS:
            try:
                blocks[name] = bootscript.grub_block(Fat(read).file(name))
            except Damaged:
                blocks[name] = None
        # A slot that is not whole may load and would be a brick: so the script finds every kernel.
        found = bootscript.starts(script, blocks, {"A", "B"})
        return found, [name for name, variables in blocks.items() if variables is None]

    return BootLoader("boot", starts)


# What boot.cmd gives all slots when none has boots left.
BOOTS_LEFT = 3


def uboot() -> BootLoader:
    """U-Boot with the choice of the shipped boot.cmd, done again in Python; the environment is read
    by the board's own module."""

    def starts(read: Read) -> tuple[list[str | None], list[str]]:
        partition = read(0, environment.COPIES[-1] + environment.COPY_SIZE)
        copies = [
            environment.parse_copy(partition[at : at + environment.COPY_SIZE])
            for at in environment.COPIES
        ]
        variables = environment.parse_environment(partition) if any(copies) else {}
        order = (variables.get("BOOT_ORDER") or "A B").split()
        left = {slot: environment.left(variables, slot) for slot in "AB"}
        found = []
        for _ in range(2 * BOOTS_LEFT + 2):
            ready = [slot for slot in order if left.get(slot, 0) > 0]
            if not ready:
                left = dict.fromkeys(left, BOOTS_LEFT)
                order = [slot for slot in order if slot in left] or ["A", "B"]
                ready = order
            left[ready[0]] -= 1
            found.append(ready[0])
        return found, [f"copy {number}" for number, copy in enumerate(copies) if not copy]

    return BootLoader("ubootenv", starts)


def tryboot() -> BootLoader:
    """The Raspberry Pi's firmware: what it takes without the flag, which no cut leaves."""

    def starts(read: Read) -> tuple[list[str | None], list[str]]:
        try:
            autoboot = Fat(read).file("autoboot.txt")
            slot = SLOT_OF_PARTITION.get(boot_partition(autoboot, one_shot=False))
            # The flag must lead somewhere, too.
            boot_partition(autoboot, one_shot=True)
        except (Damaged, ValueError):
            return [None], ["autoboot.txt"]
        return [slot], []

    return BootLoader("boot", starts)


# By the names of the boards.
BOOT_LOADERS = {"grub": grub, "uboot": uboot, "tryboot": tryboot}


def next_slots(board: str, read: Read) -> list[str | None]:
    """What the boot loader takes at the next starts of a disk."""
    loader = BOOT_LOADERS[board]()
    part = partitions(read)[loader.partition]
    return loader.starts(lambda at, length: read(part.offset + at, length))[0]


@dataclass(frozen=True)
class Data:
    """What the data partition comes up with."""

    # Exit codes of e2fsck -p, and of e2fsck -y where that did not do.
    fsck: int
    repair: int
    # What they said, if they could not mend all.
    complaint: str
    # The state file; None if there is none.
    state: bytes | None
    # Files of the device that are gone or changed.
    spoilt: tuple[str, ...]


@dataclass
class Verdict:
    """What was found out about one state of the disk."""

    cut: Cut
    chosen: str | None
    saved: Saved | None
    bricks: list[str] = field(default_factory=list)
    untruths: list[str] = field(default_factory=list)
    # Worth counting, but allowed.
    notes: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Nothing that must never happen."""
        return not self.bricks and not self.untruths

    def __str__(self) -> str:
        what = "; ".join(
            [f"BRICK: {text}" for text in self.bricks]
            + [f"UNTRUE: {text}" for text in self.untruths]
            + self.notes
        )
        return f"{self.cut.name}: boots {self.chosen}, {self.saved or 'no state'}: {what or 'good'}"


class Oracle:
    """Judges the states of one disk, in the order of the requests."""

    def __init__(
        self,
        disk: Disk,
        boot_loader: BootLoader,
        parts: dict[str, Partition],
        slots: dict[str, str],
        data: str,
        images: list[Path],
        state_file: str = "/state.json",
        keeps: tuple[str, ...] = (),
        sees_all: bool = True,
    ) -> None:
        """`slots` and `data` name partitions; `images` are the whole ones that may be in a slot;
        `keeps` are files on the data partition that no update changes. `sees_all` says that every
        prefix outside the slots will be judged: only then the age of a state can be told."""
        self.disk, self.boot_loader = disk, boot_loader
        self.watches = {
            slot: [SlotWatch(disk, parts[name], image) for image in images]
            for slot, name in slots.items()
        }
        self.boot = Region(disk, parts[boot_loader.partition])
        self.data = Region(disk, parts[data])
        self.state_file, self.sees_all = state_file, sees_all
        self._boots: dict[object, tuple[list[str | None], list[str]]] = {}
        self._datas: dict[object, Data] = {}
        self._work = tempfile.TemporaryDirectory(prefix="oracle-", dir=_memory())
        self._kept = {name: self._dump_base(name) for name in keeps}
        # States of the file that a cut may leave now: the one at the last flush, and newer ones.
        self._may_load: list[bytes | None] = []
        self._durable_at = -1
        # Whether a state is on the medium for good: from then on there must always be one.
        self._has_durable = False

    def close(self) -> None:
        """Removes what it worked with."""
        self._work.cleanup()

    def __enter__(self) -> "Oracle":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def judge(self, cut: Cut) -> Verdict:
        """What a machine would make of the disk as it is now."""
        whole = {
            slot for slot, watches in self.watches.items() if any(w.is_whole for w in watches)
        }
        starts, unreadable = self._starts()
        data = self._data()
        verdict = Verdict(cut, next((slot for slot in starts if slot), None), None)
        if unreadable:
            verdict.notes.append(f"unreadable: {', '.join(unreadable)}")
        if verdict.chosen is None:
            verdict.bricks.append(f"nothing boots ({starts})")
        elif verdict.chosen not in whole:
            verdict.bricks.append(f"slot {verdict.chosen} boots and is not whole")
        elif not set(filter(None, starts)) <= whole:
            verdict.notes.append("a broken slot would be tried after failed starts")
        self._judge_data(verdict, data)
        if data.repair < 4:
            self._judge_state(verdict, data, whole, starts)
        return verdict

    def _judge_data(self, verdict: Verdict, data: Data) -> None:
        if data.fsck >= 4:
            verdict.notes.append(f"data partition needs a full repair (code {data.fsck})")
        if data.repair >= 4:
            verdict.bricks.append(f"data partition cannot be repaired: {data.complaint}")
        elif data.spoilt:
            verdict.bricks.append(f"data partition lost {', '.join(data.spoilt)}")

    def _judge_state(
        self, verdict: Verdict, data: Data, whole: set[str], starts: list[str | None]
    ) -> None:
        if verdict.cut.is_prefix:
            # Only a flush narrows down what may come back.
            if self.data.version != self._durable_at:
                self._durable_at = self.data.version
                del self._may_load[:-1]
            self._may_load.append(data.state)
            # The first of them is on the medium.
            self._has_durable |= self._may_load[0] is not None
        elif self.sees_all and data.state not in self._may_load:
            verdict.untruths.append("a state comes back that was replaced for good, or never was")
        if data.state is None:
            # The agent would begin anew, as if it had never heard of an update.
            if self._has_durable and verdict.cut.is_prefix:
                verdict.untruths.append("the state file is gone, and was on the medium for good")
            return
        try:
            saved = verdict.saved = Saved.load(data.state)
        except NotUnderstood as error:
            verdict.untruths.append(str(error))
            return
        if verdict.chosen is None:
            return
        verdict.untruths += lies(saved, verdict.chosen)
        run = saved.run
        if saved.kind == "idle" or run is None or saved.inner.get("healthy"):
            return
        home = run["from"]
        if home not in whole:
            verdict.bricks.append(f"slot {home}, the way back, is not whole ({saved})")
        elif home not in starts:
            verdict.bricks.append(f"slot {verdict.chosen} boots for ever, unconfirmed ({saved})")
        if verdict.chosen != home and saved.kind == "trial":
            verdict.notes.append("the trial boots once more")

    def _starts(self) -> tuple[list[str | None], list[str]]:
        key = self.boot.key
        if key not in self._boots:
            self._boots[key] = self.boot_loader.starts(self.boot.read)
        return self._boots[key]

    def _data(self) -> Data:
        key = self.data.key
        if key not in self._datas:
            self._datas[key] = self._come_up()
        return self._datas[key]

    def _image(self) -> Path:
        """The data partition of the present state as a file of its own."""
        folder = Path(self._work.name)
        base, image = folder / "base", folder / "data"
        part = self.data.part
        if not base.exists():
            with base.open("wb") as file:
                file.truncate(part.bytes)
                for offset in range(0, part.bytes, CHUNK):
                    begin = part.offset + offset
                    content = self.disk.base[begin : begin + min(CHUNK, part.bytes - offset)]
                    if content.count(0) != len(content):
                        file.seek(offset)
                        file.write(content)
        subprocess.run(["cp", "--sparse=always", base, image], check=True)
        with image.open("r+b") as file:
            for number, place in self.disk.written(part.first, part.range.stop):
                file.seek((number - part.first) * SECTOR)
                file.write(self.disk.content(place))
        return image

    def _come_up(self) -> Data:
        """What a start does with the data partition: check it, mount it, load the state.

        With `fsck.repair=yes` on the kernel's command line systemd runs `fsck -y`, which goes to a
        spare superblock by itself.
        """
        image = self._image()
        code, _ = _check(image, "-p")
        repair, said = _check(image, "-y") if code >= 4 else (0, "")
        state = _dump(image, self.state_file)
        spoilt = tuple(name for name, had in self._kept.items() if _dump(image, name) != had)
        return Data(code, repair, said, state, spoilt)

    def _dump_base(self, name: str) -> bytes:
        image = self._image()
        _check(image, "-p")
        content = _dump(image, name)
        if content is None:
            raise ValueError(f"the data partition has no {name}")
        return content


def _check(image: Path, how: str) -> tuple[int, str]:
    """Exit code of e2fsck, and what it said."""
    run = subprocess.run(
        ["e2fsck", how, image], env=TOOLS, capture_output=True, text=True, check=False
    )
    return run.returncode, " ".join((run.stdout + run.stderr).split())[:300]


def _dump(image: Path, name: str) -> bytes | None:
    """A file of an ext4 file system; None if there is no such file."""
    out = image.with_suffix(".dump")
    out.unlink(missing_ok=True)
    subprocess.run(
        ["debugfs", "-R", f"dump {name} {out}", image],
        env=TOOLS,
        capture_output=True,
        check=False,
    )
    return out.read_bytes() if out.exists() else None


def _memory() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
