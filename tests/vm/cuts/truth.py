"""Whether a device that came to rest tells what is so, and the sum of all cuts."""

import time
from collections import Counter
from dataclasses import dataclass, field

from process import RigError, say
from stories import BOOT_LIMIT_S, UPDATE_LIMIT_S, Rig

from cuts.fat import Read
from cuts.layout import partitions
from cuts.oracle import next_slots

# What the hub and the device must agree on.
TOLD = ("bootedSlot", "runningVersion", "confirmed", "lastUpdate")


class Brick(RigError):
    """The machine does not come up, does not reach the hub, or does not come to rest."""


class Untruth(RigError):
    """The device, or the twin, tells what is not so."""


class WrongEnd(RigError):
    """The update ended, and the device tells so, but this cut is no reason for such an end."""


@dataclass
class Tally:
    """What all cuts together came to."""

    cuts: int = 0
    bricks: int = 0
    untruths: int = 0
    resumed: int = 0
    saved_bytes: int = 0
    # How often a cut at this moment (first) was followed by this end of the update (second).
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"cuts {self.cuts}, bricks {self.bricks}, untruthful reports {self.untruths}, "
            f"updates resumed {self.resumed}, bytes saved by resume {self.saved_bytes}"
        )

    def count_failure(self, error: Exception) -> None:
        """Takes the failure of a trial. Whatever the rig stumbled over may be a brick."""
        if isinstance(error, Untruth):
            self.untruths += 1
        elif not isinstance(error, WrongEnd):
            self.bricks += 1

    def count_resumes(self, transfers: list[dict]) -> None:
        """Takes the transfers of one image: what a later one did not fetch again is saved."""
        begins = [
            int(found["range"].removeprefix("bytes=").split("-")[0])
            for found in transfers
            if found["status"] == 206 and found["range"]
        ]
        self.resumed += bool(begins)
        self.saved_bytes += sum(begins)


def rest(rig: Rig, run_id: str | None, connected: bool = False) -> dict:
    """Waits until the device is at rest, and returns what it says of itself, asked in this boot;
    the twin must come to say the same.

    `run_id` is the update that must be over then; `connected` says that the machine is up already.
    """
    deadline = time.monotonic() + UPDATE_LIMIT_S
    try:
        if not connected:
            rig.machine.wait_for(r"connected to the hub", UPDATE_LIMIT_S)
        while True:
            known = len(rig.cloud.events)
            status = rig.ask()
            over = run_id is None or status.get("lastUpdate", {}).get("id") == run_id
            if status.get("update", {}).get("phase") == "idle" and status.get("confirmed") and over:
                break
            _wait_news(rig, known, deadline)
    except RigError as error:
        raise Brick(f"the device does not come to rest: {error}") from error
    try:
        rig.wait(
            lambda twin: all(twin.get("twinboot", {}).get(key) == status.get(key) for key in TOLD),
            BOOT_LIMIT_S, f"the twin says what the device says: {status}",
        )  # fmt: skip
    except RigError as error:
        raise Untruth(str(error)) from error
    return status


def _wait_news(rig: Rig, known: int, deadline: float) -> None:
    """Waits until the hub has seen something new from the device."""
    cloud = rig.cloud
    with cloud._news:
        cloud._news.wait_for(lambda: len(cloud.events) > known, timeout=5)
    if rig.machine.ended():
        raise RigError(f"the machine is off:\n{rig.machine.tail()}")
    if time.monotonic() > deadline:
        raise RigError(f"not within {UPDATE_LIMIT_S} s. The device says: {rig.ask()}")


def end(status: dict) -> str:
    """How the last update ended, with the code of what was wrong."""
    last = status.get("lastUpdate", {})
    code = f" ({last['code']})" if last.get("code") else ""
    return f"{last.get('result')}{code}"


def check(rig: Rig, status: dict, slot: str, read: Read, images: dict[str, bytes]) -> None:
    """Raises `Untruth` unless what the device says is so: `slot` is the one that the console showed
    last, `read` reads the disk, `images` has the whole images by their versions."""
    wrong = []
    if status.get("bootedSlot") != slot:
        wrong.append(f"slot {status.get('bootedSlot')} is told to run, but {slot} was booted")
    version = status.get("runningVersion")
    part = partitions(read)[f"rootfs-{slot.lower()}"]
    if version not in images:
        wrong.append(f"version {version} is told to run, and there is no such image")
    elif read(part.offset, len(images[version])) != images[version]:
        wrong.append(f"slot {slot} does not hold version {version}")
    last = status.get("lastUpdate", {})
    if last.get("result") == "succeeded" and (last.get("slot"), last.get("version")) != (slot, version):
        wrong.append(f"{last} is told, but {version} runs in slot {slot}")
    if last.get("result") in ("failed", "rolledBack") and last.get("slot") == slot:
        wrong.append(f"{last} is told, but slot {slot} runs")
    starts = next_slots(rig.board.name, read)
    if starts[0] != slot:
        wrong.append(f"slot {slot} is told to be confirmed, but {starts[0]} boots next")
    if wrong:
        raise Untruth("; ".join(wrong))
    ended = f"the last update {end(status)}" if last else "no update so far"
    say(f"{rig.board.name}: true: {version} runs in slot {slot}, {ended}")
