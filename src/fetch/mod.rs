//! Fetches an image and streams it into a slot, and reads the slot back.
//!
//! Nothing is kept on disk on the way. What is fetched is hashed as it comes and compared with
//! the digest before the slot counts as written; the slot is then read back by
//! [`Images::verify`].

mod client;
mod decode;
mod digest_file;
mod hash;
mod local;
mod pipeline;
mod retry;
mod transfer;
mod unpack;
mod write;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use futures_util::future::BoxFuture;
use percent_encoding::percent_decode_str;
use reqwest::Client;
use tokio::task::spawn_blocking;

pub use self::client::FetchError;
use self::pipeline::{Feed, Identity, Plan, cancelled};
use self::transfer::{Stop, Transfer};
use crate::agent::{Images, JobChannels};
use crate::config;
use crate::install::{InstallError, SharedInstaller};
use crate::logging::chain;
use crate::update::{Checkpoint, Digest, Failure, FailureKind, ImageUrl, Job, Slot, Written};

const MEBIBYTE: u64 = 1 << 20;

/// Fetches images over HTTPS (RFC 9110), or from files of the device, and hands them to an
/// installer.
///
/// A transfer that breaks off goes on where it was, by `Range` and `If-Range`, until nothing new
/// came for `fetch.retry_budget_s`. After a restart it goes on behind the last [`Checkpoint`],
/// once the slot has read back up to there; nothing before it is written again. In a raw image
/// nothing before it is fetched again either; in a compressed one that is so from the last zstd
/// frame, gzip member or xz stream that began before it. A file of a single such part is fetched
/// and decompressed from its beginning.
#[derive(Clone)]
#[allow(missing_debug_implementations, reason = "holds a trait object")]
pub struct Fetcher {
    shared: Arc<Shared>,
}

struct Shared {
    settings: config::Fetch,
    checkpoint_bytes: u64,
    allow_missing_digest: bool,
    user_agent: String,
    installer: SharedInstaller,
    /// What the installer keeps of an image until it is in its slot.
    kept: Option<PathBuf>,
    uninterruptible: Option<&'static str>,
}

impl Fetcher {
    /// A fetcher with these settings. Certificates are read for each image, so that renewed ones
    /// are taken without a restart; [`Fetcher::check`] tells beforehand whether they are good.
    #[must_use]
    pub fn new(config: &config::Config, installer: SharedInstaller, user_agent: &str) -> Self {
        let (kept, uninterruptible) = {
            let installer = installer.lock().unwrap_or_else(PoisonError::into_inner);
            (installer.kept(), installer.uninterruptible())
        };
        Fetcher {
            shared: Arc::new(Shared {
                settings: config.fetch.clone(),
                checkpoint_bytes: config.install.checkpoint_mib.get() * MEBIBYTE,
                allow_missing_digest: config.update.allow_missing_digest,
                user_agent: user_agent.to_owned(),
                installer,
                kept,
                uninterruptible,
            }),
        }
    }

    /// Reads the certificates that the settings name.
    ///
    /// # Errors
    /// One is missing or of no use: no image can be fetched until that is mended.
    pub fn check(settings: &config::Fetch) -> Result<(), FetchError> {
        client::check(settings)
    }
}

