//! Whether the device is cut off: what the kernel tells of the lines to its network devices.

use std::path::Path;

use super::machine::Sysroot;

/// A folder for each network device (`Documentation/ABI/testing/sysfs-class-net` of the kernel).
const DEVICES: &str = "/sys/class/net";
/// `IFF_UP` of linux/if.h: the interface was brought up.
const IFF_UP: u32 = 1;
/// `ARPHRD_ETHER` of linux/if_arp.h: Ethernet, and what looks like it, such as Wi-Fi. CAN, for one,
/// leads to no hub and has a carrier as soon as it is up.
const ARPHRD_ETHER: &str = "1";

/// A line of the device to the outside.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Line {
    /// Something is at the other end.
    Carries,
    /// A cable that leads nowhere: the system did its part.
    Dead,
    /// Not brought up, or wireless without a station: that may be the system's fault.
    Silent,
}

/// Says which cables lead nowhere, if that alone keeps the device from every network: at least one
/// cabled device was brought up and has no carrier, and no device has one. `None` otherwise, also if
/// nobody can tell. Devices without hardware, such as `lo`, bridges and tunnels, are no lines; nor is
/// what is no network (CAN), and the wire between the processor and a switch on the same board, whose
/// ports are devices of their own.
///
/// A wireless device without a station is no proof, because a wrong key or missing firmware looks
/// the same.
#[must_use]
pub fn cut_off(sysroot: &Sysroot) -> Option<String> {
    let entries = std::fs::read_dir(sysroot.path(DEVICES)).ok()?;
    let mut dead = Vec::new();
    for entry in entries.flatten() {
        match line(&entry.path()) {
            Some(Line::Carries) => return None,
            Some(Line::Dead) => dead.push(entry.file_name().to_string_lossy().into_owned()),
            Some(Line::Silent) | None => {}
        }
    }
    dead.sort();
    let (are, have) = if dead.len() == 1 { ("is", "has") } else { ("are", "have") };
    (!dead.is_empty()).then(|| format!("{} {are} up and {have} no carrier", dead.join(", ")))
}

/// The line of the network device in `folder`; `None` if it does not lead to the outside.
fn line(folder: &Path) -> Option<Line> {
    // `dsa` marks the conduit of a switch (Documentation/networking/dsa of the kernel), which always
    // has a carrier.
    if !folder.join("device").exists() || folder.join("dsa").exists() {
        return None;
    }
    let text = |name| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    let is_type = |wanted| text("uevent").lines().any(|line| line == wanted);
    let is_modem = is_type("DEVTYPE=wwan");
    // A modem may hand over bare IP packets.
    if text("type").trim() != ARPHRD_ETHER && !is_modem {
        return None;
    }
    let flags = text("flags");
    let digits = flags.trim().trim_start_matches("0x");
    let is_up = u32::from_str_radix(digits, 16).is_ok_and(|flags| flags & IFF_UP != 0);
    // Reading the carrier of a device that is down is an error.
    let carrier = text("carrier");
    let is_wireless = ["wireless", "phy80211"].iter().any(|name| folder.join(name).exists())
        || is_type("DEVTYPE=wlan")
        || is_modem;
    Some(match (is_up, carrier.trim()) {
        (true, "1") => Line::Carries,
        (true, "0") if !is_wireless => Line::Dead,
        _ => Line::Silent,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Name, files and folders of a network device.
    type Device = (&'static str, &'static [(&'static str, &'static str)]);

    const HARDWARE: (&str, &str) = ("device/", "");
    const ETHER: (&str, &str) = ("type", "1\n");
    const UP: (&str, &str) = ("flags", "0x1003\n");
    const CARRIES: (&str, &str) = ("carrier", "1\n");
    const DEAD: (&str, &str) = ("carrier", "0\n");

    const LO: Device = ("lo", &[("type", "772\n"), ("flags", "0x9\n"), CARRIES]);
    const BRIDGE: Device = ("br0", &[ETHER, UP, CARRIES]);
    const PLUGGED: Device = ("eth0", &[HARDWARE, ETHER, UP, CARRIES]);
    const PULLED: Device = ("eth0", &[HARDWARE, ETHER, UP, DEAD]);
    const SECOND: Device = ("eth1", &[HARDWARE, ETHER, UP, DEAD]);
    const DOWN: Device = ("eth0", &[HARDWARE, ETHER, ("flags", "0x1002\n")]);
    const WIFI: Device = ("wlan0", &[HARDWARE, ("wireless/", ""), ETHER, UP, DEAD]);
    const STATION: Device = ("wlan0", &[HARDWARE, ("wireless/", ""), ETHER, UP, CARRIES]);
    const MODEM: Device = ("wwan0", &[HARDWARE, ("uevent", "DEVTYPE=wwan\n"), ETHER, UP, DEAD]);
    /// ARPHRD_NONE: bare IP packets.
    const DIALLED: Device =
        ("wwan0", &[HARDWARE, ("uevent", "DEVTYPE=wwan\n"), ("type", "65534\n"), UP, CARRIES]);
    const CAN: Device = ("can0", &[HARDWARE, ("type", "280\n"), ("flags", "0x40c1\n"), CARRIES]);
    const CAN_OFF: Device = ("can0", &[HARDWARE, ("type", "280\n"), ("flags", "0x40c1\n"), DEAD]);
    const CONDUIT: Device = ("eth0", &[HARDWARE, ("dsa/", ""), ETHER, UP, CARRIES]);
    const PORT: Device = ("lan1", &[HARDWARE, ETHER, UP, DEAD]);
    const USED_PORT: Device = ("lan2", &[HARDWARE, ETHER, UP, CARRIES]);

    fn told(devices: &[Device]) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        for (device, files) in devices {
            let place = folder.path().join("sys/class/net").join(device);
            fs::create_dir_all(&place).unwrap();
            for (name, text) in *files {
                match name.strip_suffix('/') {
                    Some(name) => fs::create_dir(place.join(name)).unwrap(),
                    None => fs::write(place.join(name), text).unwrap(),
                }
            }
        }
        cut_off(&Sysroot::new(folder.path()))
    }

    #[test]
    fn only_a_cable_that_leads_nowhere_cuts_a_device_off() {
        for (devices, expected) in [
            (&[LO, PULLED][..], Some("eth0 is up and has no carrier")),
            (&[LO, PULLED, BRIDGE], Some("eth0 is up and has no carrier")),
            (&[PULLED, SECOND], Some("eth0, eth1 are up and have no carrier")),
            (&[PULLED, WIFI, MODEM], Some("eth0 is up and has no carrier")),
            // CAN is no way to a hub, and the wire to the switch on the board tells nothing.
            (&[PULLED, CAN], Some("eth0 is up and has no carrier")),
            (&[CONDUIT, PORT], Some("lan1 is up and has no carrier")),
            // Something carries.
            (&[LO, PLUGGED], None),
            (&[PLUGGED, SECOND], None),
            (&[PULLED, STATION], None),
            (&[PULLED, DIALLED], None),
            (&[CONDUIT, PORT, USED_PORT], None),
            // The image has no driver, or brought nothing up, or may have lost the key.
            (&[], None),
            (&[LO], None),
            (&[LO, DOWN], None),
            (&[LO, WIFI], None),
            (&[LO, MODEM], None),
            (&[LO, CAN_OFF], None),
            (&[CONDUIT], None),
        ] {
            assert_eq!(told(devices).as_deref(), expected, "{devices:?}");
        }
        assert_eq!(cut_off(&Sysroot::new("/no/such/folder")), None);
    }
}
