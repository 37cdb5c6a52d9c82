//! What the agent needs done outside itself, beside the bootloader, the store and the clock.

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::update::{Checkpoint, FailedBoot, Failure, Job, Progress, Slot, Written};

/// Told while an image is fetched.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FetchEvent {
    /// The first bytes came.
    Began,
    /// Part of the image is proven to be on the medium. Losing one is harmless.
    Checkpoint(Checkpoint),
}

/// Where a job tells how it goes.
#[derive(Clone, Debug)]
pub struct JobChannels {
    /// What the agent saves.
    pub events: mpsc::Sender<FetchEvent>,
    /// What people see; the newest wins.
    pub progress: watch::Sender<Progress>,
    /// Ends the job.
    pub cancel: CancellationToken,
}

/// Brings images into slots and reads them back.
pub trait Images: Send + Sync {
    /// Streams the image of `job` into `slot`, behind `checkpoint` where that can be proven.
    ///
    /// # Errors
    /// The slot holds an unknown part of the image.
    fn fetch(
        &self,
        job: Job,
        slot: Slot,
        checkpoint: Option<Checkpoint>,
        channels: JobChannels,
    ) -> BoxFuture<'static, Result<Written, Failure>>;

    /// Brings what was fetched into `slot` where that is a step of its own, reads `slot` back from
    /// the medium and compares it with what was written.
    ///
    /// # Errors
    /// The slot does not hold the image, or could not be read.
    fn verify(
        &self,
        written: Written,
        slot: Slot,
        channels: JobChannels,
    ) -> BoxFuture<'static, Result<(), Failure>>;

    /// Forgets what is kept of a fetched image: no update needs it any more.
    fn release(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Why [`Images::verify`] cannot be called off, in words for people, if that is so: because a
    /// service installs the image then, beside us.
    fn uninterruptible(&self) -> Option<&'static str> {
        None
    }
}

/// Local checks of the running system.
pub trait HealthChecks: Send + Sync {
    /// One round.
    ///
    /// # Errors
    /// The first check that does not pass, and what it says.
    fn check(&self) -> BoxFuture<'static, Result<(), String>>;
    /// Whether the device is cut off from every network by what lies outside it, such as a cable
    /// that is pulled out, and what tells so. `None` if it is not, or if nobody can tell: a device
    /// without a network device, or with one that was not brought up, is not cut off but broken.
    fn cut_off(&self) -> BoxFuture<'static, Option<String>>;
}

/// The journal of the boots before this one.
pub trait Journal: Send + Sync {
    /// The last lines that `boot` left, oldest first: for everybody to see, so without secrets, and
    /// few and short enough for the twin. None if it left nothing.
    ///
    /// # Errors
    /// The journal cannot be read; the text says why.
    fn last_words(&self, boot: FailedBoot) -> BoxFuture<'static, Result<Vec<String>, String>>;
}

/// Restarts the machine.
pub trait Restarter: Send + Sync {
    /// Orders the restart, with the bootloader's one-shot argument if it has one. The machine
    /// goes down some time after this returned.
    ///
    /// # Errors
    /// The order was not taken; the text says why.
    fn restart(&self, argument: Option<&'static str>) -> BoxFuture<'static, Result<(), String>>;
    /// Whether the machine goes down cleanly just now, whoever ordered it. Quick, because systemd
    /// waits meanwhile.
    ///
    /// # Errors
    /// Nobody can tell; the text says why.
    fn stopping(&self) -> BoxFuture<'static, Result<Option<Stop>, String>>;
    /// Has the restart that is under way carry the bootloader's one-shot argument.
    ///
    /// # Errors
    /// It carries none; the text says why.
    fn carry(&self, argument: &'static str) -> BoxFuture<'static, Result<(), String>>;
}

/// Where a machine that goes down ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stop {
    /// In the bootloader, which gets the restart's argument.
    Restart,
    /// Switched off, or in a restart that passes the bootloader by: an argument is lost.
    Other,
}

/// Who watches over the process: systemd.
pub trait Supervisor: Send + Sync {
    /// The loop is alive.
    fn alive(&self);
    /// One sentence on what goes on.
    fn status(&self, sentence: &str);
}
