//! RAUC's service over D-Bus: the interface `de.pengutronix.rauc.Installer` of RAUC 1.8 and later
//! (RAUC's reference, "D-Bus API").
//!
//! Nothing is kept between two uses: [`Rauc::connect`] opens a connection on a runtime of its own,
//! and both end with the [`Session`]. An agent that asks RAUC for nothing holds nothing of this.
//! Everything in here blocks.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::runtime::{Builder, Runtime};
use tokio::time::{Instant, sleep, timeout};
use zbus::names::{BusName, WellKnownName};
use zbus::proxy::CacheProperties;
use zbus::{OwnedVariant, Variant, connection, fdo};

use crate::config;
use crate::redact::one_line;
use crate::update::{Digest, Slot};

/// The service's name on the bus.
const SERVICE: &str = "de.pengutronix.rauc";
/// How long one answer may take: marking a slot runs the boot loader's tools.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at the progress of an installation.
const LOOK: Duration = Duration::from_millis(500);
/// What RAUC says while it does nothing.
const IDLE: &str = "idle";
/// How RAUC refuses a call while it works (`src/service.c`), in small letters.
const ALREADY_PROCESSING: &str = "already processing";
/// Characters of RAUC's words that are passed on.
const MAX_WORDS: usize = 400;

#[zbus::proxy(interface = "de.pengutronix.rauc.Installer", default_path = "/")]
trait Installer {
    async fn install_bundle(
        &self,
        source: &str,
        args: HashMap<&str, Variant<'_>>,
    ) -> zbus::Result<()>;
    async fn mark(&self, state: &str, slot_identifier: &str) -> zbus::Result<(String, String)>;
    async fn get_slot_status(&self) -> zbus::Result<Vec<(String, HashMap<String, OwnedVariant>)>>;
    async fn get_primary(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn operation(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn last_error(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn progress(&self) -> zbus::Result<(i32, String, i32)>;
    #[zbus(signal)]
    fn completed(&self, result: i32) -> zbus::Result<()>;
}

/// Where RAUC's service is found, and which of its slots are ours.
#[derive(Clone, Debug)]
pub struct Rauc {
    settings: config::Rauc,
}

/// A conversation with the service. It ends when this is dropped, or when the service does: a
/// service that was started anew in between is another one.
pub struct Session {
    // Before the runtime, on which it lives.
    service: InstallerProxy<'static>,
    runtime: Runtime,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

/// What RAUC is to think of a slot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mark {
    /// It boots, as often as RAUC's boot loader backend grants.
    Good,
    /// It does not boot.
    Bad,
    /// It boots next.
    Active,
}

impl Mark {
    fn name(self) -> &'static str {
        match self {
            Mark::Good => "good",
            Mark::Bad => "bad",
            Mark::Active => "active",
        }
    }
}

/// What RAUC tells of one of its slots.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SlotStatus {
    /// Its name in `system.conf`, such as `rootfs.0`.
    pub name: String,
    /// Its name for the boot loader, such as `A`; empty if it has none.
    pub bootname: String,
    /// Its device.
    pub device: PathBuf,
    /// What it holds by `system.conf`: `raw`, `ext4` and so on.
    pub kind: String,
    /// Whether the running system was started from it.
    pub is_booted: bool,
    /// What the boot loader means to do with it: `good` or `bad`; empty if it cannot be asked.
    pub boot_status: String,
    /// How its last installation ended: `ok`, `pending` and so on; empty before the first.
    pub status: String,
    /// The image that was installed last.
    pub image: Option<SlotImage>,
}

/// An image as the manifest of its bundle describes it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SlotImage {
    /// Its length.
    pub size_bytes: u64,
    /// Its SHA-256.
    pub digest: Digest,
}

/// Why RAUC did not do what it was asked.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RaucError {
    /// There is no bus, or it does not answer.
    #[error("the D-Bus at {} cannot be used: {message}; check that dbus runs, and rauc.bus", bus.display())]
    NoBus {
        /// Its socket.
        bus: PathBuf,
        /// Why.
        message: String,
    },
    /// There is no RAUC service on the bus.
    #[error(
        "RAUC's service is not there: {message}; install RAUC with its service and look at \
         `systemctl status rauc`"
    )]
    NoService {
        /// What the bus says.
        message: String,
    },
    /// The service works for somebody else, or still for an earlier order.
    #[error("RAUC is busy; ask again when it is done (`rauc status` answers then)")]
    Busy,
    /// The service vanished while it was needed.
    #[error(
        "RAUC's service ended or fell silent in the middle: {message}; see `journalctl -u rauc` \
         and ask again"
    )]
    Lost {
        /// What the bus says.
        message: String,
    },
    /// The service refused a call.
    #[error("RAUC does not {what}: {message}; see `journalctl -u rauc`")]
    Refused {
        /// What was asked.
        what: String,
        /// Its words.
        message: String,
    },
    /// The bundle could not be installed.
    #[error("RAUC did not install the bundle: {message}; {}", advice(message))]
    Failed {
        /// Its `LastError`.
        message: String,
    },
    /// The installation does not move.
    #[error(
        "RAUC told no progress for {} s (install.stall_limit_s) and cannot be stopped; see \
         `journalctl -u rauc`, restart the service or the device, and ask again",
        limit.as_secs()
    )]
    Stalled {
        /// How long it may stand.
        limit: Duration,
    },
    /// A slot of ours is none of RAUC's, or is another one for RAUC.
    #[error("{problem}; compare [rauc] and [slots] with RAUC's system.conf")]
    Slot {
        /// What does not fit.
        problem: String,
    },
    /// RAUC did something else than it was told.
    #[error("RAUC was told to {what}, but {found}; check the boot loader in RAUC's system.conf")]
    NotSet {
        /// What it was told.
        what: String,
        /// What it says now.
        found: String,
    },
}