impl Images for Fetcher {
    /// The answer comes within moments after `channels.cancel`, and always after the slot was
    /// closed. [`FetchEvent::Checkpoint`](crate::agent::FetchEvent) is dropped, not waited for,
    /// when `channels.events` is full. `channels.progress` moves with every few hundred KiB.
    fn fetch(
        &self,
        job: Job,
        slot: Slot,
        checkpoint: Option<Checkpoint>,
        channels: JobChannels,
    ) -> BoxFuture<'static, Result<Written, Failure>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.fetch(&job, slot, checkpoint, &channels).await })
    }

    fn verify(
        &self,
        written: Written,
        slot: Slot,
        channels: JobChannels,
    ) -> BoxFuture<'static, Result<(), Failure>> {
        let installer = Arc::clone(&self.shared.installer);
        let read = spawn_blocking(move || {
            let mut installer = installer.lock().unwrap_or_else(PoisonError::into_inner);
            let mut installed = |percent| {
                let percent = Some(u64::from(percent));
                channels.progress.send_modify(|progress| progress.installed_percent = percent);
                !channels.cancel.is_cancelled()
            };
            installer.apply(slot, &written, &mut installed)?;
            let mut progress = |read_back_bytes| {
                channels
                    .progress
                    .send_modify(|progress| progress.read_back_bytes = read_back_bytes);
                !channels.cancel.is_cancelled()
            };
            let found = installer.digest(slot, written.image_bytes, &mut progress)?;
            Ok::<_, InstallError>((found, written))
        });
        Box::pin(async move {
            let (found, written) = read.await.map_err(|_| {
                let detail =
                    format!("reading slot {slot} back was lost; see the log and try again");
                Failure::new(FailureKind::SlotIo, detail)
            })??;
            match found {
                Some(found) if found != written.image_digest => Err(Failure::new(
                    FailureKind::ReadBack,
                    format!(
                        "slot {slot} reads back as {found} although {} was written; its medium \
                         does not keep what it is given, replace it",
                        written.image_digest
                    ),
                )),
                // Without one, the outside installer has answered for the content.
                _ => Ok(()),
            }
        })
    }

    fn release(&self) -> BoxFuture<'static, ()> {
        let Some(kept) = self.shared.kept.clone() else {
            return Box::pin(std::future::ready(()));
        };
        let remove = spawn_blocking(move || match std::fs::remove_file(&kept) {
            Ok(()) => tracing::debug!(file = %kept.display(), "removed"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(file = %kept.display(), %error, "cannot remove an old bundle");
            }
        });
        // A thread that was lost has removed nothing; the next start tries again.
        Box::pin(async { drop(remove.await) })
    }

    fn uninterruptible(&self) -> Option<&'static str> {
        self.shared.uninterruptible
    }
}

/// Where an image comes from.
enum Source {
    Server(Client),
    File(PathBuf),
}

impl Shared {
    async fn fetch(
        &self,
        job: &Job,
        slot: Slot,
        checkpoint: Option<Checkpoint>,
        channels: &JobChannels,
    ) -> Result<Written, Failure> {
        let prepared = async {
            let source = self.source(job).await?;
            let digest = self.digest(job, &source).await?;
            Ok::<_, Failure>((source, digest))
        };
        let (source, digest) = tokio::select! {
            biased;
            () = channels.cancel.cancelled() => return Err(cancelled(&job.url)),
            prepared = prepared => prepared?,
        };
        // Without digest and validator nobody would notice that the rest is of another file.
        let checkpoint = checkpoint.filter(|known| digest.is_some() || known.etag.is_some());
        let plan = |checkpoint| Plan {
            url: job.url.clone(),
            installer: Arc::clone(&self.installer),
            slot,
            checkpoint,
            checkpoint_bytes: self.checkpoint_bytes,
            decoder_memory_bytes: self.settings.decoder_memory_mib.get() * MEBIBYTE,
            digest,
            events: channels.events.clone(),
            progress: channels.progress.clone(),
            cancel: channels.cancel.clone(),
        };
        match self.install(job, &source, plan(checkpoint), channels).await {
            Err(Ended::Stale) => {
                tracing::info!(url = %job.url, "the file changed since the checkpoint, starting again");
                self.install(job, &source, plan(None), channels).await
            }
            ended => ended,
        }
        .map_err(|ended| match ended {
            Ended::Failed(failure) => failure,
            // Without a checkpoint there is nothing to be stale.
            Ended::Stale => cancelled(&job.url),
        })
    }

