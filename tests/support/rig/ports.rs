//! What stands behind the agent's ports: every operation on a medium costs battery.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Notify;
use tokio::time::Instant;
use twinboot::agent::{
    FetchEvent, HealthChecks, Images, JobChannels, Journal, Restarter, Stop, Supervisor,
};
use twinboot::boot::{BootError, BootFacts, Bootloader};
use twinboot::clock::Clock;
use twinboot::store::{Loaded, StateStore, StoreError};
use twinboot::update::{
    Checkpoint, FailedBoot, Failure, FailureKind, HashState, Job, Progress, Saved, Slot, WallTime,
    Written,
};

use super::boot_script::index;
use super::machine::{Gone, Machine, Wrong, digest_of, image, version_in};
use super::{CHUNKS, Fault, LIMITS, Script, TORN};

/// The chunk after which a download notes a checkpoint.
const CHECKPOINT: usize = 3;
/// Signs of life without any operation between them, after which a device is at rest: longer than
/// a trial, a retry or a restart may take.
const SILENCE: usize = 16;
/// How often a folder gets full; shorter than the silence of a device at rest.
const FULL_EVERY_S: u64 = 160;

/// One life of the agent: whatever it leaves behind cannot touch the next.
#[derive(Clone)]
pub struct Life {
    pub machine: Arc<Mutex<Machine>>,
    /// This life is over.
    pub ended: Arc<Notify>,
    /// The machine goes down cleanly.
    pub stops: Arc<Notify>,
    /// Nothing happens any more.
    pub rested: Arc<Notify>,
    pub number: u64,
    pub began: Instant,
    pub uptime: Duration,
}

impl Life {
    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }

    /// One operation; `act` is done only if it is not cut.
    fn operate<T>(
        &self,
        what: impl FnOnce() -> String,
        torn: impl FnOnce(&mut Machine),
        act: impl FnOnce(&mut Machine) -> T,
    ) -> Result<T, Gone> {
        let mut machine = self.machine();
        let result = machine.spend(self.number, what, torn).map(|()| act(&mut machine));
        if result.is_err() {
            self.ended.notify_one();
        }
        result
    }

    fn boot_operation(
        &self,
        name: &str,
        slot: Slot,
        act: impl FnOnce(&mut Machine),
    ) -> Result<(), BootError> {
        let error = || BootError::Invalid { where_: "rig".into(), problem: "refused".into() };
        let fault = self.machine().scenario.fault;
        if fault == Fault::BootVariablesReadOnly && self.machine().boot > 1 {
            return Err(error());
        }
        self.operate(|| format!("{name} {slot}"), |_| (), act).map_err(|Gone| error())
    }
}

impl Bootloader for Life {
    fn facts(&mut self) -> Result<BootFacts, BootError> {
        let machine = self.machine();
        let (running, variables) = (machine.running, &machine.variables);
        Ok(BootFacts { running, next: variables.next(), tried: variables.tried(running.other()) })
    }

    fn retire(&mut self, slot: Slot) -> Result<(), BootError> {
        self.boot_operation("retire", slot, |machine| machine.variables.retire(slot))
    }

    fn try_next(&mut self, slot: Slot) -> Result<(), BootError> {
        self.boot_operation("try next", slot, |machine| {
            if version_in(&machine.slots[index(slot)]).is_none() {
                machine.wrong(Wrong::Brick, "is about to try a broken image");
            }
            if machine.scenario.fault != Fault::NeverTries {
                machine.variables.try_next(slot);
            }
        })
    }

    fn cancel_try(&mut self, slot: Slot) -> Result<(), BootError> {
        self.boot_operation("cancel the try of", slot, |machine| machine.variables.retire(slot))
    }

    fn confirm(&mut self) -> Result<(), BootError> {
        let running = self.machine().running;
        self.boot_operation("confirm", running, |machine| {
            machine.variables.confirm(running);
            let version = machine.running_version();
            if !machine.passed.contains(&version) {
                machine.wrong(Wrong::Unrest, "confirms an image that passed no check");
            }
            machine.confirmed.push(version);
        })
    }

