//! The update core: what an update is, where it stands, and what follows from what happens.
//!
//! Pure values and functions. Nothing in here reads a clock, a disk or a network.

mod job;
mod last_words;
mod machine;
mod report;
mod slot;
mod state;
mod time;
mod trial;

pub use job::{
    Digest, ImageUrl, Job, JobError, MAX_IMAGE_URL_BYTES, MAX_VERSION_BYTES, ParseError, RunId,
    Version,
};
pub use last_words::{FailedBoot, LastWords, Unread};
pub use machine::{Event, Facts, Limits, MAX_ORDERS, Order, Verdict, Wanted, step};
pub use report::{Contracts, Device, Phase, Progress, own_section, report};
pub use slot::{BootId, Slot};
pub use state::{
    Checkpoint, Content, Failure, FailureKind, HashState, Origin, Outage, Outcome, OutcomeKind,
    Passage, Run, SCHEMA, Saved, Slots, Source, State, Success, Times, Written,
};
pub use time::WallTime;
pub use trial::TrialTime;
