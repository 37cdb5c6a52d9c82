"""What must hold on every board: updates that succeed, and images that must not stay."""

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import disk as disks
import rootfs
from boards import Board
from cloud import Cloud, HubError
from process import RigError, say

# Emulated machines on a busy host: only a story that hangs is to be ended by these, in seconds.
BOOT_LIMIT_S = 300
UPDATE_LIMIT_S = 900
# An agent that is tempted by what the twin asks for begins at once; that it does not, nobody tells.
TEMPTATION_S = 10

GOOD = "good"
CABLE_OUT = "cable-out"
# Only where the boot loader is armed by the restart itself (tryboot).
FLAG_LOST = "flag-lost"
# Only where the boot loader's variables lie in a file (GRUB).
ENVIRONMENT_LOST = "environment-lost"


class StoryError(RigError):
    """The product did not do what the story promises."""


def need(holds: bool, what: str, found) -> None:
    """One promise of a story."""
    if not holds:
        raise StoryError(f"{what}, but found: {json.dumps(found, default=str)[:3000]}")


@dataclass(frozen=True)
class Bad:
    """How an image that must not stay ends: the code and the reason in the twin."""

    code: str
    reason: str
    # Whether the image is sent by desired properties, which a device might be tempted to follow
    # again and again, or by method.
    desired: bool = True
    # A line of the failed boot's journal that the twin must show, if that boot got so far.
    journal: str | None = None


# The new slot was started, and its agent was not.
CAME_UP_IN_OLD = "the bootloader came up in the old slot"

# What each variant of `rootfs.VARIANTS` ends with.
BAD = {
    "kernel-missing": Bad("fellBack", CAME_UP_IN_OLD),
    "init-missing": Bad("fellBack", CAME_UP_IN_OLD),
    "panic-at-boot": Bad("fellBack", CAME_UP_IN_OLD, desired=False),
    "agent-missing": Bad("fellBack", CAME_UP_IN_OLD, journal="Failed at step EXEC"),
    "agent-crashes": Bad("fellBack", CAME_UP_IN_OLD, journal="SEGV"),
    "no-network": Bad("unhealthy", "unreachable"),
    "wrong-credentials": Bad("unhealthy", "the hub refused", desired=False),
    "health-fails": Bad("unhealthy", "the pump does not answer", journal="the pump does not"),
    "freezes-early": Bad("fellBack", CAME_UP_IN_OLD),
    "hangs-early": Bad("fellBack", CAME_UP_IN_OLD),
    "clock-unset": Bad("unhealthy", "waiting for the clock to be set"),
}


# The stories of every board, and those of some.
COMMON = [GOOD, *BAD]
OF_BOARD = {"grub": [CABLE_OUT, ENVIRONMENT_LOST], "tryboot": [FLAG_LOST]}
NAMES = [*COMMON, *(name for names in OF_BOARD.values() for name in names)]


