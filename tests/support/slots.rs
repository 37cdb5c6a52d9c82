//! The two slots of a played device: loop devices where the machine has them, plain files elsewhere.
#![allow(dead_code, reason = "the tests and the demo each use a part")]

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One slot: an image file, and what the daemon sees of it.
#[derive(Debug)]
pub struct Slot {
    /// The file that keeps the content.
    pub file: PathBuf,
    /// What the configuration names: a loop device over the file, or the file itself.
    pub device: PathBuf,
    /// Keeps the loop device. The kernel lets go of it when this is closed, however this process
    /// ends: it was told to detach it already.
    _open: Option<File>,
}

impl Slot {
    /// A slot over `file`, which must exist with its full size.
    pub fn attach(file: &Path, loop_devices: bool) -> io::Result<Self> {
        if loop_devices && let Ok(device) = attach_loop(file) {
            let open = File::open(&device);
            // Told before the first use: it happens at the last close.
            let told = Command::new("losetup").arg("--detach").arg(&device).status();
            let (open, _) = (open?, told?);
            return Ok(Slot { file: file.to_owned(), device, _open: Some(open) });
        }
        Ok(Slot { file: file.to_owned(), device: file.to_owned(), _open: None })
    }

    /// Whether the daemon sees a block device.
    pub fn is_block_device(&self) -> bool {
        std::fs::metadata(&self.device).is_ok_and(|found| found.file_type().is_block_device())
    }

    /// `7:0` for a block device.
    pub fn number(&self) -> Option<String> {
        let found = std::fs::metadata(&self.device).ok()?;
        let number = found.rdev();
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        found.file_type().is_block_device().then(|| format!("{major}:{minor}"))
    }

    /// The text of os-release in the file system of this slot; none if it holds no file system, in
    /// which case nothing can boot from it.
    pub fn os_release(&self) -> Option<String> {
        // In a real system /etc/os-release is a link, which debugfs does not follow.
        ["/usr/lib/os-release", "/etc/os-release"].into_iter().find_map(|path| {
            let output = Command::new("debugfs")
                .args(["-R", &format!("cat {path}")])
                .arg(&self.device)
                .stderr(Stdio::null())
                .output()
                .ok()?;
            String::from_utf8(output.stdout).ok().filter(|text| text.contains('='))
        })
    }
}

/// Detaches whatever loop devices a killed process has left on `file`, as far as that is allowed.
pub fn let_go(file: &Path) {
    let list = ["--noheadings", "--output", "NAME", "--associated"];
    // Without losetup there are none.
    let Ok(output) = Command::new("losetup").args(list).arg(file).output() else { return };
    for device in String::from_utf8_lossy(&output.stdout).lines() {
        let _ = Command::new("losetup").arg("--detach").arg(device.trim()).status();
    }
}

fn attach_loop(file: &Path) -> io::Result<PathBuf> {
    let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output()?;
    match String::from_utf8(output.stdout) {
        Ok(device) if output.status.success() => Ok(device.trim().into()),
        _ => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned())),
    }
}
