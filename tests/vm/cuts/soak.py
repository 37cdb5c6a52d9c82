"""Power cuts at random moments of the whole story, on a disk with a volatile write cache."""

import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boards
import packages
from boards import Board
from cloud import Cloud
from process import BUILD, RigError, say
from stories import BOOT_LIMIT_S, UPDATE_LIMIT_S, Rig

from cuts import nbd, record
from cuts.enumerate import contents, last_slot
from cuts.record import images
from cuts.trials import run_all
from cuts.truth import Brick, Tally, WrongEnd, check, end, rest

HEALTHY, UNHEALTHY = "good", "health-fails"
DOWNLOAD = "download"
# Where the story was over before the write that was to be the last one.
NO_CUT = "(no cut)"
# What the kernel shows last, and what the agent shows once the new slot is confirmed.
RESTARTS, CONFIRMED = "reboot: Restarting system", r"is confirmed"
# Where the boot loader is told by the restart itself, the agent notes down that it leaves before the
# kernel does, and a cut between the two is a start that failed. It shows this before both.
LEAVES = {"tryboot": "restarting the machine"}
# So many cuts in downloads, and one of them must have saved something.
MANY_DOWNLOADS = 5
# How long the last writes may take after the last report, in seconds.
AT_REST_S = 20


@dataclass(frozen=True)
class Moment:
    """When the power goes: so many writes after the console has shown something."""

    name: str
    # None: what the board shows when a slot is booted.
    marker: str | None
    # At most so many writes later; 0 is at once.
    writes: int
    variant: str = HEALTHY


# In the order of the story; how often each comes is in WEIGHTS.
MOMENTS = [
    Moment("request", r"waiting for version", 12),
    Moment(DOWNLOAD, r"fetching version", 150),
    Moment("reading back", r"reading version", 8),
    Moment("switch", r"restarting into slot", 12),
    Moment("boot loader", RESTARTS, 3),
    Moment("first boot", None, 40),
    Moment("mark good", r"on trial", 16),
    Moment("confirmed", CONFIRMED, 6),
    Moment("rollback", r"on trial", 60, UNHEALTHY),
]
WEIGHTS = [2, 6, 3, 3, 3, 3, 4, 1, 3]


class VolatileRig(Rig):
    """A machine whose disk forgets what was not flushed when the power is cut."""

    def __init__(self, board: Board, cloud: Cloud, folder: Path) -> None:
        super().__init__(board, cloud, folder)
        self.device: nbd.Disk | None = None
        self._server: nbd.Server | None = None
        self._socket: tempfile.TemporaryDirectory | None = None

    def on(self) -> None:
        """Switches the machine on, with an empty cache.

        The firmware of a machine may read the image itself (`boards.tryboot`): QEMU flushes when it
        ends in order, so nothing is in the cache at such a restart.
        """
        self.device = nbd.Disk(self.disk)
        # A path of a socket must be short.
        self._socket = tempfile.TemporaryDirectory(prefix="vm-")
        path = Path(self._socket.name, "disk")
        self._server = nbd.Server(self.device, path)
        drive = [
            "-blockdev", f"driver=nbd,node-name=disk,server.type=unix,server.path={path}",
        ]  # fmt: skip
        self._before = len(self.cloud.events)
        self.machine = self.board.machine(
            self.disk, self.folder, self.cloud.network(), drive=drive
        )

    def off(self, seed: str = "off") -> nbd.Lost | None:
        """Cuts the power."""
        if not self._server:
            return None
        server, self._server = self._server, None
        self.device.stop()
        super().off()
        try:
            server.close()
            return self.device.settle(seed)
        finally:
            self._socket.cleanup()


def newer(version: str) -> str:
    """The good version that does not run."""
    return record.OLD if version == record.NEW else record.NEW


@dataclass(frozen=True)
class Made:
    """A cut that was made, or came to nothing."""

    run_id: str
    # Whether the power went at the write that was chosen, and not much later, at rest.
    in_time: bool
    # The ends that the update may have.
    ends: frozenset[str]


def ends(board: str, variant: str, console: str) -> frozenset[str]:
    """How an update may end that was cut after the console had shown this of it.

    A cut is no reason to fail: until the machine restarts nothing is lost but time. A start of the
    new slot that is cut short is a failed one for the boot loader, which goes back; but not once
    the slot is confirmed.
    """
    if variant == UNHEALTHY:
        return frozenset({"rolledBack (unhealthy)", "rolledBack (fellBack)"})
    _, restarted, tried = console.rpartition(LEAVES.get(board, RESTARTS))
    if not restarted or re.search(CONFIRMED, tried):
        return frozenset({"succeeded"})
    return frozenset({"succeeded", "rolledBack (fellBack)"})