class Rig:
    """One machine with its disk and its cloud, through any number of updates."""

    def __init__(self, board: Board, cloud: Cloud, folder: Path):
        self.board, self.cloud, self.folder = board, cloud, folder
        self.disk = folder / "disk.img"
        self.machine = None
        self._updates = 0
        # The hub's events before this start of the machine.
        self._before = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.off()

    def say(self, text: str) -> None:
        say(f"{self.board.name}: {text}")

    def factory(self, version: str = "1.0.0") -> None:
        """A new disk with this version in slot A, switched on and confirmed."""
        image = rootfs.slot_image(self.board, version)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.board.make_disk(self.disk, image, self.cloud.device_data())
        self.on()
        self.wait_settled("A", version)

    def on(self) -> None:
        """Switches the machine on."""
        self._before = len(self.cloud.events)
        self.machine = self.board.machine(self.disk, self.folder, self.cloud.network())

    def off(self) -> None:
        """Pulls the plug."""
        if self.machine:
            self.machine.power_cut()
            self.machine = None

    def wait_boot(self, slot: str, limit: float = BOOT_LIMIT_S) -> None:
        """Waits until the boot loader starts a slot, which must be `slot`."""
        found = self.machine.wait_for(self.board.slot_seen, limit).group(1)
        need(found == slot, f"the boot loader takes slot {slot}", found)

    def wait(self, predicate, limit: float, what: str) -> dict:
        """Waits for the twin while the machine runs."""
        return self.cloud.wait_twin(predicate, limit, what, lambda: not self.machine.ended())

    def wait_settled(self, slot: str, version: str) -> dict:
        """Waits until the device, switched on, has read its twin, and says when asked and in the
        twin that it runs `version` in `slot`, confirmed."""
        self.wait_boot(slot)
        self.cloud.wait_event("twinGet", self._before, BOOT_LIMIT_S, lambda: not self.machine.ended())
        deadline = time.monotonic() + BOOT_LIMIT_S
        while not ((status := self.ask()).get("confirmed") and status["bootedSlot"] == slot):
            need(time.monotonic() < deadline, f"slot {slot} is confirmed", status)
            time.sleep(1)
        def settled(twin):
            ours = twin.get("twinboot", {})
            return ours.get("confirmed") and ours.get("bootedSlot") == slot
        twin = self.wait(settled, BOOT_LIMIT_S, f"slot {slot} is confirmed")
        need(twin["twinboot"]["runningVersion"] == version, f"{version} runs", twin["twinboot"])
        self.say(f"{version} runs in slot {slot}, confirmed")
        return twin

    def ask(self) -> dict:
        """What the device says of itself when asked now; empty while it is not online."""
        try:
            code, status = self.cloud.call("getFirmwareStatus", None)
        except HubError as error:
            if error.code in (404, 504):
                return {}
            raise
        return status if code == 200 else {}

    def send(self, version: str, variant: str = GOOD, desired: bool = False) -> str:
        """Has an image installed; returns the id of the run once the device has taken it."""
        image = rootfs.slot_image(self.board, version, variant)
        self._updates += 1
        self.name = f"{self._updates}-{version}-{variant}.img"
        url = self.cloud.publish(image, self.name)
        before = self.cloud.reported()["twinboot"].get("lastUpdate", {}).get("id")
        self.machine.mark()
        if desired:
            self.cloud.desire({"firmware": {"fwVersion": version, "fwPackageURI": url}})
            # One that is refused at once is over before anybody looks.
            def newest(twin):
                ours = twin["twinboot"]
                last = ours.get("lastUpdate", {}).get("id")
                return last if last != before else ours["update"].get("id")
            twin = self.wait(lambda twin: newest(twin) not in (None, before), UPDATE_LIMIT_S,
                             "the desired image is taken")
            run_id = newest(twin)
        else:
            status, answer = self.cloud.call(
                "firmwareUpdate", {"fwPackageUri": url, "fwVersion": version})
            need(status == 200, "the device takes the update", answer)
            run_id = answer["id"]
        self.say(f"{version} ({variant}) is sent by {'desired properties' if desired else 'method'}")
        return run_id

    def wait_over(self, run_id: str) -> dict:
        """Waits until the run is over."""
        def over(twin):
            ours = twin["twinboot"]
            return ours["update"]["phase"] == "idle" and ours.get("lastUpdate", {}).get("id") == run_id
        return self.wait(over, UPDATE_LIMIT_S, f"the update {run_id} is over")

    def running(self) -> tuple[str, str]:
        """Slot and version that run, as the twin says."""
        ours = self.cloud.reported()["twinboot"]
        return ours["bootedSlot"], ours["runningVersion"]

    def machine_log(self) -> Path:
        """The console of all boots so far."""
        return self.folder / "console.log"

    def keep(self, to: Path) -> None:
        """Keeps what a failure left: disk, console, twin, and the servers' logs."""
        try:
            twin = self.cloud.reported()
        except RigError as error:
            twin = str(error)
        self.off()
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.folder, to, symlinks=True,
                        ignore=shutil.ignore_patterns("qmp", "*.img"))
        if self.disk.exists():
            self.disk.rename(to / "disk.img")
        (to / "twin.json").write_text(json.dumps(twin, indent=2))


def other(slot: str) -> str:
    return "B" if slot == "A" else "A"


