"""Many trials, one after the other on one machine as long as it lives."""

import shutil
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import disk as disks
from process import say
from stories import Rig

from cuts.truth import Tally

FIRST_BOOT = "first boot"
T = TypeVar("T")


def run_all(
    left: list[T],
    machine: Callable[[str], AbstractContextManager[Rig]],
    trial: Callable[[Rig, T], None],
    name: Callable[[T], str],
    tally: Tally,
    kept: Path,
) -> list[str]:
    """Takes the trials from the list, and counts and returns what failed.

    `machine` makes a rig for the trials from the one with this name on. Whatever goes wrong in a
    trial is its failure, keeps the evidence in a folder of `kept`, and the next trial begins with a
    new machine. Where a new machine does not even come up, the trials that are left are not run.
    """
    failures = []
    while left:
        current = FIRST_BOOT
        try:
            with machine(name(left[0])) as rig:
                try:
                    rig.factory()
                    while left:
                        item = left.pop(0)
                        current = name(item)
                        trial(rig, item)
                except Exception as error:
                    if current != FIRST_BOOT:
                        tally.count_failure(error)
                    failures.append(failed(rig, current, error, kept))
        except Exception as error:
            # The machine could not be made, or did not end in order.
            failures.append(f"{current}: {told(error)}")
            say(f"FAILED: {failures[-1]}")
        if current == FIRST_BOOT:
            failures.append(f"{len(left)} trials are not run")
            break
    return failures


def told(error: Exception) -> str:
    """What an error says; its kind, too, as those that nobody expected need it."""
    return f"{type(error).__name__}: {error}"


def failed(rig: Rig, name: str, error: Exception, kept: Path) -> str:
    """Keeps what a failure left, and says what it was and where that lies. Never raises."""
    to = kept / name.replace(" ", "-")
    text = f"{name}: {told(error)}"
    try:
        try:
            rig.keep(to)
        except Exception as also:
            text += f"\nnot all could be kept: {told(also)}"
            to.mkdir(parents=True, exist_ok=True)
        for left in rig.folder.glob("*"):
            # The disks of the trial, and what `Rig.keep` did not come to.
            if left.is_file() and not (to / left.name).exists():
                disks.copy(left, to / left.name)
        (to / "error.txt").write_text("".join(traceback.format_exception(error)))
        if rig.cloud.folder.is_dir():
            shutil.copytree(rig.cloud.folder, to / "cloud", symlinks=True, dirs_exist_ok=True)
    except Exception as also:
        text += f"\nnot all could be kept: {told(also)}"
    text += f"\nkept: {to}"
    say(f"FAILED: {text}")
    return text
