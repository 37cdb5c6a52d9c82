"""`make demo VM=1`: one update on the amd64 machine, from the operator's call to the confirmed boot,
as it happens: console, hub and twin side by side."""

import argparse
import json
import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

import boards
import packages
import rootfs
from cloud import DEVICE, Cloud
from process import BUILD, RigError
from stories import BOOT_LIMIT_S, UPDATE_LIMIT_S, Rig

INTRODUCTION = """\
twinboot: one firmware update on a machine that really reboots

A machine (QEMU, emulated, so all is slow) has a disk with a boot partition, two slots and a data
partition. GRUB boots release 1.0.0, a small Debian, from slot A. Its operator calls one method of Azure
IoT Hub, and release 2.0.0 goes over HTTPS into slot B while the machine works on. GRUB then tries slot
B, once. Only a healthy system that reaches the hub is kept.
"""
COLOURS = {"operator": 36, "device": 32, "machine": 33, "twin": 35}
# What is shown of each change of the twin: a place, and leaves below it.
LEAVES = {
    "twinboot": ["bootedSlot", "runningVersion", "confirmed", "slots.A.state", "slots.B.state",
                 "update.phase", "update.percent", "lastUpdate.result", "lastUpdate.reason"],
    "iothubDM.firmwareUpdate": ["status", "lastFirmwareUpdate", "error.code"],
}
# What the console shows, and how that is told.
MILESTONES = [
    (re.compile(r"twinboot: booting slot ([AB]) from (\S+)\r?$"), "machine", r"GRUB boots slot \1 \2"),
    (re.compile(r"\] Linux version (\S+)|^Linux version (\S+)"), "machine", r"Linux \1 starts"),
    (re.compile(r"systemd\[1\]: systemd \S+ running"), "machine", "systemd runs"),
    (re.compile(r"reboot: machine restart"), "machine", "restarts"),
    (re.compile(r"Kernel panic - (.*)"), "machine", r"kernel panic: \1"),
    (re.compile(r"twinbootd\[\d+\]: (.*)"), "device", r"\1"),
]
MARGIN = 22
COLUMNS = 90
LOOK_S = 0.2


