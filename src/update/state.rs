//! What the agent knows, and must still know after a power cut.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::job::{Digest, ImageUrl, Job, RunId, Version};
use super::last_words::{LastWords, Unread};
use super::machine::MAX_ORDERS;
use super::slot::{BootId, Slot};
use super::time::WallTime;

/// Version of the layout of [`Saved`] in its file.
///
/// The agent is part of the image, so after a rollback an *older* agent reads what a newer one
/// saved on trial. It passes over members that it does not know and over kinds of failure that it
/// cannot name, and keeps the rest; what it does not know is gone with its first save. So a new
/// member needs no new layout as long as it is safe to forget, and is optional or has a default,
/// because a newer agent reads what an older one saved, too.
///
/// Raise the number when an older agent would draw a wrong conclusion: a member changes its
/// meaning, or a state, an origin, a source or a content of a slot is added. An older agent sets
/// such a file aside, says so in a notice, and begins anew with what the bootloader tells: nothing
/// is bricked, but the last outcome and what is settled are forgotten, and a desired version that
/// failed is tried once more. So that this does not happen after every failed trial, an agent that
/// knows a newer layout reads the old one, too, and goes on writing it until its own slot is
/// confirmed.
pub const SCHEMA: u32 = 1;

/// Everything that is kept across restarts and power cuts.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// [`SCHEMA`] of the agent that wrote it.
    pub schema: u32,
    /// Where the present update stands.
    pub state: State,
    /// How the last update ended, well or not.
    pub last: Option<Outcome>,
    /// The last update that was confirmed. A failed one after it does not erase it.
    pub last_success: Option<Success>,
    /// The slot last known good; `None` before the first confirmed boot under this agent.
    pub home: Option<Slot>,
    /// What each slot holds, as far as this agent wrote or ran it.
    pub slots: Slots,
    /// Digest of the desired section that needs no more action: it was tried, well or not, or
    /// was fulfilled already. Breaks the loop of a version that fails again and again.
    pub settled: Option<Digest>,
    /// When an operator last had the device restarted.
    pub last_reboot: Option<WallTime>,
    /// The last synchronised wall time that was saved: the clock is wrong if it shows less.
    pub newest_time: Option<WallTime>,
}

impl Saved {
    /// A device that never saw an update.
    #[must_use]
    pub fn new() -> Self {
        Saved {
            schema: SCHEMA,
            state: State::Idle,
            last: None,
            last_success: None,
            home: None,
            slots: Slots::default(),
            settled: None,
            last_reboot: None,
            newest_time: None,
        }
    }
}

impl Default for Saved {
    fn default() -> Self {
        Saved::new()
    }
}

/// Where the device stands in the life of an update.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// Nothing to do.
    Idle,
    /// Bytes are flowing into the slot that is not running.
    Fetching {
        /// The update.
        run: Run,
        /// What is proven to be on the medium already.
        checkpoint: Option<Checkpoint>,
        /// Agent starts since the last checkpoint moved; the first is 1.
        attempt: u8,
        /// Whether bytes have come in already.
        began: bool,
    },
    /// The image is in the slot; it is being read back.
    Verifying {
        /// The update.
        run: Run,
        /// What must read back.
        written: Written,
        /// Agent starts in this phase; the first is 1.
        attempt: u8,
    },
    /// The next boot is to try the new slot.
    Switching {
        /// The update.
        run: Run,
        /// Boot in which the switch was ordered, to tell a restart from a reboot.
        ordered_in: BootId,
        /// How often it was ordered; the first is 1.
        attempt: u8,
        /// Whether the bootloader has been told, and only the restart is missing.
        armed: bool,
        /// Whether the machine went down cleanly after that, so that the slot was tried.
        #[serde(default)]
        left: bool,
    },
    /// The new slot runs, unconfirmed.
    Trial {
        /// The update.
        run: Run,
        /// How often the agent has started in this trial; the first is 1.
        starts: u8,
        /// The boot this trial runs in.
        boot: BootId,
        /// Seconds since that boot at the agent's first start in it; the deadline counts from it.
        began_s: u64,
        /// Whether it passed its checks, or an operator vouched for it: it is being confirmed.
        healthy: bool,
        /// Whether the machine was last restarted cleanly, and is to come back into this slot.
        #[serde(default)]
        stopped: bool,
        /// The outage that this boot of the trial met, over or not.
        #[serde(default)]
        outage: Option<Outage>,
    },
    /// The trial is lost; the next boot is to use the old slot.
    RollingBack {
        /// The update.
        run: Run,
        /// Why.
        reason: Failure,
        /// Boot in which the way back was ordered.
        ordered_in: BootId,
        /// How often it was ordered in this boot; the first is 1.
        attempt: u8,
    },
}