def good(rig: Rig, version: str = "2.0.0") -> None:
    """A good image: into the other slot, tried, confirmed, and still there after a power cut; then
    back into the first slot the same way."""
    for _ in range(2):
        slot, old = rig.running()
        new_slot = other(slot)
        new = "2.0.0" if old == "1.0.0" else "1.0.0"
        run_id = rig.send(new)
        rig.wait_boot(new_slot, UPDATE_LIMIT_S)
        rig.say(f"slot {new_slot} is tried")
        twin = rig.wait_over(run_id)
        ours, tutorial = twin["twinboot"], twin["iothubDM"]["firmwareUpdate"]
        need(ours["lastUpdate"]["result"] == "succeeded", "the update succeeded", ours)
        need(ours["bootedSlot"] == new_slot and ours["confirmed"], f"slot {new_slot} runs", ours)
        need(ours["runningVersion"] == new, f"{new} runs", ours)
        need(ours["slots"][new_slot]["state"] == "good", f"slot {new_slot} is good", ours)
        need(tutorial["status"] == "applyComplete", "the tutorials see it", tutorial)
        need(isinstance(tutorial.get("lastFirmwareUpdate"), str), "lastFirmwareUpdate", tutorial)
        rig.off()
        need(rig.board.next_slot(rig.disk) == new_slot, f"the boot loader goes on with {new_slot}",
             rig.board.variables(rig.disk))
        rig.on()
        rig.wait_settled(new_slot, new)


def cable_out(rig: Rig) -> None:
    """A good image is on trial while the network cable is out, for longer than a trial may take, and
    somebody presses the power button meanwhile: it is tried on, and confirmed once the cable is in."""
    slot, old = rig.running()
    new = "2.0.0" if old == "1.0.0" else "1.0.0"
    run_id = rig.send(new, "impatient")
    rig.wait_boot(other(slot), UPDATE_LIMIT_S)
    rig.machine.qmp("set_link", name="nic", up=False)
    rig.say("the cable is out")
    rig.machine.wait_for("waits for the network", BOOT_LIMIT_S)
    # Nothing happens at the end of the usual time, which nobody can be waited for to tell.
    time.sleep(rootfs.FAILING_TRIAL_LIMIT_S + 45)
    need(not re.search(rig.board.slot_seen, rig.machine.unseen()), "the trial goes on", rig.machine.tail())
    rig.machine.qmp("system_powerdown")
    rig.machine.wait_end(BOOT_LIMIT_S)
    rig.say("the machine was switched off in order")
    rig.off()
    rig.on()
    rig.wait_boot(other(slot))
    rig.say(f"slot {other(slot)} is tried on, with the cable in")
    ours = rig.wait_over(run_id)["twinboot"]
    need(ours["lastUpdate"]["result"] == "succeeded", "the update succeeded", ours)
    need(rig.running() == (other(slot), new), f"{new} runs in slot {other(slot)}", ours)


def bad(rig: Rig, variant: str) -> None:
    """An image that must not stay: the device comes back by itself, says why, and is not tempted
    again."""
    ends = BAD[variant]
    slot, old = rig.running()
    run_id = rig.send("6.6.6", variant, ends.desired)
    if variant in rig.board.refused:
        refused(rig, variant, run_id)
        untempted(rig, slot, old, run_id)
        return
    rig.wait_boot(other(slot), UPDATE_LIMIT_S)
    rig.say(f"slot {other(slot)} is tried")
    rig.wait_boot(slot, UPDATE_LIMIT_S)
    rig.say(f"slot {slot} boots again")
    twin = rig.wait_over(run_id)
    ours, tutorial = twin["twinboot"], twin["iothubDM"]["firmwareUpdate"]
    last = ours["lastUpdate"]
    need(last["result"] == "rolledBack", "it was rolled back", last)
    need(last["code"] == ends.code, f"the code is {ends.code}", last)
    need(re.search(ends.reason, last["reason"]), f"the reason tells of {ends.reason!r}", last)
    need(tutorial["status"] == "applyFailed", "the tutorials see it", tutorial)
    need(tutorial["error"]["code"] == ends.code, "the tutorials see why", tutorial)
    need((ours["bootedSlot"], ours["runningVersion"]) == (slot, old), f"{old} runs", ours)
    need(ours["slots"][other(slot)]["state"] == "bad", f"slot {other(slot)} is bad", ours)
    rig.say(f"the twin says: {last['reason']}")
    if ends.journal:
        shows_journal(rig, ends.journal)
    untempted(rig, slot, old, run_id)


def shows_journal(rig: Rig, line: str) -> None:
    """The twin shows what the failed boot wrote last; the report does not wait for that."""
    def told(twin):
        last = twin["twinboot"]["lastUpdate"]
        return "journal" in last or "journalNote" in last
    last = rig.wait(told, BOOT_LIMIT_S, "the failed boot's journal")["twinboot"]["lastUpdate"]
    shown = [text for text in last.get("journal", []) if re.search(line, text)]
    need(shown, f"the failed boot's journal tells of {line!r}", last)
    rig.say(f"its journal: {shown[0]}")


