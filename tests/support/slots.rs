//! The two slots of a played device: loop devices where the machine has them, plain files elsewhere.
#![allow(dead_code, reason = "the tests and the demo each use a part")]

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::CommandExt;
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
            losetup(&["--detach".as_ref(), device.as_ref()])?;
            let open = open?;
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
    let list = ["--noheadings", "--output", "NAME", "--associated"].map(OsStr::new);
    // Without losetup there are none.
    let devices = losetup(&[&list[..], &[file.as_ref()]].concat()).unwrap_or_default();
    for device in devices.lines() {
        let _ = losetup(&["--detach".as_ref(), device.trim().as_ref()]);
    }
}

fn attach_loop(file: &Path) -> io::Result<PathBuf> {
    let device = losetup(&["--find".as_ref(), "--show".as_ref(), file.as_ref()])?;
    Ok(device.trim().into())
}

/// Runs losetup and returns what it prints. In a process group of its own: a key press that ends
/// this program must not end losetup halfway, which would leave a device behind.
fn losetup(arguments: &[&OsStr]) -> io::Result<String> {
    let output = Command::new("losetup").args(arguments).process_group(0).output()?;
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
