"""Every state of the disk that a power cut could leave in a whole update, and some of them booted."""

import random
import re
import shutil
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import boards
import disk as disks
import packages
from cloud import Cloud
from process import BUILD, RigError, say
from stories import Rig

from cuts.layout import partitions
from cuts.oracle import BOOT_LOADERS, Oracle, Verdict
from cuts.record import RecordedRig, images, record
from cuts.trials import failed, told
from cuts.truth import Brick, Tally, Untruth, check, rest
from cuts.writelog import Disk, Sampling, WriteLog, states

SLOTS = {"A": "rootfs-a", "B": "rootfs-b"}
STATE_FILE = "/twinboot/state.json"
KEEPS = ("/twinboot/hub-credential", "/rig/hub-ca.pem", "/rig/images-ca.pem")
# A line of progress for so many states.
PROGRESS = 100


@dataclass
class Findings:
    """What the oracle said of all states."""

    states: int = 0
    bad: list[Verdict] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    # For each kind of state one that was chosen at random, to be booted.
    samples: dict[str, Verdict] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Which states are looked at: every prefix, but of the writes into the slots one in 16, and so
    many random losses for each, torn at so many sectors."""

    seed: int
    losses: int = 1
    atom: int = 1

    def sampling(self, parts: dict) -> Sampling:
        """The same for one disk."""
        bulk = [parts[name].range for name in SLOTS.values()]
        return Sampling(self.seed, losses=self.losses, atom=self.atom, bulk=bulk)


def judge_all(
    board: str, base: Path, log: WriteLog, known: dict[str, Path], choice: Choice
) -> Findings:
    """Asks the oracle about all states."""
    disk = Disk.of(base, log)
    parts = partitions(disk.read)
    found = Findings()
    chance = random.Random(choice.seed)
    begun = time.monotonic()
    with Oracle(disk, BOOT_LOADERS[board](), parts, SLOTS, "data", list(known.values()), STATE_FILE, KEEPS) as oracle:
        for cut in states(disk, choice.sampling(parts)):
            verdict = oracle.judge(cut)
            found.states += 1
            found.notes.update(verdict.notes)
            kind = "repair" if any("full repair" in note for note in verdict.notes) else (
                verdict.saved.kind if verdict.saved else "nothing saved"
            )
            found.kinds[kind] += 1
            if not verdict.is_good:
                found.bad.append(verdict)
                say(f"state {verdict}")
            if chance.randrange(found.kinds[kind]) == 0:
                found.samples[kind] = verdict
            if found.states % PROGRESS == 0:
                say(f"{found.states} states, now {cut.name}: {verdict.saved or 'nothing saved'}")
    took = time.monotonic() - begun
    say(f"{found.states} states in {took:.0f} s: {len(found.bad)} bad")
    for kind, count in sorted(found.kinds.items()):
        say(f"  {count:5} {kind}")
    for note, count in sorted(found.notes.items()):
        say(f"  {count:5} {note}")
    return found


def save(base: Path, log: WriteLog, choice: Choice, name: str, to: Path) -> None:
    """Makes the disk of one state again."""
    disk = Disk.of(base, log)
    for cut in states(disk, choice.sampling(partitions(disk.read))):
        if cut.name == name:
            disk.save(to)
            return
    raise RigError(f"there is no state {name!r} with {choice}")


def boot(rig: Rig, verdict: Verdict, known: dict[str, Path]) -> None:
    """Starts a machine with the disk of a state: it must boot what the oracle says, reach the hub,
    end what was under way, and tell the truth."""
    rig.say(f"boots the state {verdict}")
    rig.on()
    try:
        rig.wait_boot(verdict.chosen)
        run = verdict.saved.run if verdict.saved else None
        status = rest(rig, run["id"] if run else None)
    except Untruth:
        raise
    except RigError as error:
        raise Brick(str(error)) from error
    slot = last_slot(rig)
    rig.off()
    with open(rig.disk, "rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        check(rig, status, slot, read, contents(known))


def last_slot(rig: Rig) -> str:
    """The slot that the console showed last."""
    return re.findall(rig.board.slot_seen, rig.machine.console)[-1]


def contents(known: dict[str, Path]) -> dict[str, bytes]:
    """What the images hold, by their versions."""
    return {version: path.read_bytes() for version, path in known.items()}


def run(
    name: str, folder: Path, choice: Choice, boots: int, variant: str = "good"
) -> int:
    """Records, enumerates, boots a sample; returns the exit code."""
    board = boards.board(name)
    packages.build(board.arch)
    tally = Tally()
    problems = []
    known = images(board, variant)
    with Cloud(folder / "cloud") as cloud:
        with RecordedRig(board, cloud, folder / "recorded") as rig:
            try:
                log = record(rig, variant)
            except Exception as error:
                print(f"\n{failed(rig, 'recording', error, BUILD / 'failed')}")
                print(tally)
                return 1
        try:
            found = judge_all(name, rig.base, log, known, choice)
            tally.cuts = found.states
            for verdict in found.bad:
                tally.bricks += bool(verdict.bricks)
                tally.untruths += bool(verdict.untruths)
                problems.append(f"state {verdict}")
            with Rig(board, cloud, folder / "sample") as sample:
                for verdict in chosen(found, boots):
                    problems += boot_one(sample, rig, log, choice, verdict, known, tally)
        except Exception as error:
            # The oracle itself stumbles over a state.
            tally.count_failure(error)
            problems.append(told(error) + "\n" + "".join(traceback.format_exception(error)))
        if problems:
            # The disk of any state can be made again from these two.
            kept = BUILD / "failed" / "recording"
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(parents=True)
            disks.copy(rig.base, kept / "base.img")
            disks.copy(rig.log, kept / "writes.log")
            say(f"the recording is kept: {kept}; {choice}")
    for problem in problems:
        print(f"\n{problem}")
    print(tally)
    return 1 if problems else 0


def boot_one(
    sample: Rig,
    recorded: RecordedRig,
    log: WriteLog,
    choice: Choice,
    verdict: Verdict,
    known: dict[str, Path],
    tally: Tally,
) -> list[str]:
    """Boots the disk of one state, and counts and returns what was wrong."""
    problems = []
    sample.folder.mkdir(exist_ok=True)
    transfers = len(sample.cloud.transfers(recorded.name))
    try:
        save(recorded.base, log, choice, verdict.cut.name, sample.disk)
        boot(sample, verdict, known)
    except Exception as error:
        tally.count_failure(error)
        name = f"state {verdict.cut.name}"
        problems.append(f"booted {verdict}: {failed(sample, name, error, BUILD / 'failed')}")
    finally:
        sample.off()
    tally.count_resumes(sample.cloud.transfers(recorded.name)[transfers:])
    return problems


def chosen(found: Findings, boots: int) -> list[Verdict]:
    """States to be booted, of different kinds; first what the agent has most to do with."""
    first = ["repair", "fetching", "switching", "trial", "verifying", "idle", "nothing saved"]
    kinds = [kind for kind in first if kind in found.samples]
    return [found.samples[kind] for kind in kinds[:boots]]
