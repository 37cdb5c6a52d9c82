//! From the network into the slot: small blocks through bounded channels.
//!
//! ```text
//! network (async) ──blocks──▶ unpack: hash of the file, decoder ──blocks──▶ write: hash of the
//!                    └─────────────────── a raw image ─────────────────────▶ image, slot
//! ```
//! Each arrow is a thread boundary, so that TLS, decompression, hashing and the medium overlap.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_util::sync::CancellationToken;

use super::decode::{Decoder, Format};
use super::hash::Hash;
use crate::agent::FetchEvent;
use crate::install::{ImageSink, Interrupter, SharedInstaller};
use crate::update::{
    Checkpoint, Digest, Failure, FailureKind, HashState, ImageUrl, Progress, Slot, Written,
};

/// Bytes that travel from thread to thread at once.
const BLOCK_BYTES: usize = 256 * 1024;
/// Blocks that may wait between two threads.
const BLOCKS_WAITING: usize = 2;

/// What is to be written, and where.
pub(super) struct Plan {
    pub(super) url: ImageUrl,
    pub(super) installer: SharedInstaller,
    pub(super) slot: Slot,
    pub(super) checkpoint: Option<Checkpoint>,
    /// Bytes written between two checkpoints.
    pub(super) checkpoint_bytes: u64,
    pub(super) decoder_memory_bytes: u64,
    /// What the file must hash to.
    pub(super) digest: Option<Digest>,
    pub(super) events: mpsc::Sender<FetchEvent>,
    pub(super) progress: watch::Sender<Progress>,
    pub(super) cancel: CancellationToken,
}

/// The file as the server names it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Identity {
    /// What changes when the file changes: a strong `ETag`, else a `Last-Modified` date.
    pub(super) validator: Option<String>,
    /// Its length.
    pub(super) total_bytes: Option<u64>,
}

impl Identity {
    /// Whether both cannot be the same file.
    pub(super) fn differs_from(&self, other: &Identity) -> bool {
        let is_tag = |validator: &str| validator.starts_with('"');
        let validators = self.validator.as_deref().zip(other.validator.as_deref());
        // A tag and a date tell nothing about each other.
        validators.is_some_and(|(a, b)| is_tag(a) == is_tag(b) && a != b)
            || self.total_bytes.zip(other.total_bytes).is_some_and(|(a, b)| a != b)
    }
}

/// The other end is gone; [`Feed::abandon`] tells why.
#[derive(Debug)]
pub(super) struct Closed;

/// What flows towards the slot.
enum Piece {
    /// Comes first, before any byte.
    Start {
        is_raw: bool,
        /// The image has at least so many bytes.
        image_bytes: Option<u64>,
        identity: Identity,
    },
    Bytes(Vec<u8>),
    /// A decoder could start afresh here.
    Boundary {
        fetched_bytes: u64,
        fetched_hash: HashState,
    },
    /// Comes last, with the digest that the written bytes must have, if there is one.
    End(Option<Digest>),
}

/// The network's end of the pipeline.
pub(super) struct Feed {
    plan: Arc<Plan>,
    /// The plan's checkpoint, if it is proven.
    checkpoint: Option<Checkpoint>,
    identity: Identity,
    block: Vec<u8>,
    pieces: mpsc::Sender<Piece>,
    is_started: bool,
    /// The decoder's thread, for compressed images.
    unpacker: Option<JoinHandle<Result<(), Unpacking>>>,
    writer: JoinHandle<Result<Written, Failure>>,
    stop: Stop,
}

impl Feed {
    /// Starts the pipeline and proves the plan's checkpoint, if it has one.
    pub(super) async fn open(plan: Plan) -> Self {
        let stop = Stop { token: plan.cancel.child_token(), interrupter: Arc::default() };
        let plan = Arc::new(plan);
        let (pieces, input) = mpsc::channel(BLOCKS_WAITING);
        let (tell, resumed) = oneshot::channel();
        let writer = Writer {
            plan: Arc::clone(&plan),
            stop: stop.clone(),
            hash: Hash::default(),
            written_bytes: 0,
        };
        let writer = spawn_blocking(move || writer.run(input, tell));
        let resumed = resumed.await.unwrap_or(false);
        let checkpoint = plan.checkpoint.clone().filter(|_| resumed);
        Feed {
            plan,
            checkpoint,
            identity: Identity::default(),
            block: Vec::new(),
            pieces,
            is_started: false,
            unpacker: None,
            writer,
            stop,
        }
    }

    /// The checkpoint to go on from; if `None`, the image must be fetched from its beginning.
    pub(super) fn checkpoint(&self) -> Option<&Checkpoint> {
        self.checkpoint.as_ref()
    }

