"""Disks that fail: while the slot is written, while it is read back, while the state is saved, while
the boot loader is told. The device must survive, say so, and update once the disk works again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boards
import packages
from cloud import Cloud
from process import BUILD, RigError, say
from stories import UPDATE_LIMIT_S, need

from cuts.enumerate import contents, last_slot
from cuts.layout import SECTOR, partitions
from cuts.nbd import FLUSH, READ, WRITE, Fault
from cuts.record import images
from cuts.soak import VolatileRig, newer
from cuts.trials import run_all
from cuts.truth import Tally, check, rest

# For faults that do not go away by themselves.
FOR_EVER = None


@dataclass(frozen=True)
class Failing:
    """A part of the disk that fails during an update."""

    # What the requests are that fail: a kind, the label of a partition (`other`: the slot that does
    # not run), how many go well first, how many fail.
    kind: int
    where: str
    skip: int
    count: int | None
    # When it begins: what the console shows.
    marker: str
    # The codes that the update may end with, and `succeeded` if it may get over it.
    ends: tuple[str, ...]
    # udev reads a slot that was written; where it cannot, it takes the name of the slot away, and
    # only a restart brings it back (docs/porting.md).
    name_lost: bool = False


CASES = {
    "one write into the slot": Failing(
        WRITE, "other", 20, 1, r"waiting for version", ("slotIo", "succeeded")),
    "all writes into the slot": Failing(
        WRITE, "other", 20, FOR_EVER, r"waiting for version", ("slotIo",)),
    "reading the slot back": Failing(
        READ, "other", 0, FOR_EVER, r"reading version", ("slotIo", "readBack"), name_lost=True),
    "telling the boot loader": Failing(
        WRITE, "boot", 0, FOR_EVER, r"reading version", ("bootloader",)),
}  # fmt: skip
# Where the file system of the state gives up, which a failed flush of the disk makes it do as well.
NOT_SAVED = {
    "saving the state": Failing(WRITE, "data", 5, FOR_EVER, r"fetching version", ()),
    "a flush": Failing(FLUSH, "data", 3, 1, r"fetching version", ()),
}


def spoil(rig: VolatileRig, case: Failing, slot: str) -> Fault:
    """Lets a part of the running machine's disk fail."""
    parts = partitions(rig.device.read)
    label = f"rootfs-{'b' if slot == 'A' else 'a'}" if case.where == "other" else case.where
    part = parts[label]
    fault = Fault(case.kind, range(part.offset, part.offset + part.bytes), case.skip, case.count)
    rig.device.faults.append(fault)
    return fault


def update_on_failing_disk(rig: VolatileRig, case: Failing, known: dict[str, bytes]) -> None:
    """The update ends, well or not, and the device tells which; the next one succeeds."""
    slot, version = rig.running()
    wanted = newer(version)
    run_id = rig.send(wanted)
    rig.machine.wait_for(case.marker, UPDATE_LIMIT_S)
    fault = spoil(rig, case, slot)
    status = rest(rig, run_id, connected=True)
    rig.device.faults.clear()
    last = status["lastUpdate"]
    need(fault.hits > 0, "the disk failed at all", status)
    ended = last.get("code", last["result"])
    need(ended in case.ends, f"the update ends with one of {case.ends}", last)
    rig.say(f"{fault.hits} requests failed; the device says: {ended}: {last.get('reason')}")
    check(rig, status, last_slot(rig), rig.device.read, known)
    if case.name_lost:
        rig.off("restart")
        rig.on()
        rest(rig, run_id)
    if ended != "succeeded":
        run_id = rig.send(wanted)
        status = rest(rig, run_id, connected=True)
        need(status["lastUpdate"]["result"] == "succeeded", "the next update succeeds", status)
        check(rig, status, last_slot(rig), rig.device.read, known)


def state_cannot_be_saved(rig: VolatileRig, case: Failing, known: dict[str, bytes]) -> None:
    """The data partition fails in the middle of a download, and its file system gives up. The device
    stays reachable and says so; once the disk works again, a restart by the operator is all that is
    needed to end the update."""
    slot, version = rig.running()
    run_id = rig.send(newer(version))
    rig.machine.wait_for(case.marker, UPDATE_LIMIT_S)
    fault = spoil(rig, case, slot)

    def told(twin: dict) -> bool:
        return "cannot save the state" in str(twin["twinboot"].get("notices"))

    twin = rig.wait(told, UPDATE_LIMIT_S, "the twin tells that the state cannot be saved")
    need(fault.hits > 0, "the disk failed at all", twin)
    rig.say(f"{fault.hits} requests failed; the twin says: {twin['twinboot']['notices']}")
    rig.device.faults.clear()
    rig.machine.mark()
    code, answer = rig.cloud.call("reboot", None)
    need(code == 200, "an operator can restart the device", answer)
    rig.wait_boot(slot)
    status = rest(rig, run_id)
    check(rig, status, last_slot(rig), rig.device.read, known)


def torn_superblock(rig: VolatileRig, known: dict[str, bytes]) -> None:
    """The data partition's superblock is half old, half new, as a cut leaves it on a medium that
    writes no more than 512 bytes at once. The machine repairs it by itself."""
    rig.off("superblock")
    with rig.disk.open("r+b") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        # In the second sector of the superblock, which begins at byte 1024: its checksum.
        at = partitions(read)["data"].offset + 3 * SECTOR
        half = bytearray(read(at, SECTOR))
        half[-1] ^= 0xFF
        file.seek(at)
        file.write(half)
    rig.on()
    status = rest(rig, None)
    check(rig, status, last_slot(rig), rig.device.read, known)


NAMES = ["torn superblock", *CASES, *NOT_SAVED]
# What is done with a machine, by the whole images that its slots may hold.
Case = Callable[[VolatileRig, dict[str, bytes]], None]


def _case(name: str) -> Case:
    """The case with this name."""
    match name:
        case "torn superblock":
            return torn_superblock
        case _ if name in NOT_SAVED:
            return lambda rig, known: state_cannot_be_saved(rig, NOT_SAVED[name], known)
        case _ if name in CASES:
            return lambda rig, known: update_on_failing_disk(rig, CASES[name], known)
    raise RigError(f"no case {name!r}; there are: {', '.join(map(repr, NAMES))}")


def run(board_name: str, folder: Path, names: list[str]) -> int:
    """The named cases, or all, one after the other on one machine as long as it lives; returns the
    exit code."""
    cases = [(name, _case(name)) for name in names or NAMES]
    board = boards.board(board_name)
    packages.build(board.arch)
    known = contents(images(board))
    tally = Tally()
    total = len(cases)

    @contextmanager
    def machine(first: str) -> Iterator[VolatileRig]:
        with (
            Cloud(folder / f"cloud-{first}") as cloud,
            VolatileRig(board, cloud, folder / f"machine-{first}") as rig,
        ):
            yield rig

    def one(rig: VolatileRig, case: tuple[str, Case]) -> None:
        say(f"I/O errors: {case[0]}")
        tally.cuts += 1
        case[1](rig, known)

    failures = run_all(
        cases, machine, one, lambda case: f"io-{case[0].replace(' ', '-')}", tally, BUILD / "failed"
    )
    for failure in failures:
        print(f"\n{failure}")
    print(f"I/O errors: {total} cases, {len(failures)} failures")
    print(tally)
    return 1 if failures else 0
