"""`python3 tests/vm COMMAND`: real boots, in emulated machines."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import boards
import demo
import packages
import rootfs
import stories
from cloud import Cloud
from cuts import enumerate, ioerrors, soak
from process import BUILD, RigError, say

CUTS = Path(__file__).parent / "cuts"

# What the sets run: a board, and its stories in this order on one machine.
CI = {"grub": ["good", "kernel-missing", "init-missing", "health-fails"]}
SHORT = {
    "grub": ["good", "hangs-early"],
    "uboot": ["good"],
    "tryboot": ["good"],
}
ALL = {board: [*stories.COMMON, *stories.OF_BOARD.get(board, [])] for board in SHORT}


@dataclass
class Outcome:
    """How a story ended."""

    board: str
    story: str
    seconds: float
    problem: str | None = None


def tell_stories(wanted: dict[str, list[str]]) -> int:
    """Runs the stories and returns the exit code."""
    outcomes = []
    for name, names in wanted.items():
        board = boards.board(name)
        packages.build(board.arch)
        rootfs.slot_image(board, "1.0.0")
        queue = list(names)
        while queue:
            outcomes += run_on_one_machine(board, queue)
    print("\n  board    story               result   seconds")
    for outcome in outcomes:
        result = "FAILED" if outcome.problem else "ok"
        print(f"  {outcome.board:<8} {outcome.story:<19} {result:<8} {outcome.seconds:7.0f}")
    for outcome in outcomes:
        if outcome.problem:
            print(f"\n{outcome.board} {outcome.story}: {outcome.problem}")
    return 1 if any(outcome.problem for outcome in outcomes) else 0


def run_on_one_machine(board, queue: list[str]) -> list[Outcome]:
    """Takes stories from the queue until it is empty or one fails: the next one then deserves a new
    machine."""
    outcomes = []
    folder = run_folder(board.name)
    try:
        with Cloud(folder / "cloud") as cloud, stories.Rig(board, cloud, folder / "machine") as rig:
            story, begun = "first boot", time.monotonic()
            try:
                rig.factory()
                outcomes.append(Outcome(board.name, story, time.monotonic() - begun))
                while queue:
                    story, begun = queue.pop(0), time.monotonic()
                    say(f"{board.name}: story {story}")
                    stories.tell(story)(rig)
                    outcomes.append(Outcome(board.name, story, time.monotonic() - begun))
            # Whatever it is: what it left is kept, and the other stories are told.
            except Exception as error:
                took = time.monotonic() - begun
                kept = BUILD / "failed" / f"{board.name}-{story.replace(' ', '-')}"
                rig.keep(kept)
                shutil.copytree(folder / "cloud", kept / "cloud", symlinks=True)
                say(f"{board.name}: story {story} FAILED; disk, console and twin: {kept}")
                outcomes.append(Outcome(board.name, story, took, f"{error!r}\nkept: {kept}"))
                if story == "first boot":
                    queue.clear()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def run_folder(name: str) -> Path:
    """A folder for this run; those of runs that were killed are removed."""
    runs = BUILD / "run"
    runs.mkdir(parents=True, exist_ok=True)
    for left in runs.iterdir():
        owner = left.name.rpartition("-")[2]
        if not (owner.isdigit() and Path(f"/proc/{owner}").exists()):
            shutil.rmtree(left, ignore_errors=True)
    folder = runs / f"{name}-{os.getpid()}"
    folder.mkdir()
    return folder


def build(names: list[str]) -> int:
    """Everything that the stories need beforehand."""
    for name in names:
        board = boards.board(name)
        packages.build(board.arch)
        rootfs.slot_image(board, "1.0.0")
        rootfs.slot_image(board, "2.0.0")
        for variant in stories.BAD:
            rootfs.slot_image(board, "6.6.6", variant)
        say(f"{name}: the images are ready")
    return 0


def parts() -> int:
    """The parts of the power-cut rig that need no machine."""
    return subprocess.run([sys.executable, CUTS / "test_parts.py"], check=False).returncode


def cuts_of(board: str) -> int:
    """The disks that power cuts in one update leave: hundreds of states, three of them booted."""
    return with_folder("enumerate", lambda folder: enumerate.run(
        board, folder, enumerate.Choice(seed=1), boots=3))


def with_folder(name: str, work) -> int:
    """Runs `work(folder)` with a folder that is removed afterwards."""
    folder = run_folder(name)
    try:
        return work(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 tests/vm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="package, hub and images; kept until they change")
    one.add_argument("board", nargs="*", default=list(SHORT))
    one = commands.add_parser("demo", help="one update on the amd64 machine, live")
    one.add_argument("--fail", action="store_true", help="an image that must not stay")
    commands.add_parser("ci", help="what fits into CI's time")
    commands.add_parser("short", help="every board: some stories")
    commands.add_parser("all", help="every board: all stories, and all that fails in disks")
    one = commands.add_parser("story", help="chosen stories on one board")
    one.add_argument("board")
    one.add_argument("name", nargs="+", help=f"all, or of: {', '.join(stories.NAMES)}")
    commands.add_parser("parts", help="the power-cut rig's own tests, without a machine")
    one = commands.add_parser("enumerate", help="every state that a power cut could leave in an"
                              " update, and some of them booted")
    one.add_argument("--board", default="grub")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--losses", type=int, default=1, metavar="N",
                     help="random losses of unflushed writes for each write (1)")
    one.add_argument("--atom", type=int, default=512, metavar="BYTES",
                     help="what the medium writes as a whole (512)")
    one.add_argument("--boots", type=int, default=3, metavar="N",
                     help="states that are booted (3)")
    one.add_argument("--variant", default="good", help="of the image: an update that is rolled back"
                     f" with one of {', '.join(stories.BAD)}")
    one = commands.add_parser("soak", help="power cuts at random moments of the story")
    one.add_argument("--board", default="grub")
    one.add_argument("trials", type=int)
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--only", type=int, metavar="TRIAL", help="this trial of the seed alone")
    one = commands.add_parser("ioerrors", help="updates on disks that fail")
    one.add_argument("--board", default="grub")
    one.add_argument("case", nargs="*", help=f"of: {', '.join(map(repr, ioerrors.NAMES))}")
    return parser.parse_args()


def names_of_boards(given: argparse.Namespace) -> list[str]:
    """The boards that a command uses."""
    match given.command:
        case "short" | "all":
            return list(ALL)
        case "ci":
            return list(CI)
        case "build":
            return given.board
        case _:
            return [getattr(given, "board", "grub")]


def as_root(given: argparse.Namespace) -> None:
    """Goes on as root, which root file systems need. What is built from the sources is built before
    that, by the one who has the compilers."""
    if os.geteuid() == 0:
        return
    if not shutil.which("sudo"):
        raise RigError("root file systems need root to be made: run this as root, or install sudo")
    for arch in sorted({boards.board(name).arch for name in names_of_boards(given)}):
        packages.build(arch)
    os.execvp("sudo", ["sudo", "--preserve-env=PATH", "env", f"{packages.BUILT}=1",
                       sys.executable, *sys.argv])


def main() -> int:
    given = arguments()
    # The children are tethered, and the `with` blocks end what is under way in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if given.command != "parts":
            as_root(given)
        match given.command:
            case "build":
                return build(given.board)
            case "demo":
                return with_folder("demo", lambda folder: demo.run(folder, given))
            case "ci":
                return parts() or tell_stories(CI)
            case "short":
                return parts() or tell_stories(SHORT)
            case "all":
                return parts() or max(tell_stories(ALL), *map(cuts_of, ALL), with_folder(
                    "ioerrors", lambda folder: ioerrors.run("grub", folder, [])))
            case "story":
                names = ALL.get(given.board, []) if given.name == ["all"] else given.name
                for name in names:
                    stories.tell(name)
                return tell_stories({given.board: names})
            case "parts":
                return parts()
            case "enumerate":
                return with_folder("enumerate", lambda folder: enumerate.run(
                    given.board, folder,
                    enumerate.Choice(given.seed, given.losses, given.atom // 512),
                    given.boots, given.variant))
            case "soak":
                return with_folder("soak", lambda folder: soak.run(
                    given.board, folder, given.seed, given.trials, given.only))
            case "ioerrors":
                return with_folder("ioerrors", lambda folder: ioerrors.run(
                    given.board, folder, given.case))
    except RigError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vm: interrupted", file=sys.stderr)
        return 130


sys.exit(main())
