//! Files that survive a power cut.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Why a file could not be read or replaced.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", path.display())]
pub struct FileError {
    /// What was tried.
    pub what: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl FileError {
    /// For `map_err`: `what` was tried with `path`.
    pub fn new(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| FileError { what, path, source }
    }
}

/// Replaces the content of `path` as a whole: a reader, and the machine after a power cut, sees
/// the old content or the new one. Once this returns, no power cut can undo it.
///
/// The file gets exactly the permissions `mode`. A symbolic link at `path` is itself replaced.
///
/// # Errors
/// The old content is still there, and no temporary file. Only if the last step failed, which is
/// syncing the folder, `path` may hold the new content already, but as a whole.
#[allow(clippy::disallowed_methods, reason = "the one place that syncs around it")]
pub fn replace_file(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let temporary = temporary_of(path);
    let replaced = write_new(&temporary, bytes, mode)
        .and_then(|()| fs::rename(&temporary, path).map_err(FileError::new("replace", path)));
    if replaced.is_err() {
        // It may not exist, and nobody could do more about it.
        let _ = fs::remove_file(&temporary);
    }
    replaced?;
    sync_folder(folder_of(path))
}

/// The temporary name that [`replace_file`] uses for `path`. A power cut may leave it behind; the
/// next call replaces it.
#[must_use]
pub fn temporary_of(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    path.with_file_name(name)
}

/// Brings the names in `folder` to the medium.
///
/// # Errors
/// A name that was created, renamed or removed in it may come back after a power cut.
pub fn sync_folder(folder: &Path) -> Result<(), FileError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(FileError::new("sync", folder))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(FileError::new("remove", path)(error));
        }
        _ => {}
    }
    // `create_new` neither follows a link nor takes over a file that somebody else put there.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(FileError::new("create", path))?;
    file.write_all(bytes)
        // The umask took its part of the mode away.
        .and_then(|()| file.set_permissions(fs::Permissions::from_mode(mode)))
        .and_then(|()| file.sync_all())
        .map_err(FileError::new("write", path))
}