def cut_once(rig: VolatileRig, moment: Moment, seed: str) -> Made:
    """Sends an update and cuts the power at this moment of it."""
    machine = rig.machine
    shown = len(machine.console)
    _, version = rig.running()
    wanted = record.SICK if moment.variant == UNHEALTHY else newer(version)
    run_id = rig.send(wanted, moment.variant)
    machine.wait_for(moment.marker or rig.board.slot_seen, UPDATE_LIMIT_S)
    writes = random.Random(f"{seed}:writes").randint(0, moment.writes)
    gone = threading.Event()
    if writes:
        rig.device.cut_after(writes, gone.set)
        wait_cut(rig, gone, run_id)
    lost = rig.off(seed)
    in_time = not writes or gone.is_set()
    rig.say(f"{'CUT' if in_time else 'no cut'} at {moment.name}, {writes} writes later: {lost}")
    return Made(run_id, in_time, ends(rig.board.name, moment.variant, machine.console[shown:]))


def wait_cut(rig: VolatileRig, gone: threading.Event, run_id: str) -> None:
    """Waits for the cut, but not for ever where the story has fewer writes than that."""
    deadline = time.monotonic() + UPDATE_LIMIT_S
    while not gone.wait(1):
        ours = rig.cloud.reported().get("twinboot", {})
        over = ours.get("lastUpdate", {}).get("id") == run_id
        if over or time.monotonic() > deadline:
            # The last writes may follow the last report.
            gone.wait(AT_REST_S)
            return


def trial(rig: VolatileRig, seed: str, known: dict[str, bytes], tally: Tally) -> None:
    """One update with one cut, until it is confirmed or has truthfully failed."""
    moment = random.Random(seed).choices(MOMENTS, WEIGHTS)[0]
    made = cut_once(rig, moment, seed)
    tally.cuts += made.in_time
    before = len(rig.cloud.transfers(rig.name))
    shutil.copyfile(rig.disk, rig.folder / "cut.img")
    try:
        rig.on()
        rig.machine.wait_for(rig.board.slot_seen, BOOT_LIMIT_S)
    except RigError as error:
        raise Brick(f"nothing boots: {error}") from error
    status = rest(rig, made.run_id)
    tally.count_resumes(rig.cloud.transfers(rig.name)[before:])
    tally.ends[moment.name if made.in_time else NO_CUT, end(status)] += 1
    check(rig, status, last_slot(rig), rig.device.read, known)
    need_end(moment, made, status)


def need_end(moment: Moment, made: Made, status: dict) -> None:
    """Raises `WrongEnd` unless a cut at this moment is a reason for this end."""
    if end(status) not in made.ends:
        wanted = " or ".join(sorted(made.ends))
        raise WrongEnd(f"a cut at {moment.name} must end with {wanted}: {status['lastUpdate']}")


def never_resumed(tally: Tally) -> bool:
    """Whether downloads were cut often enough, and yet none of them went on where it was."""
    cuts = sum(n for (moment, _), n in tally.ends.items() if moment == DOWNLOAD)
    return cuts >= MANY_DOWNLOADS and not tally.resumed


def run(name: str, folder: Path, seed: int, trials: int, only: int | None = None) -> int:
    """So many trials, on one machine until it fails; returns the exit code. `only` repeats one
    choice of moment and losses."""
    board = boards.board(name)
    packages.build(board.arch)
    known = contents(images(board, UNHEALTHY))
    tally = Tally()

    @contextmanager
    def machine(first: str) -> Iterator[VolatileRig]:
        with (
            Cloud(folder / f"cloud-{first}") as cloud,
            VolatileRig(board, cloud, folder / f"machine-{first}") as rig,
        ):
            yield rig

    def one(rig: VolatileRig, number: int) -> None:
        say(f"trial {number} of {trials}, seed {seed}:{number}: {tally}")
        trial(rig, f"{seed}:{number}", known, tally)

    left = [only] if only else list(range(1, trials + 1))
    failures = run_all(
        left, machine, one, lambda number: f"soak-{seed}-{number}", tally, BUILD / "failed"
    )
    if never_resumed(tally):
        failures.append("downloads were cut, and none was resumed")
    print("\n  cut at         end of the update        updates")
    for (moment, ended), count in sorted(tally.ends.items()):
        print(f"  {moment:<14} {ended:<24} {count:7}")
    for failure in failures:
        print(f"\n{failure}")
    print(tally)
    return 1 if failures else 0
