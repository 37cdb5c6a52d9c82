//! Keeps the saved state across power cuts.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};
use tracing::debug;

use crate::boot::running;
use crate::config;
use crate::os::{self, Sysroot};
use crate::update::{Digest, SCHEMA, Saved};

/// The file with the state.
const FILE: &str = "state.json";
/// Files that could not be understood which are kept for people to look at.
const KEPT_BAD_FILES: usize = 3;
/// A state is a few kilobytes; more than this is none.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Kinds of file systems that keep nothing, or cannot be trusted to, and what to call them.
const VOLATILE: [(&str, &str); 3] = [
    ("tmpfs", "a file system in memory (tmpfs)"),
    ("ramfs", "a file system in memory (ramfs)"),
    ("overlay", "an overlay, whose changes mostly are kept in memory"),
];

/// Keeps the saved state across power cuts. Called on a blocking thread.
pub trait StateStore: Send {
    /// The last state that was saved; `None` if there never was one.
    ///
    /// # Errors
    /// The folder cannot be read at all. A file that cannot be understood is not an error: it is
    /// set aside and told of in [`Loaded::set_aside`].
    fn load(&mut self) -> Result<Loaded, StoreError>;

    /// Once this returns, no power cut can undo it.
    ///
    /// # Errors
    /// The earlier state is still the one that will be loaded.
    fn save(&mut self, saved: &Saved) -> Result<(), StoreError>;
}

/// What [`StateStore::load`] found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Loaded {
    /// The state.
    pub saved: Option<Saved>,
    /// Where a file that could not be understood was moved to, and what was wrong with it.
    pub set_aside: Option<(PathBuf, String)>,
}

/// Why the state could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder or the file could not be read.
    #[error("cannot read the saved state {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file could not be replaced.
    #[error("cannot save the state to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another process keeps its state there.
    #[error("the state folder {} is in use: another twinbootd runs with it", folder.display())]
    InUse {
        /// The folder.
        folder: PathBuf,
    },
}

/// One JSON file, `state.json`, replaced as a whole by each save. Beside the state it holds the
/// version of its layout and a digest, so that a flipped bit is noticed that still makes sense as
/// JSON.
#[derive(Debug)]
pub struct FileStore {
    folder: PathBuf,
    /// Locked as long as this lives.
    _lock: File,
}

/// What the file holds.
#[derive(Deserialize, Serialize)]
struct Wrapper<S> {
    schema: u32,
    /// Of the bytes of `saved`, as they stand in the file.
    sha256: Digest,
    saved: S,
}

impl FileStore {
    /// Opens the folder, and keeps every other daemon out of it until this is dropped. Makes the
    /// folder if it is missing, and removes what a cut save left behind.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if another daemon works with it; otherwise the folder cannot be made
    /// or read. One on a read-only file system is opened: each save will tell.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let in_folder = |source| StoreError::Write { path: folder.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(in_folder)?;
        // The folder itself carries the lock: that works on a read-only file system, too.
        let lock = File::open(folder).map_err(in_folder)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => StoreError::InUse { folder: folder.to_owned() },
            TryLockError::Error(source) => in_folder(source),
        })?;
        let left_behind = os::temporary_of(&folder.join(FILE));
        match fs::remove_file(&left_behind) {
            Ok(()) => debug!(file = %left_behind.display(), "removed what a cut save left behind"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // The daemon starts all the same, and tells at each save that it cannot.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {}
            Err(source) => return Err(StoreError::Write { path: left_behind, source }),
        }
        Ok(FileStore { folder: folder.to_owned(), _lock: lock })
    }

    fn file(&self) -> PathBuf {
        self.folder.join(FILE)
    }

    /// Moves a file that cannot be understood out of the way, and drops the oldest of its kind.
    #[allow(clippy::disallowed_methods, reason = "nothing is replaced, and the folder is synced")]
    fn set_aside(&self) -> Result<PathBuf, StoreError> {
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Read { path, source }
        };
        let mut numbers: Vec<u64> = fs::read_dir(&self.folder)
            .map_err(unreadable(&self.folder))?
            .filter_map(|entry| bad_number(entry.ok()?.file_name().to_str()?))
            .collect();
        numbers.sort_unstable();
        let next = numbers.last().map_or(1, |last| last.saturating_add(1));
        let aside = self.bad_file(next);
        fs::rename(self.file(), &aside).map_err(unreadable(&self.file()))?;
        os::sync_folder(&self.folder).map_err(|error| unreadable(&error.path)(error.source))?;
        let surplus = (numbers.len() + 1).saturating_sub(KEPT_BAD_FILES);
        for number in numbers.into_iter().take(surplus) {
            // Only tidying up: it is tried again the next time.
            let _ = fs::remove_file(self.bad_file(number));
        }
        Ok(aside)
    }

    fn bad_file(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{FILE}.bad-{number}"))
    }
}

