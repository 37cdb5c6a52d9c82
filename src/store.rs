//! Keeps the saved state across power cuts.

use std::path::PathBuf;

use crate::update::Saved;

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
}
