"""Child processes: none outlives the driver, however that ends."""

import os
import subprocess
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build" / "vm"

# Programs for disks and servers live where an ordinary user's PATH does not look.
os.environ["PATH"] += ":/usr/sbin:/sbin"
# Files must not differ between two builds of the same recipe.
os.environ.setdefault("SOURCE_DATE_EPOCH", "1735689600")

_BEGUN = time.monotonic()


class RigError(Exception):
    """Something of the rig itself does not work; the text says what and what to do."""


def say(text: str) -> None:
    """One line of progress, with the time since the driver began."""
    print(f"vm: {time.monotonic() - _BEGUN:6.1f} s  {text}", flush=True)


def tethered(command: list) -> list[str]:
    """`command`, which the kernel kills when the thread that started it is gone."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *map(str, command)]


def spawn(command: list, **options) -> subprocess.Popen:
    """Starts `command`, tethered to the thread that calls, which must live as long as it."""
    options.setdefault("stdin", subprocess.DEVNULL)
    # A session of its own, so that Ctrl-C reaches the driver alone, which ends things in order.
    return subprocess.Popen(tethered(command), start_new_session=True, **options)


def run(command: list, **options) -> str:
    """Runs `command` to its end and returns what it printed; an exit code is a `RigError`."""
    options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("text", True)
    try:
        done = subprocess.run(
            tethered(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )
    except FileNotFoundError as error:
        raise RigError(f"{error.filename} is not there: `make vm-packages-all` installs it") from error
    if done.returncode != 0:
        said = done.stderr if options["text"] else done.stderr.decode(errors="replace")
        words = " ".join(map(str, command))
        raise RigError(f"`{words}` ended with {done.returncode}: {said.strip()[-2000:]}")
    return done.stdout