impl Rauc {
    /// RAUC by these settings. Nothing is asked yet.
    #[must_use]
    pub fn new(settings: &config::Rauc) -> Self {
        Rauc { settings: settings.clone() }
    }

    /// Opens a conversation; the bus starts the service if it can and must.
    ///
    /// # Errors
    /// There is no bus, or no service on it.
    pub fn connect(&self) -> Result<Session, RaucError> {
        let no_bus = |message: String| RaucError::NoBus { bus: self.settings.bus.clone(), message };
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| no_bus(error.to_string()))?;
        let stream =
            UnixStream::connect(&self.settings.bus).map_err(|error| no_bus(error.to_string()))?;
        let service = runtime.block_on(async {
            let builder =
                connection::Builder::unix_stream(stream).method_timeout(CALL_LIMIT).build();
            let connection = timeout(CALL_LIMIT, builder)
                .await
                .map_err(|_| no_bus("it does not answer".to_owned()))?
                .map_err(|error| no_bus(error.to_string()))?;
            let no_service =
                |error: fdo::Error| RaucError::NoService { message: words_of(&error.into()) };
            let name = WellKnownName::from_static_str(SERVICE)
                .map_err(|error| no_service(error.into()))?;
            let bus = fdo::DBusProxy::new(&connection)
                .await
                .map_err(|error| no_bus(error.to_string()))?;
            let owner = match bus.get_name_owner(BusName::from(name.clone())).await {
                Ok(owner) => owner,
                Err(_) => {
                    bus.start_service_by_name(name.clone(), 0).await.map_err(no_service)?;
                    bus.get_name_owner(BusName::from(name)).await.map_err(no_service)?
                }
            };
            // By its unique name: one that dies is noticed, instead of being started anew.
            InstallerProxy::builder(&connection)
                .destination(owner.into_inner())
                .cache_properties(CacheProperties::No)
                .build()
                .await
                .map_err(|error| no_service(error.into()))
        })?;
        Ok(Session { service, runtime })
    }

    /// RAUC's slot that is our `slot`: the one that the settings name, else the one with the boot
    /// name `A` or `B`, else `rootfs.0` or `rootfs.1`.
    ///
    /// # Errors
    /// [`RaucError::Slot`] if there is none.
    pub fn find<'a>(
        &self,
        slots: &'a [SlotStatus],
        slot: Slot,
    ) -> Result<&'a SlotStatus, RaucError> {
        let (set, key, usual) = match slot {
            Slot::A => (&self.settings.slot_a, "rauc.slot_a", "rootfs.0"),
            Slot::B => (&self.settings.slot_b, "rauc.slot_b", "rootfs.1"),
        };
        let named = |name: &str| slots.iter().find(|known| known.name == name);
        let found = match set {
            Some(name) => named(name),
            None => {
                slots.iter().find(|known| known.bootname == slot.name()).or_else(|| named(usual))
            }
        };
        found.ok_or_else(|| {
            let known: Vec<String> =
                slots.iter().map(|known| format!("{} ({})", known.name, known.bootname)).collect();
            let wanted = match set {
                Some(name) => format!("{key} = \"{name}\" is no slot of RAUC's"),
                None => format!(
                    "RAUC has no slot with bootname={slot} and none named {usual}; set {key}"
                ),
            };
            RaucError::Slot { problem: format!("{wanted}; it has {}", known.join(", ")) }
        })
    }
}

impl Session {
    /// What RAUC tells of its slots.
    ///
    /// # Errors
    /// The service is busy, or gone.
    pub fn slots(&self) -> Result<Vec<SlotStatus>, RaucError> {
        let status = self.runtime.block_on(self.service.get_slot_status());
        let status = status.map_err(|error| refused("tell its slots", &error))?;
        Ok(status.into_iter().map(|(name, told)| slot_status(name, &told)).collect())
    }

