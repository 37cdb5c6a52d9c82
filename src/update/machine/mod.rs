//! Every transition. No I/O, no clock, no logging: facts in, orders out.
//!
//! The loop around it is in `agent`: step, save, act. Orders come after the save and may each be
//! carried out twice; `Started` is the event after every start of the agent, so there is one way
//! of recovery and it is walked every day.

mod asked;
mod desired;
mod happened;
mod last_words;
mod moves;
mod started;
mod stops;

use self::asked::asked;
use self::desired::desired;
use self::happened::happened;
pub use self::moves::MAX_ORDERS;
use self::started::started;
use crate::update::job::{Digest, Job, RunId, Version};
use crate::update::last_words::FailedBoot;
use crate::update::slot::{BootId, Slot};
use crate::update::state::{Checkpoint, Failure, Origin, Outage, Saved, State, Written};
use crate::update::time::WallTime;
use crate::update::trial::TrialTime;

/// What the device looks like.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Slot that runs now. Fixed for a boot.
    pub running: Slot,
    /// What would boot next, as it was when the agent started; `None` if that is not known.
    pub next: Option<Slot>,
    /// Whether the slot that does not run was started since it was armed, as it was when the agent
    /// started; `None` if the bootloader does not tell.
    pub tried: Option<bool>,
    /// Whether the bootloader tries a slot only if the restart carries an argument, which is lost
    /// with the power.
    pub by_argument: bool,
    /// This boot.
    pub boot: BootId,
    /// Whether there is a hub session, or was one a moment ago.
    pub hub_online: bool,
    /// Version of the running image, read from it.
    pub running_version: Option<Version>,
    /// Seconds since the boot, at the event.
    pub since_boot_s: u64,
    /// Wall time at the event, if the clock is set.
    pub now: Option<WallTime>,
    /// The settings that bound it all.
    pub limits: Limits,
}

/// The settings that bound an update.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Agent starts without progress in a download or a verification.
    pub attempts: u8,
    /// Agent starts in one trial.
    pub trial_starts: u8,
    /// Seconds a trial may take.
    pub trial_s: u64,
    /// Seconds it may take while the network is missing through no fault of the image; counts only
    /// where it is more.
    pub trial_outage_s: u64,
}

/// What the desired properties ask for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// Digest of the section, to know it again.
    pub fingerprint: Digest,
    /// The update, or why it cannot be one.
    pub job: Result<Job, Failure>,
}

/// Something happened.
#[derive(Clone, Debug, Eq, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "one exists at a time")]
pub enum Event {
    /// The agent started.
    Started,
    /// A direct method or the device command asks for an update.
    Requested {
        /// Name for the run, if one comes of it.
        id: RunId,
        /// The update.
        job: Job,
        /// Who asks.
        origin: Origin,
    },
    /// The desired properties are these, new or not.
    Desired {
        /// Name for the run, if one comes of it.
        id: RunId,
        /// What they ask for; `None` if they ask for nothing.
        wanted: Option<Wanted>,
        /// Whether somebody wrote the section just now: that asks again even for what failed.
        rewritten: bool,
    },
    /// An operator takes the update back.
    CancelRequested,
    /// An operator declares the running slot good.
    ConfirmRequested,
    /// An operator wants the other slot.
    RollBackRequested {
        /// Name for the run, if one comes of it.
        id: RunId,
        /// Who wants it.
        origin: Origin,
    },
    /// An operator wants a restart.
    RestartRequested,
    /// The first bytes of the image came.
    FetchBegan,
    /// Part of the image is proven to be on the medium.
    Checkpointed(Checkpoint),
    /// [`Order::Fetch`] or [`Order::Retire`] before it ended.
    Fetched(Result<Written, Failure>),
    /// [`Order::Verify`] ended.
    Verified(Result<(), Failure>),
    /// [`Order::TryNext`] ended.
    Switched(Result<(), Failure>),
    /// [`Order::Restart`] did not end the agent in time.
    RestartFailed(Failure),
    /// The running slot passed its checks.
    Healthy,
    /// It did not pass them in time; the text says which.
    TrialExpired(String),
    /// Nothing is wrong with the running slot but the network, through no fault of the image; or
    /// that is over. Losing one is harmless.
    Outage(Outage),
    /// [`Order::Confirm`] is done.
    Confirmed,
    /// [`Order::Confirm`] failed; it is tried again.
    ConfirmFailed(Failure),
    /// The machine goes down cleanly, and this process with it; somebody ordered that.
    MachineStops {
        /// Whether it is to start again through the bootloader at once, without losing its power.
        restarts: bool,
    },
    /// [`Order::ReadJournal`] is done.
    JournalRead {
        /// The boot that was asked for.
        of: FailedBoot,
        /// Its last lines, oldest first, or why they could not be read.
        result: Result<Vec<String>, String>,
    },
}

