//! The boot scripts of the rig, and what the adapters of the product set for them.

use twinboot::update::Slot;

use super::Script;

/// The U-Boot script's attempts for a confirmed slot.
const ATTEMPTS: u8 = 3;

/// The boot script's variables.
#[derive(Clone, Debug)]
pub enum Variables {
    Tryboot { usual: Slot, one_shot: Slot },
    Uboot { order: Vec<Slot>, left: [u8; 2] },
    Grub { order: [Slot; 2], ok: [bool; 2], tried: [bool; 2] },
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
                tried: [false, false],
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
            Variables::Grub { order, ok, tried } => {
                order.iter().copied().find(|slot| ok[index(*slot)] && !tried[index(*slot)])
            }
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

    /// The machine starts: what RAUC's scripts and the Raspberry Pi's firmware do. `None` if they
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
            Variables::Grub { order, ok, tried } => {
                // The rescue system is left by switching the machine off and on again.
                for _ in 0..2 {
                    for slot in *order {
                        let untried = !std::mem::replace(&mut tried[index(slot)], true);
                        if ok[index(slot)] && untried {
                            return Some(slot);
                        }
                    }
                    for slot in Slot::BOTH {
                        tried[index(slot)] &= !ok[index(slot)];
                    }
                }
                None
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
            Variables::Grub { order, ok, tried } => {
                *order = [other, slot];
                ok[index(other)] = true;
                ok[index(slot)] = false;
                *tried = [false; 2];
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
            Variables::Grub { order, ok, tried } => {
                *order = [slot, other];
                *ok = [true; 2];
                *tried = [false; 2];
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
            Variables::Grub { order, ok, tried } => {
                *order = [running, other];
                ok[index(running)] = true;
                tried[index(running)] = false;
            }
        }
    }
}
