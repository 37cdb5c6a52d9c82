//! The decoder's thread: from the bytes of a compressed file to those of the image.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::decode::{Decoder, Format};
use super::hash::Hash;
use super::pipeline::{BLOCK_BYTES, Piece, Plan, check, length};
use crate::update::{Checkpoint, Digest, Failure, FailureKind};

/// Why the decoder ended.
pub(super) enum Unpacking {
    /// The file is of no use.
    Failed(Failure),
    /// The writer is gone, and knows why.
    Closed,
}

/// The decoder's thread.
pub(super) struct Unpacker {
    plan: Arc<Plan>,
    output: mpsc::Sender<Piece>,
    block: Vec<u8>,
    hash: Hash,
    fetched_bytes: u64,
    unpacked_bytes: u64,
    /// Whether the part under way is the first that holds any of the image.
    is_first_part: bool,
    /// Where in the image the last mark was told.
    marked_bytes: u64,
}

impl Unpacker {
    /// A thread that goes on at `checkpoint` and passes the image to `output`.
    pub(super) fn new(
        plan: &Arc<Plan>,
        checkpoint: Option<&Checkpoint>,
        output: mpsc::Sender<Piece>,
    ) -> Self {
        Unpacker {
            plan: Arc::clone(plan),
            output,
            block: Vec::new(),
            hash: checkpoint.and_then(|at| Hash::resume(&at.fetched_hash)).unwrap_or_default(),
            fetched_bytes: checkpoint.map_or(0, |at| at.fetched_bytes),
            unpacked_bytes: checkpoint.map_or(0, |at| at.written_bytes - skipped_bytes(at)),
            is_first_part: false,
            marked_bytes: checkpoint.map_or(0, |at| at.written_bytes),
        }
    }

    /// Decompresses until the end of `input`.
    pub(super) fn run(
        mut self,
        format: Format,
        mut input: mpsc::Receiver<Piece>,
    ) -> Result<(), Unpacking> {
        let decoder = Decoder::new(format, self.plan.decoder_memory_bytes);
        let decoder = decoder.map_err(|error| Unpacking::Failed(error.failure(0)))?;
        let Some(mut decoder) = decoder else { return Err(Unpacking::Closed) };
        while let Some(piece) = input.blocking_recv() {
            match piece {
                Piece::Bytes(bytes) => self.unpack(&mut decoder, &bytes)?,
                Piece::End(digest) => return self.end(&decoder, digest),
                Piece::Start { .. } | Piece::Mark { .. } => {}
            }
        }
        Err(Unpacking::Closed)
    }

    fn unpack(&mut self, decoder: &mut Decoder, mut bytes: &[u8]) -> Result<(), Unpacking> {
        loop {
            let begins = decoder.is_between_parts() && bytes.first().is_some_and(|byte| *byte != 0);
            if begins {
                self.is_first_part = self.unpacked_bytes == 0;
            }
            if begins || self.is_first_part {
                self.mark()?;
            }
            if self.block.capacity() == 0 {
                self.block.reserve_exact(BLOCK_BYTES);
            }
            let before = self.block.len();
            let step = decoder
                .decode(bytes, &mut self.block)
                .map_err(|error| Unpacking::Failed(error.failure(self.fetched_bytes)))?;
            let (consumed, rest) = bytes.split_at(step.consumed.min(bytes.len()));
            self.hash.update(consumed);
            self.fetched_bytes += length(consumed);
            self.unpacked_bytes += u64::try_from(self.block.len() - before).unwrap_or(0);
            bytes = rest;
            if self.block.len() == self.block.capacity() {
                self.flush()?;
            } else if bytes.is_empty() {
                return Ok(());
            }
        }
    }

    /// Tells the writer that it may make a checkpoint here, if it has written enough for one: a
    /// decoder can start afresh here, or, as long as there was no such place, at the beginning.
    fn mark(&mut self) -> Result<(), Unpacking> {
        if self.unpacked_bytes < self.marked_bytes.saturating_add(self.plan.checkpoint_bytes) {
            return Ok(());
        }
        self.marked_bytes = self.unpacked_bytes;
        self.flush()?;
        self.send(if self.is_first_part {
            Piece::Mark { fetched_bytes: 0, fetched_hash: Hash::default().state() }
        } else {
            Piece::Mark { fetched_bytes: self.fetched_bytes, fetched_hash: self.hash.state() }
        })
    }

    fn end(mut self, decoder: &Decoder, digest: Option<Digest>) -> Result<(), Unpacking> {
        check(self.hash.digest(), digest, &self.plan).map_err(Unpacking::Failed)?;
        if !decoder.is_between_parts() {
            let kind = FailureKind::CorruptImage;
            let detail = format!(
                "the compressed image {} ends in the middle, after {} bytes; build and upload it \
                 again",
                self.plan.url, self.fetched_bytes
            );
            return Err(Unpacking::Failed(Failure::new(kind, detail)));
        }
        self.flush()?;
        // What is written is not what was fetched, and the digest is about the latter.
        self.send(Piece::End(None))
    }

    fn flush(&mut self) -> Result<(), Unpacking> {
        if self.block.is_empty() {
            return Ok(());
        }
        let block = std::mem::take(&mut self.block);
        self.send(Piece::Bytes(block))
    }

    fn send(&self, piece: Piece) -> Result<(), Unpacking> {
        self.output.blocking_send(piece).map_err(|_| Unpacking::Closed)
    }
}

/// Bytes of the image that come out of the decoder again, although they are on the medium.
pub(super) fn skipped_bytes(checkpoint: &Checkpoint) -> u64 {
    if checkpoint.fetched_bytes == 0 { checkpoint.written_bytes } else { 0 }
}
