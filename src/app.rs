//! Picks the adapters that the configuration names, starts the parts, and stops them together.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures_util::future::BoxFuture;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::agent::{
    Agent, HealthChecks, Identity, Inputs, Journal, Ports, ReadDesired, Restarter, Settings, Stop,
};
use crate::clock::{Clock, SystemClock};
use crate::config::{BootKind, Config, InstallKind};
use crate::control;
use crate::fetch::Fetcher;
use crate::hub::{self, HubLink, Report, SessionStatus};
use crate::install;
use crate::journal::JournalFolder;
use crate::logging::chain;
use crate::os::{self, Sysroot};
use crate::redact::OwnSecrets;
use crate::store::{FileStore, state_would_be_lost};
use crate::supervisor::Systemd;
use crate::update::{Contracts, Device, Limits, Slot};
use crate::{boot, health};

/// Requests that may wait for the loop; more are refused by who offers them.
const REQUESTS: usize = 16;

/// How the agent names itself to image servers.
const USER_AGENT: &str = concat!("twinboot/", env!("CARGO_PKG_VERSION"));

/// Where systemd looks for the credential that the unit names.
const SYSTEMD_CREDENTIALS: [&str; 2] =
    ["/etc/credstore/hub-credential", "/etc/credstore.encrypted/hub-credential"];

/// How long the parts may take to stop: less than `TimeoutStopSec=` of the unit, after which systemd
/// kills. The bootloader may have to be told that a trial goes on.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Runs the service until SIGTERM, or until a part fails.
///
/// # Errors
/// Something is wrong with the configuration or the machine, or a part failed. The saved state
/// is good to start from.
pub async fn run(config: Config, sysroot: Sysroot) -> Result<()> {
    let config = Arc::new(config);
    let credential = hub::credential::Source::new(
        &config.hub,
        std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from).as_deref(),
    );
    let notices = check_files(&config, credential.file(), &sysroot)?;
    let store = FileStore::open(&config.state.directory)?;
    let clock = Arc::new(SystemClock::new(sysroot.clone()));
    let systemd = Arc::new(Systemd::default());
    let cancel = CancellationToken::new();
    let mut signals = Signals::new()?;

    let (requests, incoming) = mpsc::channel(REQUESTS);
    let (desired, documents) = mpsc::channel(REQUESTS);
    let (report, reports) = watch::channel(Arc::new(Report::default()));
    let (status, session) = watch::channel(SessionStatus::default());
    let server = control::Server::open(&config.control, config.fetch.allow_http)?;

    let installer = install::installer(&config.install, &config.slots, &config.rauc);
    let fetcher = Fetcher::new(&config, installer, USER_AGENT);
    let source = credential.clone();
    let secrets: OwnSecrets = Arc::new(move || source.secrets());
    let ports = Ports {
        boot: boot::open(&config.boot, &config.slots, &config.rauc, &sysroot),
        store: Box::new(store),
        clock: clock.clone(),
        images: Arc::new(fetcher),
        health: Arc::new(Checks { config: Arc::clone(&config), sysroot: sysroot.clone() }),
        restarter: Arc::new(Machine { config: Arc::clone(&config), sysroot: sysroot.clone() }),
        journal: journal(&config, &secrets),
        supervisor: systemd.clone(),
        secrets,
    };
    let inputs = Inputs { requests: incoming, desired: documents, session, report };
    let agent = Agent::start(
        ports,
        settings(&config),
        inputs,
        read_desired(&config),
        identity(&config, &sysroot, clock.as_ref(), notices)?,
    )
    .await?;
    if let Some(newest) = agent.saved().newest_time {
        clock.raise_floor(newest);
    }

    let link = HubLink { requests: requests.clone(), desired, report: reports, status };
    let session = hub::session::Session {
        transport: hub::paho::Paho::new(&config.hub),
        source: credential,
        link,
        clock: clock.clone(),
        rules: rules(&config),
        timing: (&config.hub).into(),
    };
    let mut parts: JoinSet<Result<()>> = JoinSet::new();
    let stop = cancel.child_token();
    parts.spawn(async move {
        session.run(stop).await;
        Ok(())
    });
    let stop = cancel.child_token();
    parts.spawn(async move {
        server.run(requests, stop).await;
        Ok(())
    });
    let stop = cancel.child_token();
    parts.spawn(async move { agent.run(stop).await.context("the agent gave up") });

    systemd.ready();
    info!(version = env!("CARGO_PKG_VERSION"), "twinbootd is ready");
    let ended = tokio::select! {
        name = signals.next() => {
            info!(signal = name, "stopping");
            Ok(())
        }
        Some(part) = parts.join_next() => part.context("a part broke off").flatten(),
    };
    systemd.stopping();
    cancel.cancel();
    let rest = async { while parts.join_next().await.is_some() {} };
    if tokio::time::timeout(STOP_LIMIT, rest).await.is_err() {
        warn!("not every part stopped in time");
    }
    ended
}

