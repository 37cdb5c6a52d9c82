//! An installer that counts what it is given.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use twinboot::install::{ImageSink, InstallError, Installer, Interrupter, SharedInstaller};
use twinboot::update::{Digest, Slot};

/// An installer that counts into `bytes` what goes to `inner`.
pub fn counted(inner: SharedInstaller, bytes: &Arc<AtomicU64>) -> SharedInstaller {
    Arc::new(Mutex::new(Counted { inner, bytes: Arc::clone(bytes) }))
}

/// Passes everything on and counts the bytes of images.
struct Counted {
    inner: SharedInstaller,
    bytes: Arc<AtomicU64>,
}

impl Counted {
    fn sink(&self, inner: Box<dyn ImageSink>) -> Box<dyn ImageSink> {
        Box::new(CountedSink { inner, bytes: Arc::clone(&self.bytes) })
    }
}

impl Installer for Counted {
    fn capacity(&mut self, slot: Slot) -> Result<Option<u64>, InstallError> {
        self.inner.lock().unwrap().capacity(slot)
    }

    fn begin(&mut self, slot: Slot) -> Result<Box<dyn ImageSink>, InstallError> {
        let sink = self.inner.lock().unwrap().begin(slot)?;
        Ok(self.sink(sink))
    }

    fn resume(
        &mut self,
        slot: Slot,
        written_bytes: u64,
        digest: Digest,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Box<dyn ImageSink>>, InstallError> {
        let sink = self.inner.lock().unwrap().resume(slot, written_bytes, digest, progress)?;
        Ok(sink.map(|sink| self.sink(sink)))
    }

    fn digest(
        &mut self,
        slot: Slot,
        size_bytes: u64,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Digest>, InstallError> {
        self.inner.lock().unwrap().digest(slot, size_bytes, progress)
    }
}

struct CountedSink {
    inner: Box<dyn ImageSink>,
    bytes: Arc<AtomicU64>,
}

impl ImageSink for CountedSink {
    fn write(&mut self, bytes: &[u8]) -> Result<(), InstallError> {
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.inner.write(bytes)
    }

    fn checkpoint(&mut self) -> Result<bool, InstallError> {
        self.inner.checkpoint()
    }

    fn finish(self: Box<Self>) -> Result<(), InstallError> {
        self.inner.finish()
    }

    fn interrupter(&self) -> Option<Interrupter> {
        self.inner.interrupter()
    }
}
