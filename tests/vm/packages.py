"""What is built from the sources for the machines: hubsim for the host, our package for the guest."""

import os
import subprocess

from process import REPOSITORY, RigError, say

# Set for a driver that goes on as root: everything is built already.
BUILT = "TWINBOOT_VM_BUILT"
# Debian's architecture names, and the command that makes the package.
_MAKE = {"amd64": ["make", "deb"], "arm64": ["make", "deb", "ARCH=arm64"]}


def build(arch: str) -> None:
    """Brings hubsim and the package for `arch` up to date; quick when they are."""
    if BUILT in os.environ:
        return
    say(f"builds hubsim and the package for {arch}, if their sources have changed")
    for command in (["cargo", "build", "--locked", "--quiet", "--package", "hubsim"], _MAKE[arch]):
        # Not the date that the images have: the program tells by its own whether a clock is set.
        environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True)
        if done.returncode != 0:
            raise RigError(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}"[-4000:])