    /// Name of the slot that boots next; `None` if the boot loader cannot tell.
    ///
    /// # Errors
    /// The service is busy, or gone.
    pub fn primary(&self) -> Result<Option<String>, RaucError> {
        match self.runtime.block_on(self.service.get_primary()) {
            Ok(name) => Ok(Some(name)),
            Err(error) => match refused("tell what boots next", &error) {
                RaucError::Refused { message, .. } => {
                    tracing::debug!(message, "RAUC cannot tell what boots next");
                    Ok(None)
                }
                error => Err(error),
            },
        }
    }

    /// Has RAUC mark the slot of this name.
    ///
    /// # Errors
    /// It refuses, is busy, or gone.
    pub fn mark(&self, mark: Mark, slot: &str) -> Result<(), RaucError> {
        let marked = self.runtime.block_on(self.service.mark(mark.name(), slot));
        let (_, message) =
            marked.map_err(|error| refused(&format!("mark {slot} as {}", mark.name()), &error))?;
        tracing::debug!(message, "RAUC");
        Ok(())
    }

    /// Whether it does nothing at the moment.
    ///
    /// # Errors
    /// It is gone.
    pub fn is_idle(&self) -> Result<bool, RaucError> {
        self.runtime.block_on(is_idle(&self.service))
    }

    /// Waits until it does nothing. `progress` is told how far it is with whatever it does, in per
    /// cent, and answers whether to go on waiting.
    ///
    /// # Errors
    /// [`RaucError::Busy`] if it works on although nobody wants to wait, [`RaucError::Stalled`] if
    /// it tells no progress for `stall_limit`; or it is gone.
    pub fn wait_until_idle(
        &self,
        stall_limit: Duration,
        progress: &mut dyn FnMut(u8) -> bool,
    ) -> Result<(), RaucError> {
        self.runtime.block_on(async {
            let mut stand = Stand::new(stall_limit);
            while !is_idle(&self.service).await? {
                sleep(LOOK).await;
                let percent = stand.look(&self.service).await?;
                if !progress(percent) {
                    return Err(RaucError::Busy);
                }
            }
            Ok(())
        })
    }

    /// Has RAUC install the bundle in the file `bundle`, and waits for the end. `progress` is told
    /// RAUC's per cent, every now and then.
    ///
    /// RAUC cannot be called off: this comes back when it is done, however that ends.
    ///
    /// # Errors
    /// [`RaucError::Busy`] if it works already, [`RaucError::Failed`] with what it says of the
    /// bundle, [`RaucError::Stalled`] if it tells no progress for `stall_limit`: it may go on then;
    /// or it is gone. What the slot holds is not known then.
    pub fn install(
        &self,
        bundle: &Path,
        stall_limit: Duration,
        progress: &mut dyn FnMut(u8),
    ) -> Result<(), RaucError> {
        const WHAT: &str = "take the bundle";
        self.runtime.block_on(async {
            // Before the order, so that its end is not missed.
            let completed = self.service.receive_completed().await;
            let mut completed = completed.map_err(|error| refused(WHAT, &error))?;
            let path = bundle.to_string_lossy();
            let order = self.service.install_bundle(&path, HashMap::new()).await;
            order.map_err(|error| refused(WHAT, &error))?;
            let mut stand = Stand::new(stall_limit);
            let result = loop {
                // Cancel-safe: `next` of a stream and `sleep` are.
                tokio::select! {
                    biased;
                    signal = completed.next() => {
                        let signal = signal.ok_or_else(|| lost("the bus is gone"))?;
                        break signal.args().map_err(|error| refused(WHAT, &error))?.result;
                    }
                    () = sleep(LOOK) => progress(stand.look(&self.service).await?),
                }
            };
            if result == 0 {
                return Ok(());
            }
            let message = self.service.last_error().await.unwrap_or_default();
            let message = match one_line(&message, MAX_WORDS) {
                words if words.is_empty() => format!("it ended with {result}"),
                words => words,
            };
            Err(RaucError::Failed { message })
        })
    }
}

async fn is_idle(service: &InstallerProxy<'static>) -> Result<bool, RaucError> {
    let operation = service.operation().await;
    Ok(operation.map_err(|error| refused("tell what it does", &error))? == IDLE)
}

/// Watches whether an operation moves.
struct Stand {
    limit: Duration,
    last: (i32, String, i32),
    since: Instant,
}

impl Stand {
    fn new(limit: Duration) -> Self {
        Stand { limit, last: Default::default(), since: Instant::now() }
    }

