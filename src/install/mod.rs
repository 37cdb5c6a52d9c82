//! Puts an image into the slot that is not running. Each way of doing it is one file; nothing
//! outside this folder knows any.

mod block;
mod command;
mod medium;
mod rauc;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

pub use self::block::BlockInstaller;
pub use self::command::CommandInstaller;
pub use self::rauc::RaucInstaller;
use crate::config::{self, InstallKind};
use crate::rauc::RaucError;
use crate::update::{Digest, Failure, FailureKind, Slot, Written};

/// An installer that the fetcher and the agent take turns to call.
pub type SharedInstaller = Arc<Mutex<dyn Installer>>;

/// The installer that the configuration asks for.
#[must_use]
pub fn installer(
    install: &config::Install,
    slots: &config::Slots,
    rauc: &config::Rauc,
) -> SharedInstaller {
    match install.kind {
        InstallKind::Block => Arc::new(Mutex::new(BlockInstaller::new(slots))),
        InstallKind::Command => Arc::new(Mutex::new(CommandInstaller::new(install, slots))),
        InstallKind::Rauc => Arc::new(Mutex::new(RaucInstaller::new(install, slots, rauc))),
    }
}

/// The device of `slot`.
fn device_of(slots: &config::Slots, slot: Slot) -> &Path {
    match slot {
        Slot::A => &slots.a.device,
        Slot::B => &slots.b.device,
    }
}

/// Puts images into slots. Called on a blocking thread.
pub trait Installer: Send {
    /// Bytes that `slot` can take; `None` if only an outside program knows.
    ///
    /// # Errors
    /// The slot cannot be opened.
    fn capacity(&mut self, slot: Slot) -> Result<Option<u64>, InstallError>;

    /// Told before [`Installer::begin`]: an image of at least `image_bytes`, where that is known, is
    /// to go into `slot`.
    ///
    /// # Errors
    /// It cannot; nothing was written.
    fn prepare(&mut self, slot: Slot, image_bytes: Option<u64>) -> Result<(), InstallError> {
        let _ = (slot, image_bytes);
        Ok(())
    }

    /// Opens `slot` for a new image. Until [`ImageSink::finish`], its content is undefined.
    ///
    /// # Errors
    /// Nothing was written.
    fn begin(&mut self, slot: Slot) -> Result<Box<dyn ImageSink>, InstallError>;

    /// Opens `slot` to go on behind its first `written_bytes`, if they read back from the medium
    /// with `digest`; `None` if they do not, or if this installer cannot go on. `progress` as for
    /// [`Installer::digest`].
    ///
    /// # Errors
    /// The slot cannot be read or opened, or `progress` answered no; nothing was written.
    fn resume(
        &mut self,
        slot: Slot,
        written_bytes: u64,
        digest: Digest,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Box<dyn ImageSink>>, InstallError> {
        let _ = (slot, written_bytes, digest, progress);
        Ok(None)
    }

    /// Brings into `slot` what the finished sink has taken, where that is a step of its own: for a
    /// bundle that is kept until a service installs it. May be called twice. `progress` is told per
    /// cent and answers whether the slot is still wanted.
    ///
    /// # Errors
    /// The slot's content is undefined.
    fn apply(
        &mut self,
        slot: Slot,
        written: &Written,
        progress: &mut dyn FnMut(u8) -> bool,
    ) -> Result<(), InstallError> {
        let _ = (slot, written, progress);
        Ok(())
    }

    /// The file that keeps what came until [`Installer::apply`] is done; to be removed when no
    /// update needs it any more.
    fn kept(&self) -> Option<PathBuf> {
        None
    }

    /// Why [`Installer::apply`] cannot be called off, in words for people, if that is so.
    fn uninterruptible(&self) -> Option<&'static str> {
        None
    }

    /// SHA-256 of the first `size_bytes` of `slot` as the medium gives them back, past every
    /// cache; `None` if only an outside program could tell, which then has answered for it.
    /// `progress` is told the bytes read so far and answers whether to go on.
    ///
    /// # Errors
    /// The slot cannot be read, or `progress` answered no ([`InstallError::Interrupted`]).
    fn digest(
        &mut self,
        slot: Slot,
        size_bytes: u64,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Digest>, InstallError> {
        let _ = (slot, size_bytes, progress);
        Ok(None)
    }
}

/// One image on its way into a slot. Dropping it without `finish` abandons the image.
pub trait ImageSink: Send {
    /// Takes the next bytes of the image.
    ///
    /// # Errors
    /// [`InstallError::Full`] if they do not fit; the slot's content is undefined.
    fn write(&mut self, bytes: &[u8]) -> Result<(), InstallError>;

