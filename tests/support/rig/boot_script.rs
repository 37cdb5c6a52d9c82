//! The boot scripts of the rig, and what the adapters of the product set for them.

use twinboot::update::Slot;

use super::Script;

/// The scripts' attempts for a confirmed slot.
const ATTEMPTS: u8 = 3;

/// The boot script's variables.
#[derive(Clone, Debug)]
pub enum Variables {
    Tryboot { usual: Slot, one_shot: Slot },
    Uboot { order: Vec<Slot>, left: [u8; 2] },
    Grub { order: [Slot; 2], ok: [bool; 2], tries: [u8; 2], good: Slot },
}

pub fn index(slot: Slot) -> usize {
    match slot {
        Slot::A => 0,
        Slot::B => 1,
    }
}

impl Variables {
    pub fn new(script: Script) -> Self {
        match script {
            Script::Tryboot => Variables::Tryboot { usual: Slot::A, one_shot: Slot::A },
            Script::Uboot => Variables::Uboot { order: vec![Slot::A], left: [ATTEMPTS, 0] },
            Script::Grub => Variables::Grub {
                order: [Slot::A, Slot::B],
                ok: [true, false],
                tries: [0, 0],
                good: Slot::A,
            },
        }
    }

    /// What would start next, as far as it can be told.
    pub fn next(&self) -> Option<Slot> {
        match self {
            Variables::Tryboot { usual, .. } => Some(*usual),
            Variables::Uboot { order, left } => {
                order.iter().copied().find(|slot| left[index(*slot)] > 0)
            }
            Variables::Grub { order, ok, tries, good } => order.iter().copied().find(|slot| {
                let boots = if slot == good { ATTEMPTS } else { 1 };
                ok[index(*slot)] && tries[index(*slot)] < boots
            }),
        }
    }

    /// Whether `slot` was started since it was armed, as far as it can be told.
    pub fn tried(&self, slot: Slot) -> Option<bool> {
        match self {
            Variables::Tryboot { .. } => None,
            Variables::Uboot { order, left } => {
                Some(order.contains(&slot) && left[index(slot)] == 0)
            }
            Variables::Grub { ok, tries, .. } => Some(ok[index(slot)] && tries[index(slot)] > 0),
        }
    }

    /// Whether any number of starts and cuts could lead into `slot`.
    pub fn may_start(&self, slot: Slot) -> bool {
        match self {
            Variables::Tryboot { usual, one_shot } => *usual == slot || *one_shot == slot,
            Variables::Uboot { order, .. } => order.contains(&slot),
            Variables::Grub { ok, .. } => ok[index(slot)],
        }
    }

    /// The machine starts: what the boot scripts and the Raspberry Pi's firmware do. `None` if they
    /// find nothing to start.
    pub fn start(&mut self, argument: Option<&str>) -> Option<Slot> {
        match self {
            Variables::Tryboot { usual, one_shot } => {
                Some(if argument == Some("0 tryboot") { *one_shot } else { *usual })
            }
            Variables::Uboot { order, left } => {
                if order.iter().all(|slot| left[index(*slot)] == 0) {
                    *left = [ATTEMPTS; 2];
                }
                let slot = order.iter().copied().find(|slot| left[index(*slot)] > 0)?;
                left[index(slot)] -= 1;
                Some(slot)
            }
            Variables::Grub { .. } => {
                let mut found = self.next();
                let Variables::Grub { ok, tries, good, .. } = self else { return None };
                if found.is_none() {
                    let (good, other) = (index(*good), index(good.other()));
                    // The confirmed slot begins anew alone, once.
                    tries[other] = if ok[good] && tries[other] == 1 { 2 } else { 0 };
                    tries[good] = 0;
                    found = self.next();
                }
                let Variables::Grub { tries, .. } = self else { return None };
                tries[index(found?)] += 1;
                found
            }
        }
    }

    pub fn retire(&mut self, slot: Slot) {
        let other = slot.other();
        match self {
            Variables::Tryboot { usual, one_shot } => (*usual, *one_shot) = (other, other),
            Variables::Uboot { order, left } => {
                *order = vec![other];
                left[index(slot)] = 0;
                if left[index(other)] == 0 {
                    left[index(other)] = ATTEMPTS;
                }
            }
            Variables::Grub { order, ok, tries, good } => {
                *order = [other, slot];
                ok[index(other)] = true;
                ok[index(slot)] = false;
                *tries = [0; 2];
                *good = other;
            }
        }
    }

    pub fn try_next(&mut self, slot: Slot) {
        let other = slot.other();
        match self {
            Variables::Tryboot { usual, one_shot } => (*usual, *one_shot) = (other, slot),
            Variables::Uboot { order, left } => {
                *order = vec![slot, other];
                left[index(slot)] = 1;
                if left[index(other)] == 0 {
                    left[index(other)] = ATTEMPTS;
                }
            }
            Variables::Grub { order, ok, tries, good } => {
                *order = [slot, other];
                *ok = [true; 2];
                *tries = [0; 2];
                *good = other;
            }
        }
    }

    pub fn confirm(&mut self, running: Slot) {
        let other = running.other();
        match self {
            Variables::Tryboot { usual, one_shot } => {
                let retired = *usual == running && *one_shot == running;
                (*usual, *one_shot) = (running, if retired { running } else { other });
            }
            Variables::Uboot { order, left } => {
                let others = order.iter().copied().filter(|slot| *slot == other);
                *order = std::iter::once(running).chain(others).collect();
                left[index(running)] = ATTEMPTS;
            }
            Variables::Grub { order, ok, tries, good } => {
                *order = [running, other];
                ok[index(running)] = true;
                tries[index(running)] = 0;
                tries[index(other)] = tries[index(other)].min(1);
                *good = running;
            }
        }
    }
}
