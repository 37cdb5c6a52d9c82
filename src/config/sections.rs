//! The sections of the configuration, each key with its default.

use std::num::NonZeroU16;
use std::path::PathBuf;

use serde::Deserialize;

use super::values::{ProxyUrl, Seconds, Whole, port};

/// What this device is.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Device {
    /// File of `KEY=value` lines that names the version of the running image.
    pub version_file: PathBuf,
    /// The key in it.
    pub version_key: String,
}

impl Default for Device {
    fn default() -> Self {
        Device { version_file: "/etc/os-release".into(), version_key: "IMAGE_VERSION".into() }
    }
}

/// The IoT Hub connection.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hub {
    /// File of mode 0600 with the device's connection string. The systemd credential
    /// `hub-credential` goes before it.
    pub credential_file: PathBuf,
    /// X.509: the device certificate with its chain, PEM.
    pub certificate_file: Option<PathBuf>,
    /// X.509: its private key, PEM, mode 0600.
    pub private_key_file: Option<PathBuf>,
    /// MQTT over TLS, or over a WebSocket.
    pub transport: Transport,
    /// Address to connect to, if it is neither `GatewayHostName` nor `HostName`.
    pub host: Option<String>,
    /// Port to connect to; 8883 or 443 by the transport if not set.
    #[serde(deserialize_with = "port")]
    pub port: Option<NonZeroU16>,
    /// Certificates the hub must chain to, PEM: a file, or a folder with names by their hashes.
    pub ca_file: PathBuf,
    /// HTTP proxy (CONNECT), `http://host:port`.
    pub proxy: Option<ProxyUrl>,
    /// MQTT keep-alive.
    pub keep_alive_s: Seconds<10, 1177>,
    /// Limit for TCP, TLS and the MQTT handshake together.
    pub connect_limit_s: Seconds<1, 300>,
    /// Life of a SAS token.
    pub token_lifetime_s: Seconds<10, 86_400>,
    /// First delay after a lost connection; doubled each time, with full jitter.
    pub retry_min_s: Seconds<1, 300>,
    /// Longest delay.
    pub retry_max_s: Seconds<1, 3600>,
    /// Longest delay after the hub refused the credential; the first three are shorter.
    pub refused_retry_s: Seconds<1, 86_400>,
}

impl Default for Hub {
    fn default() -> Self {
        Hub {
            credential_file: "/var/lib/twinboot/hub-credential".into(),
            certificate_file: None,
            private_key_file: None,
            transport: Transport::Tcp,
            host: None,
            port: None,
            ca_file: "/etc/ssl/certs".into(),
            proxy: None,
            keep_alive_s: Seconds::of(120),
            connect_limit_s: Seconds::of(30),
            token_lifetime_s: Seconds::of(3600),
            retry_min_s: Seconds::of(1),
            retry_max_s: Seconds::of(300),
            refused_retry_s: Seconds::of(600),
        }
    }
}

/// How MQTT travels.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TLS on port 8883.
    Tcp,
    /// `wss` on port 443.
    Websocket,
}

/// What the twin shows, and how often.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Report {
    /// Contracts A and D: `iothubDM.firmwareUpdate`, `iothubDM.reboot`.
    pub iothub_dm: bool,
    /// Contract B: `firmwareStatus` and its times at the top level.
    pub firmware_status: bool,
    /// Contract C: `firmware`.
    pub firmware: bool,
    /// Least time between two reports of mere progress.
    pub progress_interval_s: Seconds<1, 3600>,
    /// Least step between two reports of mere progress.
    pub progress_step_percent: Whole<1, 100>,
    /// Journal of both slots, on a partition that updates do not touch.
    pub journal_directory: PathBuf,
    /// Lines of a failed boot's journal that the twin shows; 0 for none.
    pub journal_lines: Whole<0, 50>,
}

impl Default for Report {
    fn default() -> Self {
        Report {
            iothub_dm: true,
            firmware_status: true,
            firmware: true,
            progress_interval_s: Seconds::of(5),
            progress_step_percent: Whole::of(5),
            journal_directory: "/var/log/journal".into(),
            journal_lines: Whole::of(20),
        }
    }
}

/// How updates run.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Update {
    /// Install images for which no digest is known.
    pub allow_missing_digest: bool,
    /// Agent starts without progress before a download or a verification is given up.
    pub max_attempts: Whole<1, 100>,
    /// Agent starts in one trial before it is lost.
    pub max_trial_starts: Whole<1, 100>,
    /// Time a new slot has to become healthy, from the agent's first start in that boot.
    pub trial_limit_s: Seconds<5, 86_400>,
    /// Time it has while the network is missing through no fault of the image, in all; counts only
    /// where it is more than the usual time.
    pub trial_outage_limit_s: Seconds<0, 604_800>,
    /// How long a restart waits for the hub to acknowledge the last report.
    pub restart_report_limit_s: Seconds<0, 300>,
}

