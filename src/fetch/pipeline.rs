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

use super::decode::Format;
use super::unpack::{Unpacker, Unpacking};
use super::write::Writer;
use crate::agent::FetchEvent;
use crate::install::{Interrupter, SharedInstaller};
use crate::update::{
    Checkpoint, Digest, Failure, FailureKind, HashState, ImageUrl, Progress, Slot, Written,
};

/// Bytes that travel from thread to thread at once.
pub(super) const BLOCK_BYTES: usize = 32 * 1024;
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
pub(super) enum Piece {
    /// Comes first, before any byte.
    Start {
        is_raw: bool,
        /// The image has at least so many bytes.
        image_bytes: Option<u64>,
        identity: Identity,
    },
    Bytes(Vec<u8>),
    /// Everything up to here can be had again from a decoder that starts at `fetched_bytes`: here
    /// itself, or the beginning of the file.
    Mark {
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
        let writer = Writer::new(&plan, &stop);
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
        let output = std::mem::replace(&mut self.pieces, pieces);
        let unpacker = Unpacker::new(&self.plan, self.checkpoint.as_ref(), output);
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
pub(super) struct Stop {
    token: CancellationToken,
    interrupter: Arc<Mutex<Option<Interrupter>>>,
}

impl Stop {
    /// Whether the threads are to end.
    pub(super) fn is_wanted(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Keeps what ends the wait of the installer.
    pub(super) fn keep(&self, interrupter: Option<Interrupter>) {
        *self.interrupter.lock().unwrap_or_else(PoisonError::into_inner) = interrupter;
    }

    /// Ends them.
    fn now(&self) {
        self.token.cancel();
        let interrupter = self.interrupter.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupt) = interrupter.as_ref() {
            interrupt();
        }
    }
}

/// Whether a digest is the one that was asked for, if one was.
pub(super) fn check(found: Digest, expected: Option<Digest>, plan: &Plan) -> Result<(), Failure> {
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

/// A length in memory as a count of bytes.
pub(super) fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
