//! A file of the device itself: a USB stick, a share.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::{mpsc, watch};

use super::pipeline::{Feed, Identity};
use super::transfer::Stop;
use crate::agent::FetchEvent;
use crate::update::{Failure, FailureKind, ImageUrl, Job, Progress};

/// Bytes read at once.
const READ_BYTES: usize = 256 * 1024;

/// Feeds the file of `job` to `feed`, behind its checkpoint.
///
/// # Errors
/// Part of the file may have been fed.
pub(super) async fn run(
    job: &Job,
    path: &Path,
    feed: &mut Feed,
    events: &mpsc::Sender<FetchEvent>,
    progress: &watch::Sender<Progress>,
) -> Result<(), Stop> {
    let failed = |error: io::Error| Stop::Failed(unreadable(&job.url, &error));
    let mut file = File::open(path).await.map_err(failed)?;
    let metadata = file.metadata().await.map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    let total_bytes = metadata.len();
    let changed = format!("\"{}.{:09}-{total_bytes}\"", metadata.mtime(), metadata.mtime_nsec());
    let identity = Identity { validator: Some(changed), total_bytes: Some(total_bytes) };
    let mut position = 0;
    if let Some(checkpoint) = feed.checkpoint() {
        if identity.differs_from(&Identity {
            validator: checkpoint.etag.clone(),
            total_bytes: checkpoint.total_bytes,
        }) {
            return Err(Stop::Stale);
        }
        position = checkpoint.fetched_bytes;
        file.seek(io::SeekFrom::Start(position)).await.map_err(failed)?;
    }
    if let Some(size_bytes) = job.size_bytes.filter(|size_bytes| *size_bytes != total_bytes) {
        let detail = format!(
            "{} has {total_bytes} bytes and should have {size_bytes}; copy the image again or \
             correct the size",
            job.url
        );
        return Err(Stop::Failed(Failure::new(FailureKind::DigestMismatch, detail)));
    }
    // A caller that does not listen any more cancels.
    let _ = events.send(FetchEvent::Began).await;
    progress.send_modify(|progress| progress.total_bytes = Some(total_bytes));
    feed.identify(identity);
    file.set_max_buf_size(READ_BYTES);
    let mut bytes = vec![0; READ_BYTES];
    loop {
        let count = file.read(&mut bytes).await.map_err(failed)?;
        let read = bytes.get(..count).unwrap_or_default();
        if read.is_empty() {
            return Ok(());
        }
        feed.push(read).await?;
        position += u64::try_from(count).unwrap_or(0);
        progress.send_modify(|progress| progress.fetched_bytes = position);
    }
}

/// Reads the digest file at `path`; `None` if there is none.
///
/// # Errors
/// It is there and cannot be read.
pub(super) async fn read_small(
    url: &ImageUrl,
    path: &Path,
    max_bytes: usize,
) -> Result<Option<String>, Failure> {
    let limit = u64::try_from(max_bytes).unwrap_or(u64::MAX);
    let mut bytes = Vec::new();
    let read = match File::open(path).await {
        Ok(file) => file.take(limit).read_to_end(&mut bytes).await,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => Err(error),
    };
    read.map_err(|error| unreadable(url, &error))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

fn unreadable(url: &ImageUrl, error: &io::Error) -> Failure {
    let (kind, advice) = match error.kind() {
        io::ErrorKind::PermissionDenied => (FailureKind::AccessDenied, "let the agent read it"),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::Other => {
            {
                // As PrivateTmp= in the unit has it.
                let advice = "put the image there (not into /tmp: the service has its own) or correct \
                          the URL";
                (FailureKind::NotFound, advice)
            }
        }
        _ => (FailureKind::Network, "check the medium that it lies on"),
    };
    Failure::new(kind, format!("{url} cannot be read: {error}; {advice}"))
}