impl Default for Update {
    fn default() -> Self {
        Update {
            allow_missing_digest: false,
            max_attempts: Whole::of(20),
            max_trial_starts: Whole::of(3),
            trial_limit_s: Seconds::of(600),
            trial_outage_limit_s: Seconds::of(86_400),
            restart_report_limit_s: Seconds::of(10),
        }
    }
}

/// How images are fetched.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fetch {
    /// Fetch over `http` too, if the request itself carries a digest.
    pub allow_http: bool,
    /// Certificates the image server must chain to, PEM.
    pub ca_file: PathBuf,
    /// HTTP proxy, `http://host:port`.
    pub proxy: Option<ProxyUrl>,
    /// Client certificate with its chain, PEM.
    pub client_certificate_file: Option<PathBuf>,
    /// Its private key, PEM (PKCS #8), mode 0600.
    pub client_key_file: Option<PathBuf>,
    /// Redirects followed for one request.
    pub max_redirects: Whole<0, 20>,
    /// Limit for TCP and TLS.
    pub connect_limit_s: Seconds<1, 300>,
    /// Longest time without a byte.
    pub stall_limit_s: Seconds<1, 3600>,
    /// First delay after a broken transfer; doubled each time, with full jitter.
    pub retry_min_s: Seconds<1, 300>,
    /// Longest delay.
    pub retry_max_s: Seconds<1, 3600>,
    /// Time without progress after which the download is given up. Counts while the device itself
    /// has no network, too.
    pub retry_budget_s: Seconds<0, 604_800>,
    /// Bandwidth limit in bytes a second; none if not set.
    pub rate_limit_bytes_per_s: Option<Whole<1024, 1_000_000_000>>,
    /// Memory a decompressor may ask for, in MiB. The rest of the service's `MemoryMax=` is for
    /// everything else in it.
    pub decoder_memory_mib: Whole<1, 192>,
}

impl Default for Fetch {
    fn default() -> Self {
        Fetch {
            allow_http: false,
            ca_file: "/etc/ssl/certs/ca-certificates.crt".into(),
            proxy: None,
            client_certificate_file: None,
            client_key_file: None,
            max_redirects: Whole::of(5),
            connect_limit_s: Seconds::of(30),
            stall_limit_s: Seconds::of(60),
            retry_min_s: Seconds::of(1),
            retry_max_s: Seconds::of(60),
            retry_budget_s: Seconds::of(86_400),
            rate_limit_bytes_per_s: None,
            decoder_memory_mib: Whole::of(64),
        }
    }
}

/// The two slots.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Slots {
    /// The first slot.
    pub a: SlotDevice,
    /// The second slot.
    pub b: SlotDevice,
}

impl Default for Slots {
    fn default() -> Self {
        let of =
            |label: &str| SlotDevice { device: format!("/dev/disk/by-partlabel/{label}").into() };
        Slots { a: of("rootfs-a"), b: of("rootfs-b") }
    }
}

/// One slot.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotDevice {
    /// Its block device, or a file that stands for one.
    pub device: PathBuf,
}

/// How images get into a slot.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Install {
    /// Which installer.
    pub kind: InstallKind,
    /// For `command`: the program and its arguments.
    pub command: Vec<String>,
    /// For `command`: how long the program may take nothing, or not end after the last byte; for
    /// `rauc`: how long RAUC may tell no progress.
    pub stall_limit_s: Seconds<1, 86_400>,
    /// How much is written between two points from which a cut update goes on, in MiB.
    pub checkpoint_mib: Whole<1, 4096>,
}

impl Default for Install {
    fn default() -> Self {
        Install {
            kind: InstallKind::Block,
            command: Vec::new(),
            stall_limit_s: Seconds::of(900),
            checkpoint_mib: Whole::of(64),
        }
    }
}

/// Which installer.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum InstallKind {
    /// Writes the slot itself.
    Block,
    /// Hands the stream to an outside program.
    Command,
    /// Hands a bundle to RAUC's service.
    Rauc,
}

/// How the next boot is chosen.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Boot {
    /// Which bootloader.
    pub kind: BootKind,
    /// For `uboot`.
    pub uboot: Uboot,
    /// For `grub`.
    pub grub: Grub,
    /// For `tryboot`.
    pub tryboot: Tryboot,
    /// For `custom`.
    pub custom: Custom,
}

/// Which bootloader.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum BootKind {
    /// U-Boot with RAUC's variables.
    #[default]
    Uboot,
    /// GRUB with RAUC's variables.
    Grub,
    /// The Raspberry Pi firmware.
    Tryboot,
    /// An outside program.
    Custom,
    /// RAUC's service, with whatever boot loader it knows.
    Rauc,
}

/// U-Boot's environment tools.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Uboot {
    /// Program that prints variables.
    pub fw_printenv: PathBuf,
    /// Program that sets variables.
    pub fw_setenv: PathBuf,
    /// Boots a confirmed slot may fail before the other one is taken.
    pub confirmed_attempts: Whole<1, 9>,
}