impl State {
    /// The update under way, to be changed.
    pub fn run_mut(&mut self) -> Option<&mut Run> {
        match self {
            State::Idle => None,
            State::Fetching { run, .. }
            | State::Verifying { run, .. }
            | State::Switching { run, .. }
            | State::Trial { run, .. }
            | State::RollingBack { run, .. } => Some(run),
        }
    }

    /// What a trial waits for that is no fault of its image: the network, as far as it is missing.
    #[must_use]
    pub fn waits_for(&self) -> Option<&str> {
        match self {
            State::Trial { healthy: false, outage: Some(outage), .. } if outage.lasts => {
                Some(&outage.what)
            }
            _ => None,
        }
    }

    /// The update under way, if there is one.
    #[must_use]
    pub fn run(&self) -> Option<&Run> {
        match self {
            State::Idle => None,
            State::Fetching { run, .. }
            | State::Verifying { run, .. }
            | State::Switching { run, .. }
            | State::Trial { run, .. }
            | State::RollingBack { run, .. } => Some(run),
        }
    }
}

/// One update from request to outcome.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its name in reports and logs.
    pub id: RunId,
    /// What is to be installed.
    pub source: Source,
    /// Who asked.
    pub origin: Origin,
    /// The slot that ran when it was asked for, and that stays the way back.
    pub from: Slot,
    /// When each phase began.
    pub times: Times,
    /// Agent starts in this run, in any phase: ends a loop that no other counter sees.
    pub starts: u16,
    /// What it met between the switch and its end.
    #[serde(default)]
    pub passage: Passage,
}

impl Run {
    /// The slot that is written and tried.
    #[must_use]
    pub fn target(&self) -> Slot {
        self.from.other()
    }

    /// Why the switch was ordered again, for the `attempt`th time now; `None` if it was not.
    #[must_use]
    pub fn why_armed_again(&self, attempt: u8) -> Option<String> {
        (self.passage.armed_again > 0).then(|| {
            format!(
                "armed again, {attempt} of {MAX_ORDERS}: the machine restarted without trying slot {}",
                self.target()
            )
        })
    }

    /// The version asked for.
    #[must_use]
    pub fn version(&self) -> Option<&Version> {
        match &self.source {
            Source::Image(job) => job.version.as_ref(),
            Source::OtherSlot { version } => version.as_ref(),
        }
    }

    /// Where the image comes from, if it is fetched.
    #[must_use]
    pub fn url(&self) -> Option<&ImageUrl> {
        match &self.source {
            Source::Image(job) => Some(&job.url),
            Source::OtherSlot { .. } => None,
        }
    }
}

/// What a run met on its way into the new slot.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Passage {
    /// Whether the old slot had a hub session when the switch was ordered; `None` before that.
    pub hub_before: Option<bool>,
    /// How often the switch was ordered again because the slot had not been tried.
    pub armed_again: u8,
    /// How often the machine went down cleanly during the trial, as far as no operator asked for it.
    pub clean_stops: u8,
    /// How often an operator asked for a restart during the trial.
    pub operator_stops: u8,
    /// Whether the newest clean stop in the trial was a restart that carried the bootloader's
    /// argument, if it needs one, so that the slot was tried once more.
    pub left: bool,
}

/// Something outside the image that keeps a trial from its end: the network is missing.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Outage {
    /// What tells so, for people.
    pub what: String,
    /// Seconds since the boot of a round of checks, the newest that is saved, in which nothing else
    /// was wrong.
    pub seen_s: u64,
    /// Whether it still lasted when it was last looked at.
    pub lasts: bool,
}

