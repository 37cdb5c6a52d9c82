//! Writes slots itself: block devices, or files of a fixed size that stand for them.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use sha2::{Digest as _, Sha256};

use super::medium::{ALIGN, AlignedBuffer, Medium, length};
use super::{ImageSink, InstallError, Installer, device_of};
use crate::config;
use crate::update::{Digest, Slot};

/// How much goes to the medium at once. With less, eMMC and SD cards get slower.
const BATCH_BYTES: usize = 1 << 19;
/// Batches in memory: one is filled while the other is written.
const BATCHES: usize = 2;

/// Writes slots itself, past the page cache where the kernel allows that.
///
/// A file that stands for a slot must have its full size already: it is never made longer.
#[derive(Clone, Debug)]
pub struct BlockInstaller {
    slots: config::Slots,
}

impl BlockInstaller {
    /// An installer for these slots. Nothing is opened yet.
    #[must_use]
    pub fn new(slots: &config::Slots) -> Self {
        BlockInstaller { slots: slots.clone() }
    }
}

impl Installer for BlockInstaller {
    fn capacity(&mut self, slot: Slot) -> Result<Option<u64>, InstallError> {
        Medium::open_to_read(device_of(&self.slots, slot)).map(|medium| Some(medium.capacity()))
    }

    fn begin(&mut self, slot: Slot) -> Result<Box<dyn ImageSink>, InstallError> {
        let medium = Medium::open_to_write(device_of(&self.slots, slot))?;
        Ok(Box::new(BlockSink::new(medium, 0)?))
    }

    fn resume(
        &mut self,
        slot: Slot,
        written_bytes: u64,
        digest: Digest,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Box<dyn ImageSink>>, InstallError> {
        let medium = Medium::open_to_write(device_of(&self.slots, slot))?;
        if written_bytes > medium.capacity()
            || read_back(medium.device(), written_bytes, progress)? != digest
        {
            return Ok(None);
        }
        Ok(Some(Box::new(BlockSink::new(medium, written_bytes)?)))
    }

    fn digest(
        &mut self,
        slot: Slot,
        size_bytes: u64,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Digest>, InstallError> {
        read_back(device_of(&self.slots, slot), size_bytes, progress).map(Some)
    }
}

/// SHA-256 of the first `size_bytes` of `device`, from the medium. Reading and hashing overlap.
pub(super) fn read_back(
    device: &Path,
    size_bytes: u64,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<Digest, InstallError> {
    let mut medium = Medium::open_to_read(device)?;
    medium.settle()?;
    thread::scope(|scope| {
        let (give_back, empty) = channel();
        for _ in 0..BATCHES {
            // The receiver lives in this very function.
            let _ = give_back.send(AlignedBuffer::new(BATCH_BYTES));
        }
        let (full, batches) = sync_channel(BATCHES);
        scope.spawn(move || read_ahead(&mut medium, size_bytes, &empty, &full));
        let mut hash = Sha256::new();
        let mut done_bytes = 0;
        while done_bytes < size_bytes {
            let Ok(batch) = batches.recv() else { break };
            let (buffer, count): (AlignedBuffer, usize) = batch?;
            let bytes = buffer.bytes().get(..count).unwrap_or_default();
            hash.update(bytes);
            done_bytes += length(bytes);
            if !progress(done_bytes) {
                return Err(InstallError::Interrupted);
            }
            // The reader has ended already when it needs no more buffers.
            let _ = give_back.send(buffer);
        }
        Ok(Digest::new(hash.finalize().into()))
    })
}

/// Fills buffers from `empty` with the first `size_bytes` of `medium` and passes them on, until
/// that is done, or failed, or nobody wants them any more.
fn read_ahead(
    medium: &mut Medium,
    size_bytes: u64,
    empty: &Receiver<AlignedBuffer>,
    full: &SyncSender<Result<(AlignedBuffer, usize), InstallError>>,
) {
    let mut offset = 0;
    while offset < size_bytes {
        let Ok(mut buffer) = empty.recv() else { return };
        let wanted = usize::try_from(size_bytes - offset).unwrap_or(usize::MAX);
        let space = buffer.bytes_mut();
        let space_len = wanted.next_multiple_of(ALIGN).min(space.len());
        let (space, _) = space.split_at_mut(space_len);
        let batch = medium.read(offset, space).map(|count| count.min(wanted));
        let count = batch.as_ref().ok().copied();
        if full.send(batch.map(|count| (buffer, count))).is_err() {
            return;
        }
        let Some(count) = count.and_then(|count| u64::try_from(count).ok()) else { return };
        offset += count;
    }
}

/// Bytes on their way to a place on the medium.
struct Batch {
    /// Where they belong; a multiple of [`ALIGN`].
    offset: u64,
    buffer: AlignedBuffer,
    filled: usize,
}

impl Batch {
    fn bytes(&self) -> &[u8] {
        self.buffer.bytes().get(..self.filled).unwrap_or_default()
    }

    fn end(&self) -> u64 {
        self.offset + length(self.bytes())
    }
}

/// What the writing thread is to do.
enum Order {
    Write(Batch),
    Sync,
}

/// What it says when it did.
enum Done {
    Wrote(AlignedBuffer),
    Synced,
    Failed(InstallError),
}

/// Takes an image in memory, while a thread of its own writes what came before.
struct BlockSink {
    device: PathBuf,
    capacity: u64,
    current: Batch,
    empty: Vec<AlignedBuffer>,
    orders: Option<Sender<Order>>,
    done: Receiver<Done>,
    writer: Option<JoinHandle<()>>,
}

impl fmt::Debug for BlockSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockSink").field("device", &self.device).finish_non_exhaustive()
    }
}

impl BlockSink {
    /// A sink that goes on at `position`.
    fn new(mut medium: Medium, position: u64) -> Result<Self, InstallError> {
        let empty: Vec<_> = (1..BATCHES).map(|_| AlignedBuffer::new(BATCH_BYTES)).collect();
        let mut buffer = AlignedBuffer::new(BATCH_BYTES);
        // Only whole pages are written, so the begun one is needed in memory again.
        let page = u64::try_from(ALIGN).unwrap_or(u64::MAX);
        let offset = position - position % page;
        let filled = usize::try_from(position - offset).unwrap_or(0);
        if filled > 0 {
            let (space, _) = buffer.bytes_mut().split_at_mut(ALIGN);
            medium.read(offset, space)?;
        }
        let device = medium.device().to_owned();
        let capacity = medium.capacity();
        let (orders, to_do) = channel();
        let (report, done) = channel();
        let writer = thread::Builder::new()
            .name("slot-writer".to_owned())
            .spawn(move || carry_out(&mut medium, &to_do, &report))
            .map_err(|source| InstallError::Open { device: device.clone(), source })?;
        Ok(BlockSink {
            device,
            capacity,
            current: Batch { offset, buffer, filled },
            empty,
            orders: Some(orders),
            done,
            writer: Some(writer),
        })
    }

