"""Power cuts at random moments of the whole story, on a disk with a volatile write cache."""

import random
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import boards
import disk as disks
import packages
import rootfs
from boards import Board
from cloud import Cloud
from process import BUILD, RigError, say
from stories import BOOT_LIMIT_S, UPDATE_LIMIT_S, Rig

from cuts import nbd, record
from cuts.enumerate import contents, last_slot
from cuts.record import images
from cuts.truth import Brick, Tally, Untruth, check, rest

HEALTHY, UNHEALTHY = "good", "health-fails"


@dataclass(frozen=True)
class Moment:
    """When the power goes: so many writes after the console has shown something."""

    name: str
    marker: str
    # At most so many writes later; 0 is at once.
    writes: int
    variant: str = HEALTHY


# In the order of the story; how often each comes is in WEIGHTS.
MOMENTS = [
    Moment("request", r"waiting for version", 12),
    Moment("download", r"fetching version", 150),
    Moment("reading back", r"reading version", 8),
    Moment("switch", r"restarting into slot", 12),
    Moment("boot loader", r"reboot: Restarting system", 3),
    Moment("first boot", r"booting slot", 40),
    Moment("mark good", r"on trial", 16),
    Moment("confirmed", r"is confirmed", 6),
    Moment("rollback", r"on trial", 60, UNHEALTHY),
]
WEIGHTS = [2, 6, 3, 3, 3, 3, 4, 1, 3]


class VolatileRig(Rig):
    """A machine whose disk forgets what was not flushed when the power is cut."""

    def __init__(self, board: Board, cloud: Cloud, folder: Path) -> None:
        super().__init__(board, cloud, folder)
        self.device: nbd.Disk | None = None
        self._server: nbd.Server | None = None

    def on(self) -> None:
        """Switches the machine on, with an empty cache."""
        self.device = nbd.Disk(self.disk)
        # A path of a socket must be short.
        path = Path(f"/tmp/vm-{id(self)}.nbd")
        self._server = nbd.Server(self.device, path)
        drive = [
            "-blockdev", f"driver=nbd,node-name=disk,server.type=unix,server.path={path}",
        ]  # fmt: skip
        self.machine = self.board.machine(
            self.disk, self.folder, self.cloud.network(), drive=drive
        )

    def off(self, seed: str = "off") -> nbd.Lost | None:
        """Cuts the power."""
        if not self.machine:
            return None
        self.device.stop()
        super().off()
        self._server.close()
        return self.device.settle(seed)


def newer(version: str) -> str:
    """The good version that does not run."""
    return record.OLD if version == record.NEW else record.NEW


def cut_once(rig: VolatileRig, moment: Moment, seed: str) -> tuple[str, nbd.Lost]:
    """Sends an update and cuts the power at this moment of it; the id of the run, and what was
    lost."""
    _, version = rig.running()
    wanted = record.SICK if moment.variant == UNHEALTHY else newer(version)
    run_id = rig.send(wanted, moment.variant)
    rig.machine.wait_for(moment.marker, UPDATE_LIMIT_S)
    writes = random.Random(f"{seed}:writes").randint(0, moment.writes)
    if writes:
        gone = threading.Event()
        rig.device.cut_after(writes, gone.set)
        # Where the story has fewer writes than that, the machine idles and is cut then.
        gone.wait(BOOT_LIMIT_S if moment.name != "confirmed" else 20)
    lost = rig.off(seed)
    rig.say(f"CUT at {moment.name}, {writes} writes later: {lost}")
    return run_id, lost


def trial(rig: VolatileRig, seed: str, known: dict[str, bytes], tally: Tally) -> None:
    """One update with one cut, until it is confirmed or has truthfully failed."""
    moment = random.Random(seed).choices(MOMENTS, WEIGHTS)[0]
    run_id, _ = cut_once(rig, moment, seed)
    tally.cuts += 1
    before = len(rig.cloud.transfers(rig.name))
    shutil.copyfile(rig.disk, rig.folder / "cut.img")
    rig.on()
    try:
        rig.machine.wait_for(rig.board.slot_seen, BOOT_LIMIT_S)
    except RigError as error:
        raise Brick(f"nothing boots: {error}") from error
    status = rest(rig, run_id)
    tally.count_resumes(rig.cloud.transfers(rig.name)[before:])
    check(rig, status, last_slot(rig), rig.device.read, known)


def run(name: str, folder: Path, seed: int, trials: int, only: int | None = None) -> int:
    """So many trials, on one machine until it fails; returns the exit code. `only` repeats one
    choice of moment and losses."""
    board = boards.board(name)
    packages.build(board.arch)
    rootfs.slot_image(board, record.SICK, UNHEALTHY)
    tally = Tally()
    failures = []
    left = [only] if only else list(range(1, trials + 1))
    while left:
        number = left[0]
        with (
            Cloud(folder / f"cloud-{number}") as cloud,
            VolatileRig(board, cloud, folder / f"machine-{number}") as rig,
        ):
            known = contents(images(rig))
            try:
                rig.factory()
                while left:
                    number = left.pop(0)
                    say(f"trial {number} of {trials}, seed {seed}:{number}: {tally}")
                    trial(rig, f"{seed}:{number}", known, tally)
            except RigError as error:
                tally.untruths += isinstance(error, Untruth)
                tally.bricks += not isinstance(error, Untruth)
                kept = BUILD / "failed" / f"soak-{seed}-{number}"
                image = rig.folder / "cut.img"
                rig.keep(kept)
                if image.exists():
                    disks.copy(image, kept / "cut.img")
                failures.append(f"trial {number}, seed {seed}:{number}: {error}\nkept: {kept}")
                say(f"FAILED: {failures[-1]}")
                if not tally.cuts:
                    break
    for failure in failures:
        print(f"\n{failure}")
    print(tally)
    return 1 if failures else 0
