//! Which slot runs: told by the kernel command line and by the mounted root.

use std::path::{Path, PathBuf};

use super::BootError;
use crate::config;
use crate::os::{self, DeviceNumber, MountedRoot, Sysroot};
use crate::update::Slot;

/// Arguments by which a boot script names the slot: RAUC's, and ours.
const SLOT_ARGUMENTS: [&str; 2] = ["twinboot.slot", "rauc.slot"];

/// Something that may tell which slot runs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Clue {
    /// What it is, for people: `rauc.slot=A on the kernel command line`.
    pub what: String,
    /// The slot it tells; `None` if it fits neither.
    pub slot: Option<Slot>,
}

/// A device, as the kernel command line or the list of mounts names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Named {
    /// By its path.
    Path(PathBuf),
    /// By a name in one of udev's folders below `/dev/disk`, for instance `by-partuuid`.
    Link {
        /// The folder.
        folder: &'static str,
        /// The name in it.
        name: String,
    },
    /// By its number.
    Number(DeviceNumber),
}

/// The slot that this system was started from.
///
/// # Errors
/// [`BootError::UnknownSlot`] if nothing tells it, or if what tells it disagrees.
pub fn running(slots: &config::Slots, sysroot: &Sysroot) -> Result<Slot, BootError> {
    decide(&clues(slots, sysroot)?)
}

/// Everything that `/proc` has to say. A file that is missing says nothing.
pub(super) fn clues(slots: &config::Slots, sysroot: &Sysroot) -> Result<Vec<Clue>, BootError> {
    let text = |path: &str| sysroot.text(path).map(Option::unwrap_or_default);
    let (line, mounts) = (text("/proc/cmdline")?, text("/proc/self/mountinfo")?);
    let root = os::mounted_root(&mounts);
    Ok(gather(&line, root.as_ref(), &|named| slot_of(named, slots, sysroot)))
}

/// The slot that all clues agree on.
///
/// # Errors
/// [`BootError::UnknownSlot`] that names the clues: none fits a slot, or two contradict.
pub fn decide(clues: &[Clue]) -> Result<Slot, BootError> {
    let telling: Vec<(Slot, &Clue)> =
        clues.iter().filter_map(|clue| clue.slot.map(|slot| (slot, clue))).collect();
    let Some((slot, first)) = telling.first() else {
        let found: Vec<&str> = clues.iter().map(|clue| clue.what.as_str()).collect();
        let found = if found.is_empty() { "nothing".to_owned() } else { found.join(", ") };
        return Err(BootError::UnknownSlot {
            problem: format!(
                "found {found}, which is neither slot; put twinboot.slot=A or twinboot.slot=B on \
                 the kernel command line, or correct slots.a.device and slots.b.device"
            ),
        });
    };
    match telling.iter().find(|(other, _)| other != slot) {
        None => Ok(*slot),
        Some((other, second)) => Err(BootError::UnknownSlot {
            problem: format!("{} is slot {slot}, but {} is slot {other}", first.what, second.what),
        }),
    }
}

/// The clues in a kernel command line and in the mounted root. `slot_of` knows the devices.
pub fn gather(
    line: &str,
    root: Option<&MountedRoot>,
    slot_of: &dyn Fn(&Named) -> Option<Slot>,
) -> Vec<Clue> {
    let arguments = os::kernel_arguments(line);
    // Said twice, the last one counts, as it does for the kernel.
    let argument = |key: &str| {
        let (_, value) = arguments.iter().rfind(|(name, _)| name == key)?;
        value.as_deref()
    };
    let mut clues: Vec<Clue> = SLOT_ARGUMENTS
        .into_iter()
        .filter_map(|key| {
            let value = argument(key)?;
            let slot = Slot::BOTH.into_iter().find(|slot| slot.name() == value);
            Some(Clue { what: format!("{key}={value} on the kernel command line"), slot })
        })
        .collect();
    clues.extend(argument("root").map(|value| Clue {
        what: format!("root={value} on the kernel command line"),
        slot: named(value).and_then(|device| slot_of(&device)),
    }));
    clues.extend(root.map(|root| Clue {
        what: format!("the mounted root {} ({})", root.source.display(), root.number),
        slot: slot_of_mount(root, slot_of),
    }));
    clues
}