/// Something to do once the state is saved. Each may be carried out twice without harm.
#[derive(Clone, Debug, Eq, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "a handful exist at a time")]
pub enum Order {
    /// Tell who asked.
    Answer(Verdict),
    /// Make sure that the slot does not boot. If that fails, what follows is not done.
    Retire(Slot),
    /// Stream the image into the slot, behind the checkpoint if there is one.
    Fetch(Job, Slot, Option<Checkpoint>),
    /// Read the slot back.
    Verify(Written, Slot),
    /// End [`Order::Fetch`] or [`Order::Verify`].
    StopWork,
    /// Boot the slot once. If that fails, what follows is not done.
    TryNext(Slot),
    /// Forget that the slot was to be tried.
    CancelTry(Slot),
    /// Mark the running slot good and make it the default.
    Confirm,
    /// Check the running slot until it is healthy, or its time is over, if it has one.
    Watch(Option<TrialTime>),
    /// Restart the machine, with the bootloader's one-shot argument if it needs one to try a slot.
    RestartToTry,
    /// Restart the machine into what boots by default.
    Restart,
    /// Have the restart that is under way carry the bootloader's one-shot argument, if it needs
    /// one.
    CarryArgument,
    /// Read the last lines of this boot in the journal.
    ReadJournal(FailedBoot),
}

/// The answer to who asked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// A run was started.
    Accepted(RunId),
    /// Just that update is under way; nothing was started.
    AlreadyRunning(RunId),
    /// Another update is under way.
    Busy(RunId),
    /// The running slot is not confirmed, so the other one may be the only good one.
    Unconfirmed,
    /// The update was taken back.
    Cancelled(RunId),
    /// There is nothing to take back, confirm or go back from.
    Nothing,
    /// The new slot is about to be tried, or is being tried.
    TooLate(RunId),
    /// The running slot is being confirmed.
    Confirming,
    /// The machine goes back to the other slot.
    RollingBack,
    /// The other slot holds no image known to be whole.
    NoWayBack,
    /// The machine restarts.
    Restarting,
}

/// What is known after `event`, and what to do once that is saved.
///
/// An event that means nothing in a state changes nothing: a late or doubled event must never
/// take the agent down.
#[must_use]
pub fn step(mut saved: Saved, event: Event, facts: &Facts) -> (Saved, Vec<Order>) {
    let state = std::mem::replace(&mut saved.state, State::Idle);
    let (failed, starts) = (FailedBoot::behind(&state), event == Event::Started);
    let (state, mut orders) = match event {
        Event::Started => started(&mut saved, state, facts),
        Event::JournalRead { of, result } => {
            last_words::read(&mut saved, of, result);
            (state, vec![])
        }
        Event::Desired { id, wanted, rewritten } => {
            desired(&mut saved, state, id, wanted, rewritten, facts)
        }
        event @ (Event::Requested { .. }
        | Event::CancelRequested
        | Event::ConfirmRequested
        | Event::RollBackRequested { .. }
        | Event::RestartRequested) => asked(&mut saved, state, event, facts),
        event => happened(&mut saved, state, event, facts),
    };
    saved.state = state;
    last_words::want(&mut saved, failed);
    if starts {
        orders.extend(last_words::look_for(&mut saved, facts));
    }
    (saved, orders)
}