    fn restart_argument(&self) -> Option<&'static str> {
        (self.machine().scenario.script == Script::Tryboot).then_some("0 tryboot")
    }
}

impl StateStore for Life {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        Ok(Loaded { saved: self.machine().saved.clone(), set_aside: None })
    }

    fn save(&mut self, saved: &Saved) -> Result<(), StoreError> {
        let failed = || StoreError::Write {
            path: PathBuf::from("state.json"),
            source: std::io::Error::other("no room"),
        };
        let fault = self.machine().scenario.fault;
        let running = self.machine().running;
        let full = self.since_boot().as_secs() % FULL_EVERY_S < LIMITS.trial_s - 15;
        if fault == Fault::StateFolderFull && full
            || fault.keeps_new_slot_read_only() && running == Slot::B
        {
            return Err(failed());
        }
        let what = || {
            let outcome = saved.last.as_ref().map(|last| &last.kind);
            format!("save {:?}, home {:?}, last {outcome:?}", saved.state, saved.home)
        };
        self.operate(
            what,
            |_| (),
            |machine| {
                machine.keep_books(saved);
                machine.saved_before = machine.saved.replace(saved.clone());
            },
        )
        .map_err(|Gone| failed())
    }
}

impl Clock for Life {
    fn wall(&self) -> Option<WallTime> {
        let boot_ms = i64::try_from(self.machine().boot).unwrap() * 3_600_000;
        let ms = i64::try_from(self.since_boot().as_millis()).unwrap();
        Some(WallTime::from_unix_ms(1_800_000_000_000 + boot_ms + ms))
    }

    fn since_boot(&self) -> Duration {
        self.uptime + self.began.elapsed()
    }
}

impl Images for Life {
    fn fetch(
        &self,
        job: Job,
        slot: Slot,
        checkpoint: Option<Checkpoint>,
        channels: JobChannels,
    ) -> BoxFuture<'static, Result<Written, Failure>> {
        let life = self.clone();
        async move {
            let version: u8 = job.version.unwrap().to_string().parse().unwrap();
            let proven = checkpoint.map_or(0, |checkpoint| {
                let length = usize::try_from(checkpoint.written_bytes).unwrap();
                let found = life.machine().slots[index(slot)].clone();
                if found.starts_with(&image(version)[..length]) { length } else { 0 }
            });
            let _ = channels.events.send(FetchEvent::Began).await;
            for chunk in proven..CHUNKS {
                tokio::time::sleep(Duration::from_secs(1)).await;
                if channels.cancel.is_cancelled() {
                    return Err(Failure::new(FailureKind::Cancelled, "stopped"));
                }
                life.write(version, slot, chunk)
                    .map_err(|Gone| Failure::new(FailureKind::SlotIo, "gone"))?;
                let bytes = u64::try_from(chunk + 1).unwrap();
                channels.progress.send_replace(Progress {
                    fetched_bytes: bytes,
                    written_bytes: bytes,
                    ..Progress::default()
                });
                if chunk + 1 == CHECKPOINT {
                    let _ =
                        channels.events.send(FetchEvent::Checkpoint(checkpoint_at(bytes))).await;
                }
            }
            Ok(Written {
                image_bytes: u64::try_from(CHUNKS).unwrap(),
                image_digest: digest_of(&image(version)),
                fetched_bytes: u64::try_from(CHUNKS).unwrap(),
            })
        }
        .boxed()
    }

    fn verify(
        &self,
        written: Written,
        slot: Slot,
        _channels: JobChannels,
    ) -> BoxFuture<'static, Result<(), Failure>> {
        let life = self.clone();
        async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let found = digest_of(&life.machine().slots[index(slot)]);
            if found == written.image_digest {
                Ok(())
            } else {
                Err(Failure::new(FailureKind::ReadBack, "the slot holds something else"))
            }
        }
        .boxed()
    }
}