impl Default for Uboot {
    fn default() -> Self {
        Uboot {
            fw_printenv: "fw_printenv".into(),
            fw_setenv: "fw_setenv".into(),
            confirmed_attempts: Whole::of(3),
        }
    }
}

/// GRUB's environment block.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Grub {
    /// The environment block of 1024 bytes.
    pub environment: PathBuf,
}

impl Default for Grub {
    fn default() -> Self {
        Grub { environment: "/boot/grub/grubenv".into() }
    }
}

/// The Raspberry Pi firmware's files.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tryboot {
    /// `autoboot.txt` on the first FAT partition, mounted read-write.
    pub autoboot: PathBuf,
    /// Boot partition of slot A.
    pub partition_a: Whole<1, 63>,
    /// Boot partition of slot B.
    pub partition_b: Whole<1, 63>,
}

impl Default for Tryboot {
    fn default() -> Self {
        Tryboot {
            autoboot: "/boot/autoboot/autoboot.txt".into(),
            partition_a: Whole::of(2),
            partition_b: Whole::of(3),
        }
    }
}

/// A program that chooses the next boot.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Custom {
    /// The program and its first arguments; the verb and the slot follow.
    pub command: Vec<String>,
    /// Time each call may take.
    pub limit_s: Seconds<1, 300>,
}

impl Default for Custom {
    fn default() -> Self {
        Custom { command: Vec::new(), limit_s: Seconds::of(30) }
    }
}

/// RAUC's service, for `install.kind` and `boot.kind` `rauc`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rauc {
    /// Socket of the D-Bus that the service is on.
    pub bus: PathBuf,
    /// RAUC's name for slot A, if it has another boot name than `A`.
    pub slot_a: Option<String>,
    /// RAUC's name for slot B, if it has another boot name than `B`.
    pub slot_b: Option<String>,
    /// Where a bundle is kept until it is installed, on a partition that survives updates.
    pub bundle_file: PathBuf,
    /// Read slots of RAUC's type `raw` back and compare them with the manifest.
    pub read_back: bool,
}

impl Default for Rauc {
    fn default() -> Self {
        Rauc {
            bus: "/run/dbus/system_bus_socket".into(),
            slot_a: None,
            slot_b: None,
            bundle_file: "/var/lib/twinboot/update.raucb".into(),
            read_back: true,
        }
    }
}

/// What a new slot must pass.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Health {
    /// Ask for a hub session with an answered report.
    pub hub: bool,
    /// systemd units that must be active.
    pub units: Vec<String>,
    /// Folder of programs that must exit with 0.
    pub directory: PathBuf,
    /// Time each of them may take.
    pub program_limit_s: Seconds<1, 600>,
    /// Time between two rounds.
    pub interval_s: Seconds<1, 600>,
    /// The program that tells whether a unit is active.
    pub systemctl: PathBuf,
}

impl Default for Health {
    fn default() -> Self {
        Health {
            hub: true,
            units: Vec::new(),
            directory: "/etc/twinboot/health.d".into(),
            program_limit_s: Seconds::of(30),
            interval_s: Seconds::of(5),
            systemctl: "systemctl".into(),
        }
    }
}

/// How the machine is restarted.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Restart {
    /// The program and its arguments. `{argument}` stands for the one-shot argument of the
    /// bootloader (Raspberry Pi: `0 tryboot`); without one the word is left out.
    pub command: Vec<String>,
    /// How long the order may take to end the agent before it counts as failed.
    pub limit_s: Seconds<1, 3600>,
}

impl Default for Restart {
    fn default() -> Self {
        Restart {
            command: ["systemctl", "reboot", "--reboot-argument={argument}"]
                .map(str::to_owned)
                .into(),
            limit_s: Seconds::of(300),
        }
    }
}

/// Where the state is kept.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    /// Folder on a partition that survives updates.
    pub directory: PathBuf,
    /// Start even if that folder lies on a slot or in memory. For trials only: an update would lose
    /// it.
    pub allow_on_slot: bool,
}

impl Default for State {
    fn default() -> Self {
        State { directory: "/var/lib/twinboot".into(), allow_on_slot: false }
    }
}

/// The local socket of the device command.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    /// The socket.
    pub socket: PathBuf,
    /// Group that may use it beside root.
    pub group: Option<String>,
}

impl Default for Control {
    fn default() -> Self {
        Control { socket: "/run/twinboot/control.sock".into(), group: None }
    }
}

/// What is logged.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// The least important level that is logged.
    pub level: Level,
}

impl Default for Log {
    fn default() -> Self {
        Log { level: Level::Info }
    }
}

/// How important a log line is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Someone must act.
    Error,
    /// The agent deals with it.
    Warn,
    /// The story of an update.
    Info,
    /// For the developers of twinboot.
    Debug,
}