/// Refuses a state folder that an update or a restart would lose. Returns what the operator should
/// know about other files: a place where an update would lose them, a content of no use.
fn check_files(config: &Config, credential: &Path, sysroot: &Sysroot) -> Result<Vec<String>> {
    let mut notices = Vec::new();
    match state_would_be_lost(&config.state.directory, &config.slots, sysroot) {
        Some(problem) if config.state.allow_on_slot => notices.push(problem),
        Some(problem) => bail!(problem),
        None => {}
    }
    let own = [&config.hub.certificate_file, &config.hub.private_key_file];
    let own = own.into_iter().flatten().map(PathBuf::as_path);
    // systemd shows a copy of the file that it found there.
    let of_systemd = SYSTEMD_CREDENTIALS.into_iter().map(Path::new);
    for file in own.chain(of_systemd).chain([credential]).filter(|file| file.exists()) {
        if let Some(slot) = boot::running::slot_with(file, &config.slots, sysroot) {
            notices.push(format!(
                "{} lies on slot {slot} and will be missing after an update, if it is not in the \
                 image: move it to a partition that updates do not touch, for instance to \
                 /var/lib/twinboot, and say so in the twinboot.toml of the images, too",
                file.display()
            ));
        }
    }
    let of_loader = match config.boot.kind {
        BootKind::Grub => Some(&config.boot.grub.environment),
        BootKind::Tryboot => Some(&config.boot.tryboot.autoboot),
        _ => None,
    };
    if let Some(file) = of_loader
        && let Some(slot) = boot::running::slot_with(file, &config.slots, sysroot)
    {
        notices.push(format!(
            "{} lies on slot {slot}, where the bootloader does not look: mount the boot partition \
             there before twinbootd starts (x-systemd.before=twinbootd.service in fstab) and restart \
             twinbootd",
            file.display()
        ));
    }
    if config.install.kind == InstallKind::Rauc
        && let Some(folder) = config.rauc.bundle_file.parent()
        && let Some(slot) = boot::running::slot_with(folder, &config.slots, sysroot)
    {
        notices.push(format!(
            "{} would lie on slot {slot}: name a place on the data partition in rauc.bundle_file",
            config.rauc.bundle_file.display()
        ));
    }
    // They keep their word in variables that RAUC changes, too, or in RAUC itself.
    let shares = matches!(config.boot.kind, BootKind::Uboot | BootKind::Grub | BootKind::Rauc);
    if shares || config.install.kind == InstallKind::Rauc {
        notices.extend(boot::rival(&config.health.systemctl));
    }
    // The device must stay on the hub to be mended from there.
    if let Err(error) = Fetcher::check(&config.fetch) {
        notices.push(format!("no image can be fetched: {}", chain(&error)));
    }
    for notice in &notices {
        warn!("{notice}");
    }
    Ok(notices)
}