class View:
    """Lines of who did what; on a terminal, what the device is doing in a line below them."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.begun = time.monotonic()
        self.known = {}
        self.status = ""

    def line(self, text: str = "") -> None:
        erase = "\r\x1b[K" if self.live and self.status else ""
        print(f"{erase}{text}", flush=True)
        self._draw()

    def tell(self, who: str, text: str) -> None:
        name = f"{who:<9}"
        if self.live:
            name = f"\x1b[{COLOURS[who]}m{name}\x1b[0m"
        self.line(f"{time.monotonic() - self.begun:7.1f} s  {name} {text}")

    def more(self, text: str) -> None:
        self.line(" " * MARGIN + text)

    def doing(self, status: str) -> None:
        if self.live and status != self.status:
            print("\r\x1b[K", end="")
            self.status = status
            self._draw()

    def _draw(self) -> None:
        if self.live and self.status:
            width = shutil.get_terminal_size().columns - 1
            print(f"{self.status[:width]}\r", end="", flush=True)

    def twin(self, patch: dict) -> None:
        """Tells what is new in a reported patch."""
        for place, leaves in LEAVES.items():
            changes = []
            for leaf in leaves:
                value = at(patch, f"{place}.{leaf}")
                if value not in (None, 0) and not isinstance(value, dict) and \
                        self.known.get(f"{place}.{leaf}") != value:
                    self.known[f"{place}.{leaf}"] = value
                    changes.append((leaf, value))
            if changes and [leaf for leaf, _ in changes] != ["update.percent"]:
                shown = ", ".join(f"{leaf} = {json.dumps(value).strip(chr(34))}"
                                  for leaf, value in changes if leaf != "update.percent")
                first, *more = textwrap.wrap(f"{place}: {shown}", COLUMNS, subsequent_indent="  ",
                                             break_long_words=False, break_on_hyphens=False)
                self.tell("twin", first)
                for text in more:
                    self.more(text)
        phase, percent = self.known.get("twinboot.update.phase"), at(patch, "twinboot.update.percent")
        if percent is not None:
            bar = "━" * (percent * 36 // 100)
            self.doing(f"  {phase or '':<12} [{bar:<36}] {percent:3} %")
        elif phase:
            self.doing(f"  {phase}" if phase != "idle" else "")


def at(value, path: str):
    """The value at a place such as `twinboot.update.phase`, or None."""
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


class Follower:
    """Shows what console and hub have said since it last looked."""

    def __init__(self, rig: Rig, cloud: Cloud, view: View):
        self.rig, self.cloud, self.view = rig, cloud, view
        self.shown, self.events = 0, 0

    def until(self, done, limit: float, what: str) -> dict:
        """Shows all that happens until `done` holds for the reported twin, which is returned."""
        deadline = time.monotonic() + limit
        reported = self.cloud.reported()
        while not done(reported):
            if self.rig.machine.ended() or time.monotonic() > deadline:
                raise RigError(f"{what} did not happen:\n{self.rig.machine.tail()}")
            time.sleep(LOOK_S)
            self.console()
            if self.hub():
                reported = self.cloud.reported()
        return reported

    def console(self) -> None:
        text = self.rig.machine.console
        while (end := text.find("\n", self.shown)) >= 0:
            line, self.shown = text[self.shown:end], end + 1
            for pattern, who, words in MILESTONES:
                if match := pattern.search(line.rstrip("\r")):
                    self.view.tell(who, match.expand(words).rstrip())

    def hub(self) -> bool:
        """Whether the device has reported."""
        news = self.cloud.events[self.events:]
        self.events += len(news)
        for event in news:
            if event["event"] == "reported" and event["status"] < 300:
                self.view.twin(event["patch"])
        return any(event["event"] == "reported" for event in news)


def tell(rig: Rig, cloud: Cloud, view: View, fail: bool) -> str:
    """The story; returns its end in a sentence."""
    board = rig.board
    image = rootfs.slot_image(board, "2.0.0", "health-fails" if fail else "good")
    folder = rig.folder
    folder.mkdir(parents=True, exist_ok=True)
    board.make_disk(rig.disk, rootfs.slot_image(board, "1.0.0"), cloud.device_data())
    view.tell("machine", f"is built: {board.arch} with GRUB, 2 slots of {board.slot_mib} MiB"
              f" ({image.stat().st_size >> 20} MiB of {board.filesystem} in A)")
    view.more(f"the hub's page: https://localhost:{cloud.https_port}/")
    rig.on()
    view.tell("machine", "is switched on")
    follower = Follower(rig, cloud, view)
    follower.until(lambda twin: at(twin, "twinboot.confirmed"), BOOT_LIMIT_S, "the first boot")

    url = cloud.publish(image, "rootfs-2.0.0.img")
    payload = {"fwPackageUri": url, "fwVersion": "2.0.0"}
    view.line()
    view.tell("operator", f"POST https://localhost:{cloud.https_port}/twins/{DEVICE}/methods")
    view.more(json.dumps({"methodName": "firmwareUpdate", "payload": payload}))
    called = time.monotonic()
    status, answer = cloud.call("firmwareUpdate", payload)
    view.tell("device", f"answers {status}: {json.dumps(answer)}")
    if status != 200:
        raise RigError("the device refused the update")
    view.line()
    twin = follower.until(
        lambda twin: at(twin, "twinboot.update.phase") == "idle"
        and at(twin, "twinboot.lastUpdate.id") == answer["id"], UPDATE_LIMIT_S, "the end of the update")
    took = time.monotonic() - called
    view.doing("")
    rig.off()
    summary(rig, cloud, view, twin, image, took)
    return judge(rig, twin, fail)


def summary(rig: Rig, cloud: Cloud, view: View, twin: dict, image: Path, took: float) -> None:
    kept = BUILD / "demo"
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(rig.machine_log(), kept / "console.log")
    (kept / "twin.json").write_text(json.dumps(twin, indent=2))
    transfers = cloud.transfers("rootfs-2.0.0.img")
    fetched = sum(transfer["body"] for transfer in transfers)
    variables = rig.board.variables(rig.disk)
    view.line("\nSummary")
    for name, text in {
        "image": f"{image.stat().st_size / (1 << 20):.1f} MiB",
        "fetched": f"{fetched / (1 << 20):.1f} MiB over HTTPS, in {len(transfers)} request(s)",
        "call to last report": f"{took:.0f} s, restarts included",
        "GRUB's variables": " ".join(f"{name}={value!r}" for name, value in sorted(variables.items())),
        "slots in the twin": json.dumps(at(twin, "twinboot.slots")),
        "left behind": f"{kept}: console.log, twin.json",
    }.items():
        view.line(f"  {name:<20} {text}")


def judge(rig: Rig, twin: dict, fail: bool) -> str:
    """Whether machine and twin say what was promised."""
    last = at(twin, "twinboot.lastUpdate")
    runs = (at(twin, "twinboot.bootedSlot"), at(twin, "twinboot.runningVersion"),
            rig.board.next_slot(rig.disk), last["result"])
    if fail:
        if runs != ("A", "1.0.0", "A", "rolledBack"):
            raise RigError(f"the machine did not go back: {runs}, {last}")
        return f"ROLLED BACK: release 1.0.0 runs again from slot A, and the twin says why:\n  {last['reason']}"
    if runs != ("B", "2.0.0", "B", "succeeded") or not at(twin, "twinboot.confirmed") or \
            at(twin, "iothubDM.firmwareUpdate.status") != "applyComplete":
        raise RigError(f"the update was not confirmed: {runs}, {last}")
    return "CONFIRMED: release 2.0.0 runs from slot B, which is the default from now on."


def run(folder: Path, given: argparse.Namespace) -> int:
    """Runs the demo in `folder`; 0 only if it ended as it should."""
    board = boards.board("grub")
    packages.build(board.arch)
    for version in ("1.0.0", "2.0.0"):
        rootfs.slot_image(board, version)
    view = View()
    view.line(INTRODUCTION)
    with Cloud(folder / "cloud") as cloud, Rig(board, cloud, folder / "machine") as rig:
        end = tell(rig, cloud, view, given.fail)
    view.line(f"\n{end}")
    return 0