def refused(rig: Rig, variant: str, run_id: str) -> None:
    """The board's installer does not take the image: it is not tried, and the twin says why."""
    twin = rig.wait_over(run_id)
    last, tutorial = twin["twinboot"]["lastUpdate"], twin["iothubDM"]["firmwareUpdate"]
    need((last["result"], last["code"]) == ("failed", "installer"), "the installer refused it", last)
    need(re.search(rig.board.refused[variant], last["reason"]), "the reason tells why", last)
    need(tutorial["error"]["code"] == "installer", "the tutorials see why", tutorial)
    rig.say(f"the twin says: {last['reason']}")


def untempted(rig: Rig, slot: str, old: str, run_id: str) -> None:
    """One more start, with all counters at their limits: nothing is tried again."""
    fetched = len(rig.cloud.transfers(rig.name))
    rig.off()
    variables = rig.board.variables(rig.disk)
    need(rig.board.next_slot(rig.disk) == slot, f"the boot loader keeps to slot {slot}", variables)
    rig.on()
    rig.wait_settled(slot, old)
    time.sleep(TEMPTATION_S)
    ours = rig.ask()
    need(ours["update"]["phase"] == "idle" and ours["lastUpdate"]["id"] == run_id,
         "nothing is tried again", ours)
    need(len(rig.cloud.transfers(rig.name)) == fetched, "nothing is fetched again",
         rig.cloud.transfers(rig.name))


def flag_lost(rig: Rig) -> None:
    """The power goes after the update is armed and before the restart: a flag for one start that
    the firmware keeps in memory is lost. The update is armed again, and says so."""
    slot, old = rig.running()
    new = "2.0.0" if old == "1.0.0" else "1.0.0"
    run_id = rig.send(new)
    # Once before the boot loader is told, once after.
    for _ in range(2):
        rig.machine.wait_for(f"restarting into slot {other(slot)}", UPDATE_LIMIT_S)
    rig.off()
    rig.say("the plug is pulled between arming and the restart")
    rig.on()
    rig.wait_boot(slot)
    rig.wait_boot(other(slot), UPDATE_LIMIT_S)
    rig.say(f"armed again: slot {other(slot)} is tried")
    last = rig.wait_over(run_id)["twinboot"]["lastUpdate"]
    need(last["result"] == "succeeded", "the update succeeded", last)
    need(last.get("armedAgain") == 1, "it says that it was armed again", last)
    need(rig.running() == (other(slot), new), f"{new} runs in slot {other(slot)}", rig.running())


def environment_lost(rig: Rig) -> None:
    """A tool that truncates the boot loader's variables before it writes them, and the power goes:
    the machine boots all the same, and the agent makes them anew."""
    slot, version = rig.running()
    need(slot == "A", "the story begins in slot A, which the spare variables know as good", slot)
    rig.off()
    disks.write_fat(rig.disk, "boot", "grubenv", b"")
    rig.on()
    rig.machine.wait_for("the spare block is used", BOOT_LIMIT_S)
    rig.wait_settled(slot, version)
    # The machine runs meanwhile, but the agent syncs what it writes, and nobody tells that it has.
    deadline = time.monotonic() + BOOT_LIMIT_S
    while time.monotonic() < deadline:
        try:
            variables = rig.board.variables(rig.disk)
            break
        except (ValueError, RigError):
            time.sleep(1)
    else:
        raise StoryError("the boot loader's variables are not made anew")
    need(variables["A_OK"] == "1" and variables["B_OK"] == "0", "slot A boots", variables)
    rig.off()
    rig.on()
    rig.wait_settled(slot, version)
    need("the spare block" not in rig.machine.console, "grubenv can be read again", variables)


def tell(name: str):
    """The story with this name, as a function of the rig."""
    if name == GOOD:
        return good
    if name == CABLE_OUT:
        return cable_out
    if name == FLAG_LOST:
        return flag_lost
    if name == ENVIRONMENT_LOST:
        return environment_lost
    if name in BAD:
        return lambda rig: bad(rig, name)
    raise RigError(f"no story {name}; there are: {', '.join(NAMES)}")
