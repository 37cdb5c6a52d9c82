//! Chooses what boots. Each bootloader is one file; nothing outside this folder knows any.

mod custom;
mod grub;
mod mark_good;
mod rauc;
pub mod running;
mod tryboot;
mod uboot;

use std::path::PathBuf;

pub use custom::Custom;
pub use grub::Grub;
pub use mark_good::rival;
pub use rauc::RaucBoot;
pub use tryboot::Tryboot;
pub use uboot::Uboot;

use crate::config::{self, BootKind};
use crate::os::{FileError, Sysroot};
use crate::rauc::RaucError;
use crate::update::Slot;

/// The bootloader that the configuration names. Nothing is read or run yet.
#[must_use]
pub fn open(
    config: &config::Boot,
    slots: &config::Slots,
    rauc: &config::Rauc,
    sysroot: &Sysroot,
) -> Box<dyn Bootloader> {
    let (slots, sysroot) = (slots.clone(), sysroot.clone());
    match config.kind {
        BootKind::Uboot => Box::new(Uboot::new(&config.uboot, slots, sysroot)),
        BootKind::Grub => Box::new(Grub::new(&config.grub, slots, sysroot)),
        BootKind::Tryboot => Box::new(Tryboot::new(&config.tryboot, slots, sysroot)),
        BootKind::Custom => Box::new(Custom::new(&config.custom)),
        BootKind::Rauc => Box::new(RaucBoot::new(rauc, slots, sysroot)),
    }
}

/// What the bootloader says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BootFacts {
    /// The slot this system was started from.
    pub running: Slot,
    /// The slot that boots next if nobody does anything; `None` if the bootloader cannot tell, or
    /// would find none.
    pub next: Option<Slot>,
    /// Whether the slot that does not run was started since [`Bootloader::try_next`] named it;
    /// `None` if the bootloader keeps no account of that, or has lost it.
    pub tried: Option<bool>,
}

/// Chooses what boots. Called on a blocking thread. Every method may be called twice.
///
/// U-Boot and GRUB count the boots of the running slot, too: after every start that is neither a
/// trial nor lost, call [`Bootloader::confirm`], or the count runs out.
pub trait Bootloader: Send {
    /// What runs and what boots next.
    ///
    /// # Errors
    /// The bootloader's variables, or what tells the running slot, cannot be read.
    fn facts(&mut self) -> Result<BootFacts, BootError>;

    /// What runs, also where the bootloader's variables cannot be read.
    ///
    /// # Errors
    /// What tells the running slot cannot be read.
    fn running(&mut self) -> Result<Slot, BootError> {
        self.facts().map(|facts| facts.running)
    }

    /// Makes sure that `slot` does not boot, before it is written: the other one is the default.
    ///
    /// # Errors
    /// The slot may still boot; it must not be written.
    fn retire(&mut self, slot: Slot) -> Result<(), BootError>;

    /// Boots `slot` at the next start, once: the start after it takes the other slot again unless
    /// [`Bootloader::confirm`] was called in between.
    ///
    /// # Errors
    /// What boots next is either `slot` or the other one, never nothing.
    fn try_next(&mut self, slot: Slot) -> Result<(), BootError>;

    /// Takes back [`Bootloader::try_next`] for `slot`, also while `slot` runs: the next start
    /// takes the other slot.
    ///
    /// # Errors
    /// As for `try_next`.
    fn cancel_try(&mut self, slot: Slot) -> Result<(), BootError>;

    /// Marks the running slot good and makes it the default.
    ///
    /// # Errors
    /// The running slot may or may not boot next; call again.
    fn confirm(&mut self) -> Result<(), BootError>;

    /// The argument that the restart must carry so that [`Bootloader::try_next`] has its effect
    /// (Raspberry Pi: `0 tryboot`).
    fn restart_argument(&self) -> Option<&'static str> {
        None
    }
}

/// Why the bootloader could not be asked or told.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A tool could not be run, or failed.
    #[error("cannot {what} with {}: {message}", program.display())]
    Tool {
        /// What was tried.
        what: String,
        /// The program.
        program: PathBuf,
        /// Its last words, or why it did not run.
        message: String,
    },
    /// A file could not be read or written.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What was read makes no sense.
    #[error("{where_}: {problem}")]
    Invalid {
        /// File or tool, and variable.
        where_: String,
        /// Value and rule.
        problem: String,
    },
    /// A variable does not read back as it was set.
    #[error("{variable} was set to \"{wanted}\" but reads back as \"{found}\"")]
    NotSet {
        /// The variable.
        variable: String,
        /// What was written.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// RAUC's service did not do its part.
    #[error(transparent)]
    Rauc(#[from] RaucError),
    /// Neither the kernel command line nor the mounted root is one of the slots.
    #[error("cannot tell which slot runs: {problem}")]
    UnknownSlot {
        /// What was found, and what would have matched.
        problem: String,
    },
}

impl From<FileError> for BootError {
    fn from(FileError { what, path, source }: FileError) -> Self {
        BootError::File { what, path, source }
    }
}