/// The device that a value of `root=` names, in the forms of the kernel and of the usual initial
/// file systems; `None` for everything that is not a device.
pub fn named(value: &str) -> Option<Named> {
    let link = |folder, name: String| Some(Named::Link { folder, name });
    match value.split_once('=') {
        // udev writes them in lower case, the kernel takes both.
        Some(("PARTUUID", id)) => link("by-partuuid", id.to_ascii_lowercase()),
        Some(("UUID", id)) => link("by-uuid", id.to_owned()),
        Some(("PARTLABEL", label)) => link("by-partlabel", udev_name(label)),
        Some(("LABEL", label)) => link("by-label", udev_name(label)),
        Some(_) => None,
        // The kernel's own name for a root that it mounted itself. It is no device node.
        None if value == "/dev/root" => None,
        None if value.starts_with('/') => Some(Named::Path(value.into())),
        None => DeviceNumber::parse(value).map(Named::Number),
    }
}

/// The slot that `path` lies on, which would be lost with it; `None` also if nobody can tell.
/// `path` need not exist yet.
#[must_use]
pub fn slot_with(path: &Path, slots: &config::Slots, sysroot: &Sysroot) -> Option<Slot> {
    let existing = path.ancestors().find(|ancestor| ancestor.exists())?;
    let number = os::file_system_number(existing).ok()?;
    let on_device = |device: &Path| {
        number.is_block_device() && os::block_number(device).ok().flatten() == Some(number)
    };
    Slot::BOTH
        .into_iter()
        .find(|slot| on_device(device(slots, *slot)))
        .or_else(|| slot_of_root(number, slots, sysroot))
}

/// The slot whose root file system this is, for roots that do not lie on the slot's device
/// itself but on one stacked on it: the command line tells, if the root has this `number`.
fn slot_of_root(number: DeviceNumber, slots: &config::Slots, sysroot: &Sysroot) -> Option<Slot> {
    let mounts = sysroot.text("/proc/self/mountinfo").ok()??;
    let root = os::mounted_root(&mounts)?;
    // What is written to an overlay lies somewhere else.
    if root.number != number || root.kind == "overlay" {
        return None;
    }
    running(slots, sysroot).ok()
}

/// The device of `slot`.
pub(crate) fn device(slots: &config::Slots, slot: Slot) -> &Path {
    match slot {
        Slot::A => &slots.a.device,
        Slot::B => &slots.b.device,
    }
}

fn slot_of_mount(root: &MountedRoot, slot_of: &dyn Fn(&Named) -> Option<Slot>) -> Option<Slot> {
    if root.number.is_block_device() {
        return slot_of(&Named::Number(root.number));
    }
    // btrfs has numbers of its own, but says where it lies. An overlay does not.
    named(root.source.to_str()?).and_then(|device| slot_of(&device))
}

fn slot_of(named: &Named, slots: &config::Slots, sysroot: &Sysroot) -> Option<Slot> {
    let is = |slot: &Slot| {
        let device = device(slots, *slot);
        match named {
            Named::Path(path) => same_device(path, device),
            Named::Link { folder, name } => {
                same_device(&sysroot.path("/dev/disk").join(folder).join(name), device)
            }
            Named::Number(number) => os::block_number(device).ok().flatten() == Some(*number),
        }
    };
    match Slot::BOTH.map(|slot| is(&slot)) {
        [true, false] => Some(Slot::A),
        [false, true] => Some(Slot::B),
        // Both only if two names of one device are configured: that tells nothing.
        [false, false] | [true, true] => None,
    }
}

/// Whether two paths lead to one device: by their text, their target, or their number.
fn same_device(one: &Path, other: &Path) -> bool {
    if one == other {
        return true;
    }
    let (Ok(target), Ok(other_target)) = (one.canonicalize(), other.canonicalize()) else {
        return false;
    };
    let number = |path: &Path| os::block_number(path).ok().flatten();
    target == other_target
        || (number(&target).is_some() && number(&target) == number(&other_target))
}