impl StateStore for FileStore {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        let problem = match read(&self.file()) {
            Ok(bytes) => match understand(&bytes) {
                Ok(saved) => return Ok(Loaded { saved: Some(saved), set_aside: None }),
                Err(problem) => problem,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Tells a folder without a state from one that is not there.
                fs::read_dir(&self.folder)
                    .map_err(|source| StoreError::Read { path: self.folder.clone(), source })?;
                return Ok(Loaded::default());
            }
            Err(error) => format!("it cannot be read: {error}"),
        };
        let set_aside = match self.set_aside() {
            Ok(aside) => (aside, problem),
            // A medium at its end is damaged and read-only at once.
            Err(error) => (
                self.file(),
                format!("{problem}; it stays where it is: {}", crate::logging::chain(&error)),
            ),
        };
        Ok(Loaded { saved: None, set_aside: Some(set_aside) })
    }

    fn save(&mut self, saved: &Saved) -> Result<(), StoreError> {
        let path = self.file();
        let bytes = print(saved)
            .map_err(|source| StoreError::Write { path: path.clone(), source: source.into() })?;
        os::replace_file(&path, &bytes, 0o600)
            .map_err(|error| StoreError::Write { path, source: error.source })
    }
}

/// What [`glimpse`] saw.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Glimpse {
    /// Whether a daemon works with the folder.
    pub in_use: bool,
    /// The state; `None` if there is none, or none that can be understood.
    pub saved: Option<Saved>,
}

/// Looks into `folder` without making, locking out or changing anything; it need not exist.
#[must_use]
pub fn glimpse(folder: &Path) -> Glimpse {
    let in_use = File::open(folder)
        .is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)));
    let saved = read(&folder.join(FILE)).ok().and_then(|bytes| understand(&bytes).ok());
    Glimpse { in_use, saved }
}

/// Says why the state must not be kept in `folder`, if it must not: the folder lies on one of the
/// slots, and an update would lose it with the slot, or in memory, and every restart would. `None`
/// also if nobody can tell.
///
/// `folder` need not exist yet.
#[must_use]
pub fn state_would_be_lost(
    folder: &Path,
    slots: &config::Slots,
    sysroot: &Sysroot,
) -> Option<String> {
    let why = match running::slot_with(folder, slots, sysroot) {
        Some(slot) => {
            let device = running::device(slots, slot).display();
            format!("on slot {slot} ({device}), and an update would lose it")
        }
        None => {
            let kind = file_system_kind(folder, sysroot)?;
            let (_, memory) = VOLATILE.into_iter().find(|(volatile, _)| *volatile == kind)?;
            format!("on {memory}, and a restart would lose it")
        }
    };
    Some(format!(
        "the state folder {} lies {why}: mount a partition of its own there, or set \
         state.directory (for trials: state.allow_on_slot)",
        folder.display(),
    ))
}

/// The kind of file system that `folder` lies on, or will lie on.
fn file_system_kind(folder: &Path, sysroot: &Sysroot) -> Option<String> {
    let existing = folder.ancestors().find(|ancestor| ancestor.exists())?;
    let number = os::file_system_number(existing).ok()?;
    os::file_system_kind(&sysroot.text("/proc/self/mountinfo").ok()??, number)
}

fn bad_number(name: &str) -> Option<u64> {
    name.strip_prefix(FILE)?.strip_prefix(".bad-")?.parse().ok()
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn print(saved: &Saved) -> serde_json::Result<Vec<u8>> {
    let saved = serde_json::value::to_raw_value(saved)?;
    let sha256 = digest(&saved);
    let mut text = serde_json::to_vec(&Wrapper { schema: SCHEMA, sha256, saved })?;
    text.push(b'\n');
    Ok(text)
}

fn understand(bytes: &[u8]) -> Result<Saved, String> {
    /// Read before the rest, which a newer agent may have laid out in another way.
    #[derive(Deserialize)]
    struct Layout {
        schema: u32,
    }
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE_BYTES) {
        return Err(format!("it is longer than {MAX_FILE_BYTES} bytes"));
    }
    let not_json = |error: serde_json::Error| format!("it is not a saved state: {error}");
    let Layout { schema } = serde_json::from_slice(bytes).map_err(not_json)?;
    if schema != SCHEMA {
        return Err(format!("it has layout {schema}, but this agent knows layout {SCHEMA} only"));
    }
    let wrapper: Wrapper<Box<RawValue>> = serde_json::from_slice(bytes).map_err(not_json)?;
    let found = digest(&wrapper.saved);
    if found != wrapper.sha256 {
        return Err(format!("its content has {found}, but it should have {}", wrapper.sha256));
    }
    serde_json::from_str(wrapper.saved.get()).map_err(not_json)
}

fn digest(saved: &RawValue) -> Digest {
    Digest::new(Sha256::digest(saved.get().as_bytes()).into())
}