/// What a run installs.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// An image that is fetched into the other slot.
    Image(Job),
    /// What the other slot holds already: an operator goes back.
    OtherSlot {
        /// Its version, as far as known.
        version: Option<Version>,
    },
}

/// Who asked for a run.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Origin {
    /// A direct method.
    Method,
    /// The desired properties; the digest tells which content of the section.
    Desired(Digest),
    /// The command on the device.
    Local,
}

/// When each phase of a run began; `None` where it did not, or the clock was not set then.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Times {
    /// The request was accepted.
    pub requested: Option<WallTime>,
    /// The first byte came.
    pub downloading: Option<WallTime>,
    /// The last byte was in the slot.
    pub downloaded: Option<WallTime>,
    /// The slot was proven and the switch ordered.
    pub applying: Option<WallTime>,
    /// The new slot booted, or the old one again.
    pub rebooted: Option<WallTime>,
}

/// How far an image is proven to be on the medium, and how to go on behind that.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Bytes of the file at the URL that are no longer needed; 0 if a decoder has to begin at its
    /// start, where everything up to `written_bytes` comes again and is not written again.
    pub fetched_bytes: u64,
    /// Bytes of the image that are on the medium.
    pub written_bytes: u64,
    /// SHA-256 over the fetched bytes, to go on with.
    pub fetched_hash: HashState,
    /// SHA-256 over the written bytes, to go on with; the slot must read back to it.
    pub image_hash: HashState,
    /// Strong validator (RFC 9110 section 8.8) of the file: its `ETag`.
    pub etag: Option<String>,
    /// Length of the whole file, where the server told it.
    pub total_bytes: Option<u64>,
}

/// A SHA-256 calculation in the middle, as hexadecimal digits.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HashState(pub String);

/// An image that was written whole.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// Bytes in the slot.
    pub image_bytes: u64,
    /// SHA-256 of these bytes.
    pub image_digest: Digest,
    /// Bytes that were fetched for it over the network, in all attempts.
    pub fetched_bytes: u64,
}

/// What is known of both slots.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct Slots {
    /// Slot A.
    pub a: Content,
    /// Slot B.
    pub b: Content,
}

impl Slots {
    /// What `slot` holds.
    #[must_use]
    pub fn of(&self, slot: Slot) -> &Content {
        match slot {
            Slot::A => &self.a,
            Slot::B => &self.b,
        }
    }

    /// What `slot` holds, to be changed.
    pub fn of_mut(&mut self, slot: Slot) -> &mut Content {
        match slot {
            Slot::A => &mut self.a,
            Slot::B => &mut self.b,
        }
    }
}

/// What a slot holds.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Content {
    /// This agent never wrote nor ran it.
    #[default]
    Unknown,
    /// An image is being written, or a write ended half way.
    Incomplete,
    /// A whole image that did not run yet.
    Written {
        /// Version asked for.
        version: Option<Version>,
        /// SHA-256 of the image.
        digest: Option<Digest>,
    },
    /// It ran and was confirmed.
    Good {
        /// Version read from it, or asked for.
        version: Option<Version>,
        /// SHA-256 of the image, if this agent wrote it.
        digest: Option<Digest>,
    },
    /// It was tried and given up.
    Bad {
        /// Version asked for.
        version: Option<Version>,
        /// SHA-256 of the image.
        digest: Option<Digest>,
    },
}

impl Content {
    /// Version and digest, as far as known.
    #[must_use]
    pub fn identity(&self) -> (Option<Version>, Option<Digest>) {
        match self {
            Content::Unknown | Content::Incomplete => (None, None),
            Content::Written { version, digest }
            | Content::Good { version, digest }
            | Content::Bad { version, digest } => (version.clone(), *digest),
        }
    }

    /// One word for reports and tables.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Content::Unknown => "unknown",
            Content::Incomplete => "incomplete",
            Content::Written { .. } => "written",
            Content::Good { .. } => "good",
            Content::Bad { .. } => "bad",
        }
    }
}

/// The last confirmed update.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Success {
    /// The version that was confirmed.
    pub version: Option<Version>,
    /// When; `None` if the clock was not set even then.
    pub at: Option<WallTime>,
}