/// A label as udev spells it in a file name: what is neither a letter, a digit, one of `#+-.:=@_`
/// nor beyond ASCII becomes `\x` and two hexadecimal digits.
fn udev_name(label: &str) -> String {
    label.chars().fold(String::new(), |mut name, character| {
        let plain = character.is_ascii_alphanumeric() || !character.is_ascii();
        if plain || "#+-.:=@_".contains(character) {
            name.push(character);
        } else {
            name.push_str(&format!("\\x{:02x}", u32::from(character)));
        }
        name
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(number: &str, kind: &str, source: &str) -> MountedRoot {
        MountedRoot {
            number: DeviceNumber::parse(number).unwrap(),
            kind: kind.to_owned(),
            source: source.into(),
        }
    }

    /// A board with slot A on 179:2 and slot B on 179:3, as udev shows it.
    fn board(named: &Named) -> Option<Slot> {
        let name = match named {
            Named::Path(path) => path.display().to_string(),
            Named::Link { folder, name } => format!("{folder}/{name}"),
            Named::Number(number) => number.to_string(),
        };
        match name.as_str() {
            "/dev/mmcblk0p2"
            | "179:2"
            | "by-partuuid/5e3da3da-02"
            | "by-label/root\\x20a"
            | "by-partlabel/rootfs-a"
            | "by-uuid/0aB" => Some(Slot::A),
            "/dev/mmcblk0p3"
            | "179:3"
            | "by-partuuid/5e3da3da-03"
            | "by-label/root\\x20b"
            | "by-partlabel/rootfs-b" => Some(Slot::B),
            _ => None,
        }
    }

    #[test]
    fn tells_the_running_slot() {
        let a = || Some(root("179:2", "ext4", "/dev/root"));
        let b = || Some(root("179:3", "ext4", "/dev/mmcblk0p3"));
        let overlay = || Some(root("0:40", "overlay", "overlay"));
        let btrfs = || Some(root("0:33", "btrfs", "/dev/mmcblk0p3"));
        let verity = || Some(root("253:0", "squashfs", "/dev/dm-0"));
        for (line, mounted, expected) in [
            // One clue is enough.
            ("rauc.slot=A", None, Ok(Slot::A)),
            ("quiet twinboot.slot=B rw", None, Ok(Slot::B)),
            ("root=/dev/mmcblk0p2", None, Ok(Slot::A)),
            ("root=PARTUUID=5E3DA3DA-03", None, Ok(Slot::B)),
            ("root=PARTLABEL=rootfs-b", None, Ok(Slot::B)),
            ("root=UUID=0aB", None, Ok(Slot::A)),
            ("\"root=LABEL=root b\"", None, Ok(Slot::B)),
            ("root=\"LABEL=root a\"", None, Ok(Slot::A)),
            ("root=179:3", None, Ok(Slot::B)),
            ("root=/dev/root", a(), Ok(Slot::A)),
            ("", b(), Ok(Slot::B)),
            ("", btrfs(), Ok(Slot::B)),
            // Overlay and stacked roots: only the command line tells.
            ("rauc.slot=B", overlay(), Ok(Slot::B)),
            ("rauc.slot=B root=/dev/dm-0", verity(), Ok(Slot::B)),
            // All agree.
            ("rauc.slot=A root=/dev/mmcblk0p2", a(), Ok(Slot::A)),
            ("rauc.slot=A twinboot.slot=A", a(), Ok(Slot::A)),
            // The last one counts.
            ("root=/dev/mmcblk0p3 root=/dev/mmcblk0p2", a(), Ok(Slot::A)),
            ("rauc.slot=A rauc.slot=B", None, Ok(Slot::B)),
            // A name we do not know does not outweigh one that we do.
            ("rauc.slot=system0 root=/dev/mmcblk0p2", a(), Ok(Slot::A)),
            // They disagree: both are named.
            ("rauc.slot=A", b(), Err(["rauc.slot=A", "/dev/mmcblk0p3 (179:3) is slot B"])),
            ("root=/dev/mmcblk0p2", b(), Err(["root=/dev/mmcblk0p2", "is slot B"])),
            ("rauc.slot=A twinboot.slot=B", None, Err(["twinboot.slot=B", "rauc.slot=A"])),
            ("rauc.slot=B root=/dev/mmcblk0p2", b(), Err(["rauc.slot=B", "is slot A"])),
            // Nothing tells.
            ("", None, Err(["found nothing", "slots.a.device"])),
            ("quiet", overlay(), Err(["overlay (0:40)", "twinboot.slot=A"])),
            ("rauc.slot=R", None, Err(["rauc.slot=R", "neither slot"])),
            ("rauc.slot=a root=/dev/sda9", None, Err(["rauc.slot=a", "root=/dev/sda9"])),
            ("root=/dev/nfs nfsroot=h:/r", None, Err(["root=/dev/nfs", "neither slot"])),
            ("rauc.slot root", None, Err(["found nothing", "neither slot"])),
        ] {
            let found = decide(&gather(line, mounted.as_ref(), &board));
            match (found, expected) {
                (Ok(slot), Ok(wanted)) => assert_eq!(slot, wanted, "{line} {mounted:?}"),
                (Err(error), Err(parts)) => {
                    let text = error.to_string();
                    assert!(parts.iter().all(|part| text.contains(part)), "{line}: {text}");
                }
                (found, wanted) => panic!("{line} {mounted:?}: {found:?}, but not {wanted:?}"),
            }
        }
    }
}