    /// Says what the server calls the file; before the first [`Feed::push`].
    pub(super) fn identify(&mut self, identity: Identity) {
        self.identity = identity;
    }

    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// They do not get through.
    pub(super) async fn push(&mut self, mut bytes: &[u8]) -> Result<(), Closed> {
        while !bytes.is_empty() {
            if self.block.capacity() == 0 {
                self.block.reserve_exact(BLOCK_BYTES);
            }
            let space = BLOCK_BYTES.saturating_sub(self.block.len());
            let (taken, rest) = bytes.split_at(space.min(bytes.len()));
            self.block.extend_from_slice(taken);
            bytes = rest;
            if self.block.len() >= BLOCK_BYTES {
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// Says that there are no more bytes.
    ///
    /// # Errors
    /// It does not get through.
    pub(super) async fn end(&mut self) -> Result<(), Closed> {
        self.flush().await?;
        self.pieces.send(Piece::End(self.plan.digest)).await.map_err(|_| Closed)
    }

    /// Waits until the whole image is on the medium, after [`Feed::end`].
    pub(super) async fn finish(self) -> Result<Written, Failure> {
        let Feed { plan, pieces, unpacker, writer, stop, .. } = self;
        drop(pieces);
        let work = join(unpacker, writer, &stop);
        tokio::pin!(work);
        // Cancel-safe: the work is pinned and awaited in any case.
        tokio::select! {
            written = &mut work => written,
            () = plan.cancel.cancelled() => {
                stop.now();
                work.await.map_err(|_| cancelled(&plan.url))
            }
        }
    }

    /// Leaves the image unfinished and waits until the slot is closed. The answer is `failure`,
    /// or else why the pipeline closed.
    pub(super) async fn abandon(self, failure: Option<Failure>) -> Failure {
        let Feed { pieces, unpacker, writer, stop, .. } = self;
        if failure.is_some() {
            stop.now();
        }
        drop(pieces);
        let written = join(unpacker, writer, &stop).await;
        failure.or(written.err()).unwrap_or_else(lost_thread)
    }

    /// Sends the block under way, and before the first one what is known of the image.
    async fn flush(&mut self) -> Result<(), Closed> {
        if !self.is_started {
            self.start().await?;
        }
        if self.block.is_empty() {
            return Ok(());
        }
        let block = std::mem::take(&mut self.block);
        self.pieces.send(Piece::Bytes(block)).await.map_err(|_| Closed)
    }

    async fn start(&mut self) -> Result<(), Closed> {
        let checkpoint = self.checkpoint.as_ref();
        let format = match checkpoint {
            Some(checkpoint) if is_raw(checkpoint) => Format::Raw,
            _ => Format::of(&self.block),
        };
        let image_bytes = match checkpoint {
            Some(_) if format != Format::Raw => None,
            _ => format.image_bytes(&self.block, self.identity.total_bytes),
        };
        let is_raw = format == Format::Raw;
        self.is_started = true;
        let start = Piece::Start { is_raw, image_bytes, identity: self.identity.clone() };
        self.pieces.send(start).await.map_err(|_| Closed)?;
        if is_raw {
            return Ok(());
        }
        // From here on the network feeds the decoder, and the decoder feeds the writer.
        let (pieces, input) = mpsc::channel(BLOCKS_WAITING);
        let checkpoint = self.checkpoint.as_ref();
        let output = std::mem::replace(&mut self.pieces, pieces);
        let unpacker = Unpacker {
            plan: Arc::clone(&self.plan),
            output,
            block: Vec::new(),
            hash: checkpoint.and_then(|at| Hash::resume(&at.fetched_hash)).unwrap_or_default(),
            fetched_bytes: checkpoint.map_or(0, |checkpoint| checkpoint.fetched_bytes),
            unpacked_bytes: 0,
            boundary_at: 0,
        };
        self.unpacker = Some(spawn_blocking(move || unpacker.run(format, input)));
        Ok(())
    }
}

/// Waits for the threads to end. The decoder's failure explains the writer's.
async fn join(
    unpacker: Option<JoinHandle<Result<(), Unpacking>>>,
    writer: JoinHandle<Result<Written, Failure>>,
    stop: &Stop,
) -> Result<Written, Failure> {
    let unpacked = match unpacker {
        Some(unpacker) => unpacker.await.unwrap_or(Ok(())),
        None => Ok(()),
    };
    if let Err(Unpacking::Failed(failure)) = unpacked {
        stop.now();
        // It was only told to leave the image unfinished.
        let _ = writer.await;
        return Err(failure);
    }
    writer.await.unwrap_or_else(|_| Err(lost_thread()))
}

/// Whether the image is fetched as it is written: then both hashes are over the same bytes.
fn is_raw(checkpoint: &Checkpoint) -> bool {
    checkpoint.fetched_hash == checkpoint.image_hash
}

/// Ends the threads of a pipeline.
#[derive(Clone)]
struct Stop {
    token: CancellationToken,
    interrupter: Arc<Mutex<Option<Interrupter>>>,
}

impl Stop {
    fn keep(&self, interrupter: Option<Interrupter>) {
        *self.interrupter.lock().unwrap_or_else(PoisonError::into_inner) = interrupter;
    }

    fn now(&self) {
        self.token.cancel();
        let interrupter = self.interrupter.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupt) = interrupter.as_ref() {
            interrupt();
        }
    }
}

/// Why the decoder ended.
enum Unpacking {
    /// The file is of no use.
    Failed(Failure),
    /// The writer is gone, and knows why.
    Closed,
}

/// The decoder's thread.
struct Unpacker {
    plan: Arc<Plan>,
    output: mpsc::Sender<Piece>,
    block: Vec<u8>,
    hash: Hash,
    fetched_bytes: u64,
    unpacked_bytes: u64,
    /// Where in the image the last boundary was told.
    boundary_at: u64,
}

impl Unpacker {
    fn run(mut self, format: Format, mut input: mpsc::Receiver<Piece>) -> Result<(), Unpacking> {
        let decoder = Decoder::new(format, self.plan.decoder_memory_bytes);
        let decoder = decoder.map_err(|error| Unpacking::Failed(error.failure(0)))?;
        let Some(mut decoder) = decoder else { return Err(Unpacking::Closed) };
        while let Some(piece) = input.blocking_recv() {
            match piece {
                Piece::Bytes(bytes) => self.unpack(&mut decoder, &bytes)?,
                Piece::End(digest) => return self.end(&decoder, digest),
                Piece::Start { .. } | Piece::Boundary { .. } => {}
            }
        }
        Err(Unpacking::Closed)
    }

    fn unpack(&mut self, decoder: &mut Decoder, mut bytes: &[u8]) -> Result<(), Unpacking> {
        loop {
            if decoder.is_between_parts() && bytes.first().is_some_and(|byte| *byte != 0) {
                self.tell_boundary()?;
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

    /// Tells the writer that it may make a checkpoint here, if it has written enough for one.
    fn tell_boundary(&mut self) -> Result<(), Unpacking> {
        if self.unpacked_bytes - self.boundary_at < self.plan.checkpoint_bytes {
            return Ok(());
        }
        self.boundary_at = self.unpacked_bytes;
        self.flush()?;
        self.send(Piece::Boundary {
            fetched_bytes: self.fetched_bytes,
            fetched_hash: self.hash.state(),
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

/// The thread that hashes and writes the image.
struct Writer {
    plan: Arc<Plan>,
    stop: Stop,
    hash: Hash,
    written_bytes: u64,
}

/// What the writer knows once the first bytes are there.
struct Open {
    sink: Box<dyn ImageSink>,
    is_raw: bool,
    identity: Identity,
}

impl Writer {
    fn run(
        mut self,
        mut input: mpsc::Receiver<Piece>,
        resumed: oneshot::Sender<bool>,
    ) -> Result<Written, Failure> {
        let mut sink = self.resume()?;
        // The feed waits for this; it is only gone if the whole fetch was dropped.
        let _ = resumed.send(sink.is_some());
        let mut open = None;
        while let Some(piece) = input.blocking_recv() {
            if self.stop.token.is_cancelled() {
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
                    if self.stop.token.is_cancelled() {
                        break;
                    }
                }
                (Piece::Bytes(bytes), Some(open)) => self.write(open, &bytes)?,
                (Piece::Boundary { fetched_bytes, fetched_hash }, Some(open)) => {
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
        let mut progress = |_| !self.stop.token.is_cancelled();
        let mut installer = plan.installer.lock().unwrap_or_else(PoisonError::into_inner);
        let sink =
            installer.resume(plan.slot, checkpoint.written_bytes, hash.digest(), &mut progress)?;
        if sink.is_some() {
            self.written_bytes = checkpoint.written_bytes;
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
        Ok(installer.begin(self.plan.slot)?)
    }

    fn write(&mut self, open: &mut Open, mut bytes: &[u8]) -> Result<(), Failure> {
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
        if self.written_bytes == 0 {
            let detail = format!("{} holds no image; build and upload it again", self.plan.url);
            return Err(Failure::new(FailureKind::CorruptImage, detail));
        }
        open.sink.finish()?;
        Ok(Written { image_bytes: self.written_bytes, image_digest, fetched_bytes: 0 })
    }
}

fn check(found: Digest, expected: Option<Digest>, plan: &Plan) -> Result<(), Failure> {
    match expected {
        Some(expected) if expected != found => Err(Failure::new(
            FailureKind::DigestMismatch,
            format!(
                "{} has the digest {found} and should have {expected}; upload the image again or \
                 correct the digest",
                plan.url
            ),
        )),
        _ => Ok(()),
    }
}

/// The failure of a fetch that was called off.
pub(super) fn cancelled(url: &ImageUrl) -> Failure {
    Failure::new(
        FailureKind::Cancelled,
        format!("fetching {url} was interrupted; ask for the update again"),
    )
}

fn lost_thread() -> Failure {
    Failure::new(
        FailureKind::SlotIo,
        "the thread that writes the slot was lost; see the log and ask for the update again",
    )
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
