//! The writer's thread: hashes the image and hands it to the installer.

use std::sync::{Arc, PoisonError};

use tokio::sync::{mpsc, oneshot};

use super::hash::Hash;
use super::pipeline::{Identity, Piece, Plan, Stop, cancelled, check, length};
use super::unpack::skipped_bytes;
use crate::agent::FetchEvent;
use crate::install::ImageSink;
use crate::update::{Checkpoint, Digest, Failure, FailureKind, HashState, Written};

/// The thread that hashes and writes the image.
pub(super) struct Writer {
    plan: Arc<Plan>,
    stop: Stop,
    hash: Hash,
    written_bytes: u64,
    /// Bytes that come again and are on the medium already.
    skip_bytes: u64,
}

/// What the writer knows once the first bytes are there.
struct Open {
    sink: Box<dyn ImageSink>,
    is_raw: bool,
    identity: Identity,
}

impl Writer {
    /// A writer that has written nothing yet.
    pub(super) fn new(plan: &Arc<Plan>, stop: &Stop) -> Self {
        Writer {
            plan: Arc::clone(plan),
            stop: stop.clone(),
            hash: Hash::default(),
            written_bytes: 0,
            skip_bytes: 0,
        }
    }

    /// Proves the plan's checkpoint, tells whether it counts, and writes until the end of `input`.
    pub(super) fn run(
        mut self,
        mut input: mpsc::Receiver<Piece>,
        resumed: oneshot::Sender<bool>,
    ) -> Result<Written, Failure> {
        let mut sink = self.resume()?;
        // The feed waits for this; it is only gone if the whole fetch was dropped.
        let _ = resumed.send(sink.is_some());
        let mut open = None;
        while let Some(piece) = input.blocking_recv() {
            if self.stop.is_wanted() {
                break;
            }
            match (piece, open.as_mut()) {
                (Piece::Start { is_raw, image_bytes, identity }, _) => {
                    let sink = match sink.take() {
                        Some(sink) => sink,
                        None => self.begin(image_bytes)?,
                    };
                    self.stop.keep(sink.interrupter());
                    open = Some(Open { sink, is_raw, identity });
                    // The wish to stop may have come before the interrupter did.
                    if self.stop.is_wanted() {
                        break;
                    }
                }
                (Piece::Bytes(bytes), Some(open)) => self.write(open, &bytes)?,
                (Piece::Mark { fetched_bytes, fetched_hash }, Some(open)) => {
                    self.checkpoint(open, fetched_bytes, fetched_hash)?;
                }
                (Piece::End(digest), _) => {
                    if let Some(open) = open {
                        return self.end(open, digest);
                    }
                    break;
                }
                (_, None) => break,
            }
        }
        Err(cancelled(&self.plan.url))
    }

    /// Proves the plan's checkpoint on the medium.
    fn resume(&mut self) -> Result<Option<Box<dyn ImageSink>>, Failure> {
        let plan = Arc::clone(&self.plan);
        let Some(checkpoint) = &plan.checkpoint else { return Ok(None) };
        let hashes = (Hash::resume(&checkpoint.image_hash), Hash::resume(&checkpoint.fetched_hash));
        let (Some(hash), Some(_)) = hashes else { return Ok(None) };
        let mut progress = |_| !self.stop.is_wanted();
        let mut installer = plan.installer.lock().unwrap_or_else(PoisonError::into_inner);
        let sink =
            installer.resume(plan.slot, checkpoint.written_bytes, hash.digest(), &mut progress)?;
        if sink.is_some() {
            self.written_bytes = checkpoint.written_bytes;
            self.skip_bytes = skipped_bytes(checkpoint);
            self.hash = hash;
        }
        Ok(sink)
    }

    fn begin(&self, image_bytes: Option<u64>) -> Result<Box<dyn ImageSink>, Failure> {
        let mut installer = self.plan.installer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image_bytes) = image_bytes
            && let Some(capacity) = installer.capacity(self.plan.slot)?
            && image_bytes > capacity
        {
            let detail = format!(
                "the image has {image_bytes} bytes and slot {} only {capacity}; build a smaller \
                 image",
                self.plan.slot
            );
            return Err(Failure::new(FailureKind::TooLarge, detail));
        }
        installer.prepare(self.plan.slot, image_bytes)?;
        Ok(installer.begin(self.plan.slot)?)
    }

    fn write(&mut self, open: &mut Open, bytes: &[u8]) -> Result<(), Failure> {
        let skip = usize::try_from(self.skip_bytes).unwrap_or(usize::MAX).min(bytes.len());
        let (skipped, mut bytes) = bytes.split_at(skip);
        self.skip_bytes -= length(skipped);
        while !bytes.is_empty() {
            let step = self.plan.checkpoint_bytes;
            let space = step - self.written_bytes % step;
            let space = usize::try_from(space).unwrap_or(usize::MAX);
            let count = if open.is_raw { bytes.len().min(space) } else { bytes.len() };
            let (taken, rest) = bytes.split_at(count);
            self.hash.update(taken);
            open.sink.write(taken)?;
            self.written_bytes += length(taken);
            bytes = rest;
            if open.is_raw && count == space {
                self.checkpoint(open, self.written_bytes, self.hash.state())?;
            }
        }
        self.plan.progress.send_modify(|progress| progress.written_bytes = self.written_bytes);
        Ok(())
    }

    fn checkpoint(
        &self,
        open: &mut Open,
        fetched_bytes: u64,
        fetched_hash: HashState,
    ) -> Result<(), Failure> {
        if open.sink.checkpoint()? {
            // An agent that is busy with the last one does without this one.
            let _ = self.plan.events.try_send(FetchEvent::Checkpoint(Checkpoint {
                fetched_bytes,
                written_bytes: self.written_bytes,
                fetched_hash,
                image_hash: self.hash.state(),
                etag: open.identity.validator.clone(),
                total_bytes: open.identity.total_bytes,
            }));
        }
        Ok(())
    }

    fn end(self, open: Open, digest: Option<Digest>) -> Result<Written, Failure> {
        let image_digest = self.hash.digest();
        check(image_digest, digest, &self.plan)?;
        if self.skip_bytes > 0 {
            let detail = format!(
                "{} holds less than when part of it was written; ask for the update again",
                self.plan.url
            );
            return Err(Failure::new(FailureKind::ImageChanged, detail));
        }
        if self.written_bytes == 0 {
            let detail = format!("{} holds no image; build and upload it again", self.plan.url);
            return Err(Failure::new(FailureKind::CorruptImage, detail));
        }
        open.sink.finish()?;
        Ok(Written { image_bytes: self.written_bytes, image_digest, fetched_bytes: 0 })
    }
}