/// How a run ended.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The run, if one was started at all.
    pub run: Option<Run>,
    /// Well, or why not.
    pub kind: OutcomeKind,
    /// When it ended.
    pub at: Option<WallTime>,
    /// What the boot of the new system left in the journal, if it was tried and lost.
    #[serde(default)]
    pub journal: Option<LastWords>,
    /// What is read once more, where reading it failed and `journal` tells why.
    #[serde(default)]
    pub journal_again: Option<Unread>,
}

impl Outcome {
    /// An end of which the journal has nothing to tell, or not yet.
    #[must_use]
    pub fn new(run: Option<Run>, kind: OutcomeKind, at: Option<WallTime>) -> Self {
        Outcome { run, kind, at, journal: None, journal_again: None }
    }
}

/// Well, or why not.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OutcomeKind {
    /// The new slot is confirmed.
    Succeeded,
    /// What was asked for runs already.
    UpToDate,
    /// Given up before the new slot was tried.
    Failed(Failure),
    /// The new slot was tried, and the old one runs again.
    RolledBack(Failure),
}

/// Why an update did not happen.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// What went wrong, for programs.
    pub kind: FailureKind,
    /// What went wrong, for people: one sentence with the facts and what to do, no secrets.
    pub detail: String,
}

impl Failure {
    /// A failure with its explanation.
    pub fn new(kind: FailureKind, detail: impl Into<String>) -> Self {
        Failure { kind, detail: detail.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

/// The kinds of failure. The names are part of the reports: never rename one.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FailureKind {
    /// The request itself cannot be carried out.
    InvalidRequest,
    /// The URL is not protected, and the settings ask for that.
    InsecureUrl,
    /// No digest was given, and none lies beside the image.
    DigestMissing,
    /// The server does not have the image (404, 410).
    NotFound,
    /// The server refuses to hand it out (401, 403).
    AccessDenied,
    /// The server could not be reached, or kept breaking off, until the retry budget was spent.
    Network,
    /// The server answered in a way that makes no sense for an image.
    BadServer,
    /// The image on the server changed while it was fetched.
    ImageChanged,
    /// The image is larger than the slot.
    TooLarge,
    /// The file does not have the digest or the length it should have.
    DigestMismatch,
    /// The compressed data is damaged.
    CorruptImage,
    /// Decompressing the image needs more memory than the settings allow.
    DecoderMemory,
    /// The slot could not be written or read.
    SlotIo,
    /// The slot does not read back what was written.
    ReadBack,
    /// The outside installer failed.
    Installer,
    /// The bootloader's variables could not be set.
    Bootloader,
    /// The device did not restart although it was ordered to.
    RestartFailed,
    /// The bootloader came up in the old slot.
    FellBack,
    /// The new slot ran, but was not found healthy in time.
    Unhealthy,
    /// The new slot is unhealthy, and the bootloader would not go back.
    Stuck,
    /// The agent started too often in one run.
    TooManyStarts,
    /// An operator took it back.
    Cancelled,
    /// The desired properties no longer ask for it.
    Withdrawn,
    /// An operator asked to go back.
    RolledBackByOperator,
    /// A slot that had been confirmed was left by the bootloader.
    LeftConfirmedSlot,
    /// A newer agent saved a kind that this one cannot name; the detail tells what it was.
    #[serde(other)]
    Unknown,
}

impl FailureKind {
    /// Whether it can only happen once the whole image is in the slot.
    #[must_use]
    pub fn is_after_download(self) -> bool {
        matches!(
            self,
            FailureKind::ReadBack
                | FailureKind::Bootloader
                | FailureKind::RestartFailed
                | FailureKind::FellBack
                | FailureKind::Unhealthy
                | FailureKind::Stuck
                | FailureKind::RolledBackByOperator
                | FailureKind::LeftConfirmedSlot
        )
    }

    /// The name in reports: `digestMismatch` and the like.
    #[must_use]
    pub fn name(self) -> String {
        serde_json::to_value(self)
            .ok()
            .and_then(|name| name.as_str().map(str::to_owned))
            .unwrap_or_default()
    }
}
