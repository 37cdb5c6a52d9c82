//! The two root file system slots, and the boots between them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One of the two root file system slots.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Serialize, Deserialize)]
pub enum Slot {
    /// The first slot.
    A,
    /// The second slot.
    B,
}

impl Slot {
    /// Both slots, the first one first.
    pub const BOTH: [Slot; 2] = [Slot::A, Slot::B];

    /// The slot this one is not.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Slot::A => Slot::B,
            Slot::B => Slot::A,
        }
    }

    /// `A` or `B`, as the boot variables and the reports spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Slot::A => "A",
            Slot::B => "B",
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Names one boot of the machine; changes with every boot (`/proc/sys/kernel/random/boot_id`).
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct BootId(pub String);