    /// Brings everything taken so far to the medium, so that [`Installer::resume`] can go on
    /// behind it after a power cut. False if this installer cannot.
    ///
    /// # Errors
    /// The medium failed; the slot's content is undefined.
    fn checkpoint(&mut self) -> Result<bool, InstallError>;

    /// Returns once every byte is on the medium.
    ///
    /// # Errors
    /// The medium or the outside program failed; the slot's content is undefined.
    fn finish(self: Box<Self>) -> Result<(), InstallError>;

    /// Ends, from another thread, whatever the sink may be waiting for beyond a medium: its
    /// methods then fail soon. `None` if there is no such thing.
    fn interrupter(&self) -> Option<Interrupter> {
        None
    }
}

/// Ends the wait of an [`ImageSink`]. May be called when the sink is gone already.
pub type Interrupter = Box<dyn Fn() + Send + Sync>;

/// Why an image could not be put into a slot.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The device could not be opened.
    #[error("cannot open {}", device.display())]
    Open {
        /// The slot's device.
        device: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The medium did not take the bytes.
    #[error("cannot write {} at byte {offset}", device.display())]
    Write {
        /// The slot's device.
        device: PathBuf,
        /// First byte that is in doubt.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
    /// The medium did not keep the bytes.
    #[error("cannot bring {} to the medium", device.display())]
    Sync {
        /// The slot's device.
        device: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The medium did not give the bytes back.
    #[error("cannot read {} at byte {offset}", device.display())]
    Read {
        /// The slot's device.
        device: PathBuf,
        /// First byte that is in doubt.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
    /// The image does not fit.
    #[error("the image is larger than {}, which has {capacity_bytes} bytes", device.display())]
    Full {
        /// The slot's device.
        device: PathBuf,
        /// Its size.
        capacity_bytes: u64,
    },
    /// The device is mounted, or in use otherwise.
    #[error("{} is in use: {problem}", device.display())]
    InUse {
        /// The slot's device.
        device: PathBuf,
        /// What uses it.
        problem: String,
    },
    /// The outside installer could not be run, or failed.
    #[error("the installer {} failed: {message}", program.display())]
    Command {
        /// The program.
        program: PathBuf,
        /// Exit code and last words, or why it did not run.
        message: String,
    },
    /// The bundle could not be kept or read.
    #[error("cannot {what} the bundle {}", path.display())]
    Bundle {
        /// What was tried.
        what: &'static str,
        /// Its file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There is no room for the bundle.
    #[error("the bundle has {bundle_bytes} bytes, and there is room for {free_bytes} at {}", path.display())]
    NoRoom {
        /// Where it was to be kept.
        path: PathBuf,
        /// Its length.
        bundle_bytes: u64,
        /// What it may have.
        free_bytes: u64,
    },
    /// A device or a file does not hold what was written.
    #[error("{} reads back as {found} although {expected} was written", device.display())]
    Differs {
        /// The device or file.
        device: PathBuf,
        /// What it holds.
        found: Digest,
        /// What it should hold.
        expected: Digest,
    },
    /// RAUC's service did not do its part; says what to do by itself.
    #[error(transparent)]
    Rauc(#[from] RaucError),
    /// Somebody asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl From<InstallError> for Failure {
    fn from(error: InstallError) -> Failure {
        let advice = match &error {
            InstallError::Open { .. } => "check that slots.*.device names the slot",
            InstallError::Write { .. } | InstallError::Sync { .. } | InstallError::Read { .. } => {
                "check the medium and the kernel's log"
            }
            InstallError::Full { .. } => "build a smaller image",
            InstallError::InUse { .. } => "unmount it, or correct slots.*.device",
            InstallError::Command { .. } => "see the installer's own log",
            InstallError::Bundle { .. } => "check the partition of rauc.bundle_file",
            InstallError::NoRoom { .. } => {
                "make room on that partition, or name another one in rauc.bundle_file"
            }
            InstallError::Differs { .. } => "its medium does not keep what it is given, replace it",
            InstallError::Rauc(error) => {
                return Failure::new(FailureKind::Installer, error.to_string());
            }
            InstallError::Interrupted => "ask for the update again",
        };
        let kind = match &error {
            InstallError::Full { .. } => FailureKind::TooLarge,
            InstallError::Command { .. }
            | InstallError::Bundle { .. }
            | InstallError::NoRoom { .. } => FailureKind::Installer,
            InstallError::Differs { .. } => FailureKind::ReadBack,
            InstallError::Interrupted => FailureKind::Cancelled,
            _ => FailureKind::SlotIo,
        };
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
        Failure::new(kind, format!("{error}{}; {advice}", cause.unwrap_or_default()))
    }
}
