//! Block devices and mounts, by their numbers.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

/// The number of a block device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DeviceNumber {
    /// Which driver.
    pub major: u64,
    /// Which device of it.
    pub minor: u64,
}

impl DeviceNumber {
    /// Reads `8:2`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once(':')?;
        Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }

    /// False for file systems that lie on no block device, or on several: overlay, tmpfs, NFS,
    /// btrfs.
    #[must_use]
    pub fn is_block_device(self) -> bool {
        self.major != 0
    }

    fn of(raw: u64) -> Self {
        DeviceNumber { major: major(raw), minor: minor(raw) }
    }
}

/// `8:2`
impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Number of the block device at `path`, through symbolic links; `None` if it is not one.
///
/// # Errors
/// There is nothing at `path`, or it cannot be looked at.
pub fn block_number(path: &Path) -> io::Result<Option<DeviceNumber>> {
    let found = path.metadata()?;
    Ok(found.file_type().is_block_device().then(|| DeviceNumber::of(found.rdev())))
}

/// Number of the device that the file system of `path` lies on.
///
/// # Errors
/// There is nothing at `path`, or it cannot be looked at.
pub fn file_system_number(path: &Path) -> io::Result<DeviceNumber> {
    Ok(DeviceNumber::of(path.metadata()?.dev()))
}

/// A file system that is mounted, for instance at `/`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MountedRoot {
    /// The number of its file system.
    pub number: DeviceNumber,
    /// `ext4`, `overlay` and so on.
    pub kind: String,
    /// The device as it was named at the mount; `/dev/root` if the kernel mounted it.
    pub source: PathBuf,
}

/// Finds the root in the text of `/proc/self/mountinfo` (proc(5)): the last mount at `/`, which
/// hides the ones before it.
#[must_use]
pub fn mounted_root(mountinfo: &str) -> Option<MountedRoot> {
    mounts(mountinfo).filter(|(point, _)| *point == "/").last().map(|(_, mounted)| mounted)
}

/// `ext4`, `tmpfs` and so on: what the file system with this number is, by the same text.
#[must_use]
pub fn file_system_kind(mountinfo: &str, number: DeviceNumber) -> Option<String> {
    mounts(mountinfo).find(|(_, mounted)| mounted.number == number).map(|(_, mounted)| mounted.kind)
}

/// Every mount with the place it is at.
fn mounts(mountinfo: &str) -> impl Iterator<Item = (&str, MountedRoot)> {
    mountinfo.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ');
        let number = DeviceNumber::parse(mount.nth(2)?)?;
        let point = mount.nth(1)?;
        let mut file_system = file_system.split(' ');
        let kind = file_system.next()?.to_owned();
        let source = file_system.next()?.into();
        Some((point, MountedRoot { number, kind, source }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_root_among_the_mounts() {
        let sda2 = "25 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw";
        let root = "21 1 179:3 / / ro - squashfs /dev/root ro";
        let proc = "22 25 0:21 / /proc rw - proc proc rw";
        let overlay = "40 1 0:45 / / rw - overlay overlay rw,lowerdir=/a,upperdir=/b";
        for (mountinfo, found) in [
            (format!("{proc}\n{sda2}\n"), Some(("8:2", "ext4", "/dev/sda2"))),
            (format!("{root}\n{proc}\n"), Some(("179:3", "squashfs", "/dev/root"))),
            (format!("{root}\n{overlay}\n"), Some(("0:45", "overlay", "overlay"))),
            (proc.to_owned(), None),
            ("rubbish\n - \n1 2 3 4 5 - 6\n".to_owned(), None),
            (String::new(), None),
        ] {
            let expected = found.map(|(number, kind, source)| MountedRoot {
                number: DeviceNumber::parse(number).unwrap(),
                kind: kind.to_owned(),
                source: source.into(),
            });
            assert_eq!(mounted_root(&mountinfo), expected, "{mountinfo}");
        }
        let all = format!("{root}\n{proc}\n{overlay}\n");
        for (number, kind) in
            [("179:3", Some("squashfs")), ("0:45", Some("overlay")), ("0:1", None)]
        {
            let number = DeviceNumber::parse(number).unwrap();
            assert_eq!(file_system_kind(&all, number).as_deref(), kind, "{number}");
        }
    }
}
