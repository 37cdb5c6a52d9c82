//! Keeps a bundle on the data partition and has RAUC's service install it.
//!
//! The bundle comes through our own fetch, and not by an URL that RAUC is given: so it is resumed,
//! hashed and compared like every image, RAUC's log sees no URL and no secret, and versions of RAUC
//! without streaming do. The price is room for one bundle.
//!
//! RAUC cannot be called off. Whoever wants an end gets it when RAUC is done, and the slot is
//! marked bad then, because RAUC may have made it the next one to boot.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statvfs::{Statvfs, statvfs};
use tracing::{info, warn};

use super::block::read_back;
use super::{ImageSink, InstallError, Installer, device_of};
use crate::config;
use crate::os;
use crate::rauc::{Mark, Rauc, RaucError, Session, SlotStatus};
use crate::update::{Digest, Slot, Written};

/// Room that a bundle leaves on its partition: the state lies there, too.
const RESERVE_BYTES: u64 = 4 << 20;
/// Per cent that are told while the slot is not proven yet.
const NOT_PROVEN: u8 = 99;

/// Why an update cannot be cancelled any more.
const UNINTERRUPTIBLE: &str = "RAUC installs the bundle and cannot be interrupted; wait for its \
                               end and roll back if need be";

/// Has RAUC's service write the slots.
#[derive(Clone, Debug)]
pub struct RaucInstaller {
    rauc: Rauc,
    bundle: PathBuf,
    read_back: bool,
    stall_limit: Duration,
    slots: config::Slots,
}

impl RaucInstaller {
    /// An installer by these settings. Nothing is asked or opened yet.
    #[must_use]
    pub fn new(install: &config::Install, slots: &config::Slots, rauc: &config::Rauc) -> Self {
        RaucInstaller {
            rauc: Rauc::new(rauc),
            bundle: rauc.bundle_file.clone(),
            read_back: rauc.read_back,
            stall_limit: install.stall_limit_s.duration(),
            slots: slots.clone(),
        }
    }

    /// RAUC's slot for ours, if RAUC would write just that one.
    fn target(&self, session: &Session, slot: Slot) -> Result<SlotStatus, RaucError> {
        let slots = session.slots()?;
        let target = self.rauc.find(&slots, slot)?;
        let ours = device_of(&self.slots, slot);
        let devices = format!(
            "RAUC's {} is {}, but slots.{}.device is {}",
            target.name,
            target.device.display(),
            slot.name().to_lowercase(),
            ours.display()
        );
        let problem = if target.is_booted {
            Some(format!("RAUC says that {} runs, but slot {slot} does not", target.name))
        } else {
            match is_same_device(&target.device, ours) {
                Ok(true) => None,
                Ok(false) => Some(devices),
                Err(error) => {
                    Some(format!("{devices}, and one of them cannot be looked at ({error})"))
                }
            }
        };
        problem.map_or_else(|| Ok(target.clone()), |problem| Err(RaucError::Slot { problem }))
    }

    /// The bundle is still the one that was fetched.
    fn prove(
        &self,
        written: &Written,
        progress: &mut dyn FnMut(u8) -> bool,
    ) -> Result<(), InstallError> {
        let mut go_on = |_| progress(0);
        let found = read_back(&self.bundle, written.image_bytes, &mut go_on)?;
        if found == written.image_digest {
            return Ok(());
        }
        let (device, expected) = (self.bundle.clone(), written.image_digest);
        Err(InstallError::Differs { device, found, expected })
    }

    /// Has RAUC install the bundle into `target`.
    fn order(
        &self,
        session: &Session,
        target: &SlotStatus,
        progress: &mut dyn FnMut(u8) -> bool,
    ) -> Result<(), InstallError> {
        let mut wanted = true;
        let mut told = |percent: u8| {
            if wanted && !progress(percent.min(NOT_PROVEN)) {
                wanted = false;
                warn!(
                    slot = target.name,
                    "nobody waits for this bundle any more, but RAUC cannot be stopped: until its end"
                );
            }
        };
        Ok(session.install(&self.bundle, self.stall_limit, &mut told)?)
    }

    /// What RAUC says that it installed, and what the medium says.
    fn check(
        &self,
        session: &Session,
        slot: Slot,
        progress: &mut dyn FnMut(u8) -> bool,
    ) -> Result<(), InstallError> {
        let slots = session.slots()?;
        let target = self.rauc.find(&slots, slot)?;
        if session.primary()?.as_deref() == Some(target.name.as_str()) {
            warn!(
                slot = target.name,
                "RAUC activated the slot by itself; set activate-installed=false in its \
                 system.conf, so that a power cut at this moment does not boot it untold"
            );
        }
        let Some(image) = target.image.filter(|_| target.status == "ok") else {
            let problem = format!(
                "RAUC installed the bundle, but says of {} that its status is \"{}\": the bundle \
                 holds no image for it",
                target.name, target.status
            );
            return Err(RaucError::Slot { problem }.into());
        };
        if !self.read_back || target.kind != "raw" {
            return Ok(());
        }
        let device = device_of(&self.slots, slot);
        let found = read_back(device, image.size_bytes, &mut |_| progress(NOT_PROVEN))?;
        if found == image.digest {
            return Ok(());
        }
        let (device, expected) = (device.to_owned(), image.digest);
        Err(InstallError::Differs { device, found, expected })
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> InstallError {
        let path = self.bundle.clone();
        move |source| InstallError::Bundle { what, path, source }
    }

    fn sink(&self, file: File) -> Box<dyn ImageSink> {
        Box::new(BundleSink { path: self.bundle.clone(), file })
    }
}

impl Installer for RaucInstaller {
    fn capacity(&mut self, _: Slot) -> Result<Option<u64>, InstallError> {
        Ok(None)
    }

