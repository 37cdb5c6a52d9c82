//! File systems that a test mounts.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mounted file system; unmounted when dropped.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// Mounts `source` at `at`, which is made if it is missing.
    pub fn new(source: &Path, kind: &str, at: &Path, flags: MsFlags, options: &str) -> Self {
        std::fs::create_dir_all(at).unwrap();
        mount(Some(source), at, Some(kind), flags, Some(options))
            .expect("this test mounts a file system: run it as root");
        Mounted(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