    /// How far it is, in per cent.
    async fn look(&mut self, service: &InstallerProxy<'static>) -> Result<u8, RaucError> {
        let now = service.progress().await;
        let now = now.map_err(|error| lost(&words_of(&error)))?;
        let percent = u8::try_from(now.0.clamp(0, 100)).unwrap_or(0);
        if now != self.last {
            tracing::debug!(percent, step = now.1, "RAUC");
            self.last = now;
            self.since = Instant::now();
        } else if self.since.elapsed() >= self.limit {
            return Err(RaucError::Stalled { limit: self.limit });
        }
        Ok(percent)
    }
}

fn slot_status(name: String, told: &HashMap<String, OwnedVariant>) -> SlotStatus {
    let text = |key: &str| -> String {
        told.get(key)
            .and_then(|value| String::try_from(value.try_clone().ok()?).ok())
            .unwrap_or_default()
    };
    let size_bytes = told.get("size").and_then(|value| u64::try_from(value).ok());
    let digest = text("sha256").parse::<Digest>().ok();
    SlotStatus {
        name,
        bootname: text("bootname"),
        device: text("device").into(),
        kind: text("type"),
        is_booted: text("state") == "booted",
        boot_status: text("boot-status"),
        status: text("status"),
        image: size_bytes.zip(digest).map(|(size_bytes, digest)| SlotImage { size_bytes, digest }),
    }
}

/// What an error of a call means.
fn refused(what: &str, error: &zbus::Error) -> RaucError {
    let message = words_of(error);
    let is_answer = match error {
        zbus::Error::MethodError(..) => true,
        zbus::Error::FDO(known) => matches!(
            **known,
            fdo::Error::Failed(_)
                | fdo::Error::InvalidArgs(_)
                | fdo::Error::AccessDenied(_)
                | fdo::Error::UnknownMethod(_)
        ),
        _ => false,
    };
    if !is_answer {
        lost(&message)
    } else if message.to_lowercase().contains(ALREADY_PROCESSING) {
        RaucError::Busy
    } else {
        RaucError::Refused { what: what.to_owned(), message }
    }
}

fn lost(message: &str) -> RaucError {
    RaucError::Lost { message: message.to_owned() }
}

/// The words of an answer, without the name of the error where there are any.
fn words_of(error: &zbus::Error) -> String {
    match error {
        zbus::Error::MethodError(_, Some(words), _) => one_line(words, MAX_WORDS),
        error => one_line(&error.to_string(), MAX_WORDS),
    }
}

/// What to do about RAUC's words on a bundle.
fn advice(message: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    if says(&["signature", "certificate", "keyring"]) {
        "sign the bundle with a certificate that the keyring of this device knows"
    } else if says(&["ompatible"]) {
        "build the bundle for the compatible of this device's system.conf"
    } else if says(&["mount", "loop", "verity", "dm-"]) {
        "RAUC needs squashfs and loop devices in the kernel, and dm-verity for bundles of the format verity"
    } else if says(&["Invalid bundle", "manifest", "magic"]) {
        "build the bundle again with `rauc bundle`"
    } else {
        "see `journalctl -u rauc`"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_slots_are_found_among_those_of_rauc() {
        let slot = |name: &str, bootname: &str| SlotStatus {
            name: name.to_owned(),
            bootname: bootname.to_owned(),
            ..Default::default()
        };
        let of = |a: Option<&str>, b: Option<&str>| {
            Rauc::new(&config::Rauc {
                slot_a: a.map(str::to_owned),
                slot_b: b.map(str::to_owned),
                ..Default::default()
            })
        };
        let usual = [slot("rootfs.1", "B"), slot("appfs.0", ""), slot("rootfs.0", "A")];
        let found = |rauc: Rauc, slots: &[SlotStatus], slot| {
            rauc.find(slots, slot).map(|found| found.name.clone())
        };
        assert_eq!(found(of(None, None), &usual, Slot::B).unwrap(), "rootfs.1");
        // What the boot loader calls them counts more than the numbers.
        let crossed = [slot("rootfs.0", "B"), slot("rootfs.1", "A")];
        assert_eq!(found(of(None, None), &crossed, Slot::A).unwrap(), "rootfs.1");
        let named = [slot("rootfs.0", "system0"), slot("rootfs.1", "system1")];
        assert_eq!(found(of(None, None), &named, Slot::B).unwrap(), "rootfs.1");
        let other = [slot("system.0", "system0"), slot("system.1", "system1")];
        assert_eq!(found(of(Some("system.0"), None), &other, Slot::A).unwrap(), "system.0");
        for (rauc, complaints) in [
            (of(None, None), ["no slot with bootname=A", "set rauc.slot_a"]),
            (of(Some("system.7"), None), ["\"system.7\" is no slot", "system.0 (system0)"]),
        ] {
            let error = found(rauc, &other, Slot::A).unwrap_err().to_string();
            for complaint in complaints {
                assert!(error.contains(complaint), "{error}");
            }
        }
    }
}