    /// Asks RAUC whether it is there, idle and knows the slot, and the partition whether it has
    /// room, before anything is fetched that nobody could install.
    fn prepare(&mut self, slot: Slot, image_bytes: Option<u64>) -> Result<(), InstallError> {
        let session = self.rauc.connect()?;
        if !session.is_idle()? {
            return Err(RaucError::Busy.into());
        }
        self.target(&session, slot)?;
        let folder = self.bundle.parent().unwrap_or(Path::new("/"));
        let room = statvfs(folder).map_err(|error| self.failed("keep")(error.into()))?;
        // What is left of an earlier bundle is overwritten.
        let left_bytes = self.bundle.metadata().map_or(0, |file| file.len());
        let free_bytes = free_bytes(&room).saturating_add(left_bytes).saturating_sub(RESERVE_BYTES);
        match image_bytes {
            Some(bundle_bytes) if bundle_bytes > free_bytes => {
                Err(InstallError::NoRoom { path: self.bundle.clone(), bundle_bytes, free_bytes })
            }
            _ => Ok(()),
        }
    }

    fn begin(&mut self, _: Slot) -> Result<Box<dyn ImageSink>, InstallError> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&self.bundle)
            .map_err(self.failed("keep"))?;
        Ok(self.sink(file))
    }

    fn resume(
        &mut self,
        _: Slot,
        written_bytes: u64,
        digest: Digest,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Box<dyn ImageSink>>, InstallError> {
        let kept_bytes = self.bundle.metadata().map_or(0, |file| file.len());
        if kept_bytes < written_bytes || read_back(&self.bundle, written_bytes, progress)? != digest
        {
            return Ok(None);
        }
        let mut file =
            OpenOptions::new().write(true).open(&self.bundle).map_err(self.failed("keep"))?;
        file.set_len(written_bytes)
            .and_then(|()| file.seek(SeekFrom::End(0)).map(drop))
            .map_err(self.failed("keep"))?;
        Ok(Some(self.sink(file)))
    }

    fn apply(
        &mut self,
        slot: Slot,
        written: &Written,
        progress: &mut dyn FnMut(u8) -> bool,
    ) -> Result<(), InstallError> {
        self.prove(written, progress)?;
        let session = self.rauc.connect()?;
        // It may still work on this very bundle, for the agent that was restarted meanwhile.
        session.wait_until_idle(self.stall_limit, progress)?;
        let target = self.target(&session, slot)?;
        let done = self
            .order(&session, &target, progress)
            .and_then(|()| self.check(&session, slot, progress));
        if progress(NOT_PROVEN) {
            return done;
        }
        // RAUC may have made the slot the next one to boot.
        session.mark(Mark::Bad, &target.name)?;
        info!(slot = target.name, "RAUC is done with what was called off; the slot is marked bad");
        Err(InstallError::Interrupted)
    }

    fn kept(&self) -> Option<PathBuf> {
        Some(self.bundle.clone())
    }

    fn uninterruptible(&self) -> Option<&'static str> {
        Some(UNINTERRUPTIBLE)
    }
}

/// A bundle on its way to the data partition.
#[derive(Debug)]
struct BundleSink {
    path: PathBuf,
    file: File,
}

impl BundleSink {
    fn failed(&self, what: &'static str, source: io::Error) -> InstallError {
        InstallError::Bundle { what, path: self.path.clone(), source }
    }

    fn sync(&self) -> Result<(), InstallError> {
        self.file.sync_all().map_err(|source| self.failed("keep", source))?;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        os::sync_folder(folder).map_err(|error| self.failed("keep", error.source))
    }
}

impl ImageSink for BundleSink {
    fn write(&mut self, bytes: &[u8]) -> Result<(), InstallError> {
        self.file.write_all(bytes).map_err(|source| {
            // A full partition would keep the state from being saved, and with it the bundle.
            let _ = self.file.set_len(0);
            self.failed("keep", source)
        })
    }

    fn checkpoint(&mut self) -> Result<bool, InstallError> {
        self.sync().map(|()| true)
    }

    fn finish(self: Box<Self>) -> Result<(), InstallError> {
        self.sync()
    }
}

/// What a user other than root may still write.
#[allow(clippy::useless_conversion, reason = "these are 32 bits wide on small boards")]
fn free_bytes(room: &Statvfs) -> u64 {
    u64::from(room.blocks_available()).saturating_mul(u64::from(room.fragment_size()))
}

/// Whether two paths lead to one device, or one file. That one of them cannot be looked at is an
/// error: what RAUC would write is not known then.
fn is_same_device(one: &Path, other: &Path) -> io::Result<bool> {
    Ok(match (os::block_number(one)?, os::block_number(other)?) {
        (Some(one), Some(other)) => one == other,
        _ => one.canonicalize()? == other.canonicalize()?,
    })
}