    fn order(&self, order: Order) {
        // If the thread has ended, the next look at `done` tells why.
        if let Some(orders) = &self.orders {
            let _ = orders.send(order);
        }
    }

    /// Waits for the writing thread to do something; true if that was a sync.
    fn wait(&mut self) -> Result<bool, InstallError> {
        match self.done.recv() {
            Ok(Done::Wrote(buffer)) => {
                self.empty.push(buffer);
                Ok(false)
            }
            Ok(Done::Synced) => Ok(true),
            Ok(Done::Failed(error)) => Err(error),
            Err(_) => Err(InstallError::Write {
                device: self.device.clone(),
                offset: self.current.offset,
                source: io::Error::other("an earlier write failed"),
            }),
        }
    }

    /// Hands the current batch to the writing thread. The page that is only begun stays here too.
    fn pass_on(&mut self) -> Result<(), InstallError> {
        let mut buffer = loop {
            match self.empty.pop() {
                Some(buffer) => break buffer,
                None => self.wait()?,
            };
        };
        let filled = self.current.filled % ALIGN;
        let (_, begun) = self.current.bytes().split_at(self.current.filled - filled);
        buffer.bytes_mut().split_at_mut(filled).0.copy_from_slice(begun);
        let offset = self.current.end() - length(begun);
        let batch = std::mem::replace(&mut self.current, Batch { offset, buffer, filled });
        self.order(Order::Write(batch));
        Ok(())
    }

    fn sync(&mut self) -> Result<(), InstallError> {
        if self.current.filled > 0 {
            self.pass_on()?;
        }
        self.order(Order::Sync);
        while !self.wait()? {}
        Ok(())
    }
}

impl ImageSink for BlockSink {
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), InstallError> {
        if self.current.end().saturating_add(length(bytes)) > self.capacity {
            return Err(InstallError::Full {
                device: self.device.clone(),
                capacity_bytes: self.capacity,
            });
        }
        while !bytes.is_empty() {
            let filled = self.current.filled;
            let space = self.current.buffer.bytes_mut().get_mut(filled..).unwrap_or_default();
            let count = space.len().min(bytes.len());
            let (taken, rest) = bytes.split_at(count);
            space.split_at_mut(count).0.copy_from_slice(taken);
            self.current.filled += count;
            bytes = rest;
            if self.current.filled == BATCH_BYTES {
                self.pass_on()?;
            }
        }
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<bool, InstallError> {
        self.sync().map(|()| true)
    }

    fn finish(mut self: Box<Self>) -> Result<(), InstallError> {
        self.sync()
    }
}

/// Closes the device before it returns, so that the slot can be opened again at once.
impl Drop for BlockSink {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(writer) = self.writer.take() {
            // It reports its failures through `done`.
            let _ = writer.join();
        }
    }
}

/// Carries out orders until there are no more, or one failed.
fn carry_out(medium: &mut Medium, orders: &Receiver<Order>, done: &Sender<Done>) {
    while let Ok(order) = orders.recv() {
        let result = match order {
            Order::Write(batch) => {
                medium.write(batch.offset, batch.bytes()).map(|()| Done::Wrote(batch.buffer))
            }
            Order::Sync => medium.sync().map(|()| Done::Synced),
        };
        let failed = result.is_err();
        // A sink that is gone does not want to know.
        let _ = done.send(result.unwrap_or_else(Done::Failed));
        if failed {
            return;
        }
    }
}