    /// One pass from the source to the slot.
    async fn install(
        &self,
        job: &Job,
        source: &Source,
        plan: Plan,
        channels: &JobChannels,
    ) -> Result<Written, Ended> {
        let (events, progress) = (&channels.events, &channels.progress);
        let mut feed = Feed::open(plan).await;
        let mut start_bytes = 0;
        if let Some(checkpoint) = feed.checkpoint() {
            start_bytes = checkpoint.fetched_bytes;
            let written_bytes = checkpoint.written_bytes;
            progress.send_modify(|progress| progress.written_bytes = written_bytes);
        }
        let work = async {
            match source {
                Source::File(path) => local::run(job, path, &mut feed, events, progress).await?,
                Source::Server(client) => {
                    let mut transfer = Transfer::new(client, &self.settings, &job.url);
                    transfer.size_bytes = job.size_bytes;
                    if let Some(checkpoint) = feed.checkpoint() {
                        transfer.position = checkpoint.fetched_bytes;
                        transfer.may_start_again = true;
                        transfer.identity = Identity {
                            validator: checkpoint.etag.clone(),
                            total_bytes: checkpoint.total_bytes,
                        };
                    }
                    transfer.run(&mut feed, events, progress).await?;
                }
            }
            feed.end().await?;
            Ok(())
        };
        let ended = tokio::select! {
            biased;
            () = channels.cancel.cancelled() => Err(Stop::Failed(cancelled(&job.url))),
            ended = work => ended,
        };
        match ended {
            Ok(()) => {
                let written = feed.finish().await.map_err(Ended::Failed)?;
                // The file was fetched whole, in this pass and those before its checkpoint.
                let fetched_bytes = progress.borrow().fetched_bytes.max(start_bytes);
                Ok(Written { fetched_bytes, ..written })
            }
            Err(Stop::Closed) => Err(Ended::Failed(feed.abandon(None).await)),
            Err(Stop::Failed(failure)) => Err(Ended::Failed(feed.abandon(Some(failure)).await)),
            Err(Stop::Stale) => {
                feed.abandon(Some(cancelled(&job.url))).await;
                Err(Ended::Stale)
            }
        }
    }

    async fn source(&self, job: &Job) -> Result<Source, Failure> {
        if job.url.is_file() {
            return file_of(&job.url).map(Source::File);
        }
        let allow_http = self.settings.allow_http && job.digest.is_some();
        if !job.url.is_protected() && !allow_http {
            let advice = if self.settings.allow_http {
                "give the digest with the request"
            } else {
                "use https, or set fetch.allow_http and give the digest with the request"
            };
            let detail = format!("{} is not protected on its way; {advice}", job.url);
            return Err(Failure::new(FailureKind::InsecureUrl, detail));
        }
        let (settings, user_agent) = (self.settings.clone(), self.user_agent.clone());
        let client = spawn_blocking(move || client::client(&settings, &user_agent, allow_http));
        let client = client.await.map_err(|_| {
            let detail = "the thread that sets up HTTPS was lost; see the log and try again";
            Failure::new(FailureKind::Network, detail)
        })?;
        client.map(Source::Server).map_err(|error| {
            let detail = format!("{}; correct the settings", chain(&error));
            Failure::new(FailureKind::InvalidRequest, detail)
        })
    }

    /// What the file must hash to; `None` only if the settings allow that.
    async fn digest(&self, job: &Job, source: &Source) -> Result<Option<Digest>, Failure> {
        if job.digest.is_some() {
            return Ok(job.digest);
        }
        let beside = job.url.digest_file();
        let text = match source {
            Source::File(_) => {
                local::read_small(&beside, &file_of(&beside)?, digest_file::MAX_BYTES).await?
            }
            Source::Server(client) => {
                let mut transfer = Transfer::new(client, &self.settings, &beside);
                match transfer.read_small(digest_file::MAX_BYTES).await {
                    Ok(text) => text,
                    Err(Stop::Failed(failure)) => return Err(failure),
                    Err(Stop::Closed | Stop::Stale) => None,
                }
            }
        };
        let Some(text) = text else {
            if self.allow_missing_digest {
                return Ok(None);
            }
            let detail = format!(
                "no digest was given and {beside} cannot be had; upload one (sha256sum IMAGE > \
                 IMAGE.sha256) or give the digest with the request"
            );
            return Err(Failure::new(FailureKind::DigestMissing, detail));
        };
        let name = job.url.with_secrets().path_segments().and_then(|mut parts| parts.next_back());
        let name = percent_decode_str(name.unwrap_or_default()).decode_utf8_lossy();
        match digest_file::parse(&text, &name) {
            Some(digest) => Ok(Some(digest)),
            None => {
                let detail = format!(
                    "{beside} has no SHA-256 digest of {name}; write it with sha256sum IMAGE > \
                     IMAGE.sha256"
                );
                Err(Failure::new(FailureKind::BadServer, detail))
            }
        }
    }
}

/// How one pass ended.
enum Ended {
    Failed(Failure),
    /// The file is not the one that the checkpoint is about.
    Stale,
}

fn file_of(url: &ImageUrl) -> Result<PathBuf, Failure> {
    url.with_secrets().to_file_path().map_err(|()| {
        let detail = format!("{url} names no file of this device; correct the URL");
        Failure::new(FailureKind::InvalidRequest, detail)
    })
}