fn settings(config: &Config) -> Settings {
    let small = |number: u64| u8::try_from(number).unwrap_or(u8::MAX);
    Settings {
        limits: Limits {
            attempts: small(config.update.max_attempts.get()),
            trial_starts: small(config.update.max_trial_starts.get()),
            trial_s: config.update.trial_limit_s.duration().as_secs(),
            trial_outage_s: config.update.trial_outage_limit_s.duration().as_secs(),
        },
        hub_must_be_well: config.health.hub,
        health_interval: config.health.interval_s.duration(),
        progress_interval: config.report.progress_interval_s.duration(),
        progress_step_percent: config.report.progress_step_percent.get(),
        restart_report_limit: config.update.restart_report_limit_s.duration(),
        restart_limit: config.restart.limit_s.duration(),
    }
}

fn identity(
    config: &Config,
    sysroot: &Sysroot,
    clock: &dyn Clock,
    mut notices: Vec<String>,
) -> Result<Identity> {
    let running_version = os::running_version(&config.device, sysroot).unwrap_or_else(|error| {
        let notice = chain(&error).to_string();
        warn!(notice, "the running version is not known");
        notices.push(notice);
        None
    });
    Ok(Identity {
        boot: os::boot_id(sysroot)?,
        device: Device {
            agent_version: env!("CARGO_PKG_VERSION"),
            // The bootloader has the word; the agent asks it.
            running: Slot::A,
            running_version,
            started: clock.wall(),
            contracts: Contracts {
                iothub_dm: config.report.iothub_dm,
                firmware_status: config.report.firmware_status,
                firmware: config.report.firmware,
            },
            notices,
        },
    })
}

/// The journal of failed boots, if it is to be told.
fn journal(config: &Config, secrets: &OwnSecrets) -> Option<Arc<dyn Journal>> {
    let folder = JournalFolder::new(&config.report, Arc::clone(secrets))?;
    Some(Arc::new(folder))
}

fn rules(config: &Config) -> hub::payload::Rules {
    hub::payload::Rules { allow_http: config.fetch.allow_http }
}

fn read_desired(config: &Config) -> ReadDesired {
    let rules = rules(config);
    Box::new(move |desired| hub::payload::desired(&desired.document, rules))
}

/// SIGTERM of systemd, and Ctrl-C of a person.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// The local checks.
struct Checks {
    config: Arc<Config>,
    sysroot: Sysroot,
}

impl HealthChecks for Checks {
    fn check(&self) -> BoxFuture<'static, Result<(), String>> {
        let config = Arc::clone(&self.config);
        Box::pin(async move { health::check(&config.health).await })
    }

    fn cut_off(&self) -> BoxFuture<'static, Option<String>> {
        let sysroot = self.sysroot.clone();
        Box::pin(async move {
            tokio::task::spawn_blocking(move || os::cut_off(&sysroot)).await.unwrap_or_default()
        })
    }
}

/// The machine.
struct Machine {
    config: Arc<Config>,
    sysroot: Sysroot,
}

impl Restarter for Machine {
    fn restart(&self, argument: Option<&'static str>) -> BoxFuture<'static, Result<(), String>> {
        let config = Arc::clone(&self.config);
        Box::pin(async move {
            info!(argument, "restarting the machine");
            tokio::task::spawn_blocking(move || os::restart(&config.restart, argument))
                .await
                .map_err(|error| error.to_string())?
                .map_err(|error| chain(&error).to_string())
        })
    }

    fn stopping(&self) -> BoxFuture<'static, Result<Option<Stop>, String>> {
        let config = Arc::clone(&self.config);
        Box::pin(async move {
            let ask = move || os::shutdown(&config.health.systemctl);
            let shutdown = tokio::task::spawn_blocking(ask)
                .await
                .map_err(|error| error.to_string())?
                .map_err(|error| chain(&error).to_string())?;
            Ok(shutdown.map(|shutdown| match shutdown {
                os::Shutdown::Restart => Stop::Restart,
                os::Shutdown::Other => Stop::Other,
            }))
        })
    }

    fn carry(&self, argument: &'static str) -> BoxFuture<'static, Result<(), String>> {
        let sysroot = self.sysroot.clone();
        Box::pin(async move {
            tokio::task::spawn_blocking(move || os::carry_argument(argument, &sysroot))
                .await
                .map_err(|error| error.to_string())?
                .map_err(|error| chain(&error).to_string())
        })
    }
}