fn checkpoint_at(bytes: u64) -> Checkpoint {
    Checkpoint {
        fetched_bytes: bytes,
        written_bytes: bytes,
        fetched_hash: HashState(String::new()),
        image_hash: HashState(String::new()),
        etag: None,
        total_bytes: None,
    }
}

impl Life {
    fn write(&self, version: u8, slot: Slot, chunk: usize) -> Result<(), Gone> {
        let put = |machine: &mut Machine, byte| {
            let content = &mut machine.slots[index(slot)];
            content.resize(CHUNKS, 0);
            content[chunk] = byte;
        };
        self.operate(
            || format!("write chunk {chunk} of version {version} to {slot}"),
            |machine| put(machine, TORN),
            |machine| {
                if slot == machine.running {
                    machine.wrong(Wrong::Brick, "wrote over the running slot");
                }
                if machine.may_start(slot) {
                    machine.wrong(Wrong::Brick, "wrote to a slot that may start");
                }
                let lies = machine.scenario.fault == Fault::LyingDisk && chunk == 1;
                put(machine, if lies { version ^ 0x40 } else { version });
            },
        )
    }
}

impl HealthChecks for Life {
    fn check(&self) -> BoxFuture<'static, Result<(), String>> {
        let mut machine = self.machine();
        let (healthy, version) = (machine.healthy(), machine.running_version());
        if healthy {
            machine.passed.push(version);
        }
        let result = if healthy { Ok(()) } else { Err("sick".to_owned()) };
        std::future::ready(result).boxed()
    }

    fn cut_off(&self) -> BoxFuture<'static, Option<String>> {
        let cut_off = self.machine().cut_off(self.since_boot());
        std::future::ready(cut_off.then(|| "no carrier".to_owned())).boxed()
    }
}

impl Journal for Life {
    fn last_words(&self, boot: FailedBoot) -> BoxFuture<'static, Result<Vec<String>, String>> {
        std::future::ready(Ok(vec![format!("1.0s twinbootd: {boot:?}")])).boxed()
    }
}

impl Restarter for Life {
    fn restart(&self, argument: Option<&'static str>) -> BoxFuture<'static, Result<(), String>> {
        let result = self
            .operate(
                || format!("restart {argument:?}"),
                |_| (),
                |machine| {
                    machine.restarts += 1;
                    if machine.hears_restart() {
                        machine.shut_down(Stop::Restart, argument);
                    }
                },
            )
            .map_err(|Gone| "gone".to_owned());
        if self.machine().stopping.is_some() {
            self.stops.notify_one();
        }
        std::future::ready(result).boxed()
    }

    fn stopping(&self) -> BoxFuture<'static, Result<Option<Stop>, String>> {
        std::future::ready(Ok(self.machine().stopping)).boxed()
    }

    fn carry(&self, argument: &'static str) -> BoxFuture<'static, Result<(), String>> {
        let result = self.operate(
            || format!("carry {argument}"),
            |_| (),
            |machine| {
                let keeps = machine.scenario.fault != Fault::LosesArgument;
                machine.argument = Some(argument).filter(|_| keeps);
            },
        );
        std::future::ready(result.map_err(|Gone| "gone".to_owned())).boxed()
    }
}

/// Knows when nothing happens any more: the loop gives a sign of life every few seconds.
pub struct Rest {
    pub life: Life,
    pub seen: Mutex<(usize, usize)>,
}

impl Supervisor for Rest {
    fn alive(&self) {
        let operations = self.life.machine().operations;
        let mut seen = self.seen.lock().unwrap();
        *seen = if seen.0 == operations { (operations, seen.1 + 1) } else { (operations, 0) };
        if seen.1 >= SILENCE {
            seen.1 = 0;
            self.life.rested.notify_one();
        }
    }

    fn status(&self, _sentence: &str) {}
}
