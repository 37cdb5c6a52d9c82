//! A device, played by the harness: two slots, a bootloader, a restart, and the real daemon.
//!
//! What the harness plays is what a board would do: it chooses the slot by the bootloader's
//! variables, looks into that slot for a system, and starts the daemon with what this system tells
//! of itself below `--sysroot`. The daemon, its slots, its files and its network are real.
#![allow(dead_code, reason = "the tests and the demo each use a part")]

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, Mutex, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::net::unix::pipe;

#[path = "slots.rs"]
pub mod slots;

use slots::Slot;

/// Longer than anything takes; what ends by it has failed.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Between two looks at something that tells nobody when it changes.
pub const LOOK: Duration = Duration::from_millis(10);

/// The saved states of an update, in their order.
const STATES: [&str; 5] = ["fetching", "verifying", "switching", "trial", "rollingBack"];

const BOOTLOADER: &str = include_str!("bootloader.sh");

/// `autoboot.txt` as a device with tryboot has it.
const AUTOBOOT: &str = "[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n";

/// What systemd hands to the kernel at the end of a restart; in memory, as all of `/run`.
const REBOOT_PARAM: &str = "run/systemd/reboot-param";

/// How a machine is built.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Where everything of it lies. Must exist; is not removed.
    pub folder: &'a Path,
    /// The daemon.
    pub twinbootd: &'a Path,
    /// Bytes of each slot.
    pub slot_bytes: u64,
    /// What slot A holds at first; slot B is empty.
    pub image: &'a Path,
    /// Loop devices, where they can be had.
    pub loop_devices: bool,
    /// The connection string of the device.
    pub credential: &'a str,
}

/// A device.
#[derive(Debug)]
pub struct Machine {
    /// Where everything of it lies.
    pub folder: PathBuf,
    /// Slots A and B.
    pub slots: [Slot; 2],
    twinbootd: PathBuf,
    config: toml::Table,
    brought: Vec<Brought>,
    environment: Vec<(String, PathBuf)>,
    orders: pipe::Receiver,
    daemon: Option<Child>,
    running: Option<Boot>,
}

/// Something that an image brings along in another way than the machine had it.
#[derive(Debug)]
struct Brought {
    version: String,
    what: Difference,
}

#[derive(Debug)]
enum Difference {
    /// This key in its `twinboot.toml`.
    Key(String, toml::Value),
    /// This text instead of its `twinboot.toml`.
    Config(&'static str),
    /// It does not mount the data partition: what should lie there lies on its slot.
    NoDataPartition,
}

/// What booted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Boot {
    /// `A` or `B`.
    pub slot: char,
    /// `IMAGE_VERSION` of the system in it.
    pub version: String,
    /// Whether the slot that should have booted holds no system.
    pub fell_back: bool,
}

/// What the daemon does to the machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Happening {
    /// It ordered a restart.
    RestartOrdered,
    /// It ended by itself.
    Ended(ExitStatus),
}

impl Machine {
    /// Builds a machine that is switched off.
    ///
    /// # Errors
    /// A file, a device or a pipe could not be made.
    pub fn build(plan: &Plan<'_>) -> io::Result<Self> {
        let folder = plan.folder.canonicalize()?;
        for name in ["state", "run", "health.d", "sysroot", "bin", "journal"] {
            fs::create_dir_all(folder.join(name))?;
        }
        fs::set_permissions(folder.join("state"), Permissions::from_mode(0o700))?;
        let attach = |name: &str, content: Option<&Path>| {
            let file = folder.join(name);
            match content {
                Some(image) => drop(fs::copy(image, &file)?),
                None => drop(fs::File::create(&file)?),
            }
            OpenOptions::new().write(true).open(&file)?.set_len(plan.slot_bytes)?;
            Slot::attach(&file, plan.loop_devices)
        };
        let slots = [attach("slot-a.img", Some(plan.image))?, attach("slot-b.img", None)?];

        let program = |name: &str, text: &str| write_mode(&folder.join(name), text, 0o755);
        program("bootloader.sh", BOOTLOADER)?;
        let fifo = folder.join("restart.fifo");
        // Open for both here, too: it does not wait for a reader that was killed.
        let param = folder.join("sysroot").join(REBOOT_PARAM);
        let restart = format!(
            "#!/bin/sh\nrm -f '{param}'\n[ -z \"$1\" ] || echo \"$1\" >'{param}'\necho restart 1<>'{fifo}'\n",
            param = param.display(),
            fifo = fifo.display()
        );
        program("restart.sh", &restart)?;
        let systemctl = format!(
            "#!/bin/sh\ncase $1 in\nlist-jobs) cat '{0}/jobs' 2>/dev/null || true ;;\n\
             reboot) exec '{0}/restart.sh' ;;\n*) exit 64 ;;\nesac\n",
            folder.display()
        );
        program("bin/systemctl", &systemctl)?;
        write_mode(&folder.join("bootloader.env"), "default=A\ntry=\n", 0o644)?;
        write_mode(&folder.join("hub-credential"), plan.credential, 0o600)?;
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
        // Open for both: the restart program never waits for a reader, and the end never comes.
        let orders = pipe::OpenOptions::new().read_write(true).open_receiver(&fifo)?;

        let config = defaults(&folder, &slots);
        let machine = Machine {
            folder,
            slots,
            twinbootd: plan.twinbootd.to_owned(),
            config,
            brought: Vec::new(),
            environment: Vec::new(),
            orders,
            daemon: None,
            running: None,
        };
        machine.synchronise_clock(true)?;
        machine.cable(true)?;
        Ok(machine)
    }

    /// Gives the machine the firmware of a Raspberry Pi instead of the usual bootloader.
    ///
    /// # Errors
    /// `autoboot.txt` could not be written.
    pub fn use_tryboot(&mut self) -> io::Result<()> {
        let file = self.folder.join("autoboot.txt");
        self.set("boot.kind", "tryboot");
        self.set("boot.tryboot.autoboot", file.display().to_string());
        fs::write(file, AUTOBOOT)
    }

    /// Whether `autoboot.txt` decides, and what it says: the partition of usual starts, and of
    /// those with `0 tryboot`.
    fn autoboot(&self) -> Option<(char, char)> {
        let text = fs::read_to_string(self.folder.join("autoboot.txt")).ok()?;
        let slots: Vec<char> = text
            .lines()
            .filter_map(|line| line.strip_prefix("boot_partition="))
            .map(|partition| if partition == "3" { 'B' } else { 'A' })
            .collect();
        Some((*slots.first()?, *slots.last()?))
    }

    /// Plugs the cable in, or out.
    ///
    /// # Errors
    /// A file could not be written.
    pub fn cable(&self, plugged: bool) -> io::Result<()> {
        self.write_sysroot("sys/class/net/eth0/device/vendor", "0x1af4\n")?;
        self.write_sysroot("sys/class/net/eth0/type", "1\n")?;
        self.write_sysroot("sys/class/net/eth0/flags", "0x1003\n")?;
        self.write_sysroot("sys/class/net/eth0/carrier", if plugged { "1\n" } else { "0\n" })
    }

    /// Takes the network device away, as an image without its driver does.
    ///
    /// # Errors
    /// The folder could not be removed.
    pub fn no_network_device(&self) -> io::Result<()> {
        fs::remove_dir_all(self.folder.join("sysroot/sys/class/net/eth0"))
    }

    /// Sets a key of the daemon's configuration, such as `update.trial_limit_s`; it counts from
    /// the daemon's next start on.
    pub fn set(&mut self, key: &str, value: impl Into<toml::Value>) {
        set(&mut self.config, key, value.into());
    }

    /// Has the image of `version` bring this key along in its configuration.
    pub fn set_in(&mut self, version: &str, key: &str, value: impl Into<toml::Value>) {
        self.bring(version, Difference::Key(key.to_owned(), value.into()));
    }

    /// Has the image of `version` bring this text along as its configuration.
    pub fn config_in(&mut self, version: &str, text: &'static str) {
        self.bring(version, Difference::Config(text));
    }

    /// Has the image of `version` forget to mount the data partition.
    pub fn no_data_partition_in(&mut self, version: &str) {
        let folder = self.folder.join(format!("on-the-slot-of-{version}"));
        self.set_in(version, "state.directory", folder.join("state").display().to_string());
        self.bring(version, Difference::NoDataPartition);
    }

    fn bring(&mut self, version: &str, what: Difference) {
        self.brought.push(Brought { version: version.to_owned(), what });
    }

    /// What the running image brings along.
    fn differences(&self) -> impl Iterator<Item = &Difference> {
        let version = self.running.as_ref().map(|boot| boot.version.as_str());
        let own = move |brought: &&Brought| Some(brought.version.as_str()) == version;
        self.brought.iter().filter(own).map(|brought| &brought.what)
    }

    /// Takes a key out of the configuration.
    pub fn unset(&mut self, section: &str, key: &str) {
        if let Some(toml::Value::Table(table)) = self.config.get_mut(section) {
            table.remove(key);
        }
    }

    /// Sets a variable in the environment of the daemon's next starts, as systemd does.
    pub fn environment(&mut self, name: &str, value: &Path) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Puts a program into `health.d`; without text it is taken away.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn health_program(&self, name: &str, text: Option<&str>) -> io::Result<()> {
        let path = self.folder.join("health.d").join(name);
        match text {
            Some(text) => write_mode(&path, text, 0o755),
            None => fs::remove_file(path),
        }
    }

    /// Has the bootloader program refuse these verbs from now on.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn bootloader_refuses(&self, verbs: &[&str]) -> io::Result<()> {
        fs::write(self.folder.join("bootloader.fails"), verbs.join("\n") + "\n")
    }

    /// Switches the machine on: the bootloader chooses, the system starts, the daemon with it.
    ///
    /// # Errors
    /// No slot boots, or the daemon could not be started.
    pub fn boot(&mut self) -> io::Result<Boot> {
        assert!(self.daemon.is_none(), "the machine runs already");
        // First: what a bootloader call of the boot before still has to do is lost.
        let id = format!("{:032x}\n", fastrand::u128(..));
        self.write_sysroot("proc/sys/kernel/random/boot_id", &id)?;
        let wanted = self.choose()?;
        let other = if wanted == 'A' { 'B' } else { 'A' };
        let found = [wanted, other].into_iter().find_map(|slot| {
            let release = self.slot(slot).os_release()?;
            let version = release_value(&release, "IMAGE_VERSION")?;
            Some((slot, version, release))
        });
        let (slot, version, release) =
            found.ok_or_else(|| io::Error::other("neither slot holds a system: a brick"))?;
        let boot = Boot { slot, version, fell_back: slot != wanted };
        self.running = Some(boot.clone());
        self.tell_of(&boot, &release)?;
        self.start_daemon()?;
        Ok(boot)
    }

    /// The slot that the bootloader takes.
    fn choose(&self) -> io::Result<char> {
        let param = self.folder.join("sysroot").join(REBOOT_PARAM);
        let argument = fs::read_to_string(&param).unwrap_or_default();
        let _ = fs::remove_file(param);
        if let Some((usual, once)) = self.autoboot() {
            return Ok(if argument.trim() == "0 tryboot" { once } else { usual });
        }
        let variables = self.variables()?;
        let wanted = if variables.1.is_empty() { &variables.0 } else { &variables.1 };
        // The one boot that a try is for.
        self.set_variables(&variables.0, "")?;
        Ok(if wanted == "B" { 'B' } else { 'A' })
    }

    /// What runs, or ran last.
    pub fn running(&self) -> Option<&Boot> {
        self.running.as_ref()
    }

    /// The kernel's name for the present boot.
    ///
    /// # Errors
    /// The machine was never switched on.
    pub fn boot_id(&self) -> io::Result<String> {
        let path = self.folder.join("sysroot/proc/sys/kernel/random/boot_id");
        Ok(fs::read_to_string(path)?.trim().to_owned())
    }

    /// Slot `A` or `B`.
    pub fn slot(&self, name: char) -> &Slot {
        let [a, b] = &self.slots;
        if name == 'B' { b } else { a }
    }

    /// The bootloader's variables: default and try.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn variables(&self) -> io::Result<(String, String)> {
        if let Some((usual, _)) = self.autoboot() {
            return Ok((usual.to_string(), String::new()));
        }
        let text = fs::read_to_string(self.folder.join("bootloader.env"))?;
        let value = |key| release_value(&text, key).unwrap_or_default();
        Ok((value("default"), value("try")))
    }

    fn set_variables(&self, default: &str, once: &str) -> io::Result<()> {
        let text = format!("default={default}\ntry={once}\n");
        fs::write(self.folder.join("bootloader.env"), text)
    }

    /// What the system tells of itself.
    fn tell_of(&self, boot: &Boot, release: &str) -> io::Result<()> {
        let slot = self.slot(boot.slot);
        let number = if self.differences().any(|it| matches!(it, Difference::NoDataPartition)) {
            Some(device_number(&self.folder)?)
        } else {
            slot.number()
        };
        let mounted = number.map_or_else(String::new, |number| {
            format!("21 1 {number} / / ro,relatime - ext4 {} ro\n", slot.device.display())
        });
        if self.autoboot().is_some() {
            let partition = if boot.slot == 'B' { "\0\0\0\u{3}" } else { "\0\0\0\u{2}" };
            self.write_sysroot("proc/device-tree/chosen/bootloader/partition", partition)?;
        }
        self.write_sysroot("proc/cmdline", &format!("quiet twinboot.slot={} ro\n", boot.slot))?;
        self.write_sysroot("proc/self/mountinfo", &mounted)?;
        self.write_sysroot("etc/os-release", release)
    }

    fn write_sysroot(&self, path: &str, text: &str) -> io::Result<()> {
        let path = self.folder.join("sysroot").join(path);
        fs::create_dir_all(path.parent().unwrap_or(&self.folder))?;
        fs::write(path, text)
    }

    /// Says, or no longer says, that the clock has been set from the network.
    ///
    /// # Errors
    /// The file could not be written or removed.
    pub fn synchronise_clock(&self, synchronised: bool) -> io::Result<()> {
        let path = "run/systemd/timesync/synchronized";
        if synchronised {
            return self.write_sysroot(path, "");
        }
        fs::remove_file(self.folder.join("sysroot").join(path))
    }

    /// Starts the daemon in the present boot, as systemd does after it has died.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_daemon(&mut self) -> io::Result<()> {
        assert!(self.daemon.is_none(), "the daemon runs already");
        self.write_config()?;
        self.daemon = Some(spawn(self.command()?)?);
        Ok(())
    }

    /// Runs the trial guard, as its timer does, and waits for its end.
    ///
    /// # Errors
    /// It could not be started.
    pub fn guard(&self) -> io::Result<ExitStatus> {
        self.write_config()?;
        // Where the configuration is lost the guard finds the usual programs, which are ours here.
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.folder.join("bin").display());
        self.command()?.arg("--end-unconfirmed-trial").env("PATH", path).status()
    }

    /// The configuration of the running image.
    fn write_config(&self) -> io::Result<()> {
        let mut config = self.config.clone();
        let mut text = None;
        for difference in self.differences() {
            match difference {
                Difference::Key(key, value) => set(&mut config, key, value.clone()),
                Difference::Config(other) => text = Some(*other),
                Difference::NoDataPartition => {}
            }
        }
        fs::write(self.config_file(), text.map_or_else(|| config.to_string(), str::to_owned))
    }

    fn command(&self) -> io::Result<Command> {
        let log = OpenOptions::new().create(true).append(true).open(self.log_file())?;
        // Dies with the harness, however that ends.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&self.twinbootd)
            .arg("--config")
            .arg(self.config_file())
            .arg("--sysroot")
            .arg(self.folder.join("sysroot"))
            .env_remove("NOTIFY_SOCKET")
            .env_remove("CREDENTIALS_DIRECTORY")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        Ok(command)
    }

    /// The daemon's process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// Whether the daemon has ended by itself, and how.
    ///
    /// # Errors
    /// The kernel cannot tell.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        let Some(daemon) = &mut self.daemon else { return Ok(None) };
        let status = daemon.try_wait()?;
        if status.is_some() {
            self.daemon = None;
        }
        Ok(status)
    }

    /// Kills the daemon in the middle of whatever it does.
    pub fn kill9(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let group = pid(&daemon);
            let _ = killpg(group, Signal::SIGKILL);
            let _ = daemon.wait();
        }
    }

    /// Stops the daemon in its tracks as soon as this state is saved. False if it was not met in
    /// it: then it runs on.
    ///
    /// # Errors
    /// It does not run, or cannot be stopped.
    pub fn freeze_in(&mut self, state: &str) -> io::Result<bool> {
        let daemon = self.daemon.as_ref().map(pid);
        let daemon = daemon.ok_or_else(|| io::Error::other("the daemon does not run"))?;
        let place = |state: &str| STATES.iter().position(|known| *known == state);
        let is_before = |now: &str| place(now) < place(state);
        let begun = Instant::now();
        while is_before(&self.saved_state()) && begun.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_micros(200));
        }
        kill(daemon, Signal::SIGSTOP)?;
        let stopped = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(daemon), stopped)?;
        let met = self.saved_state() == state;
        if !met {
            kill(daemon, Signal::SIGCONT)?;
        }
        Ok(met)
    }

    /// Lets a frozen daemon go on.
    ///
    /// # Errors
    /// It does not run.
    pub fn thaw(&self) -> io::Result<()> {
        match &self.daemon {
            Some(daemon) => Ok(kill(pid(daemon), Signal::SIGCONT)?),
            None => Err(io::Error::other("the daemon does not run")),
        }
    }

    /// Asks the daemon to end, as systemd does.
    ///
    /// # Errors
    /// It did not end within `limit`; it is killed then.
    pub async fn sigterm(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        let Some(daemon) = &mut self.daemon else {
            return Err(io::Error::other("the daemon does not run"));
        };
        kill(pid(daemon), Signal::SIGTERM)?;
        // It may be frozen.
        kill(pid(daemon), Signal::SIGCONT)?;
        let asked = Instant::now();
        loop {
            if let Some(status) = daemon.try_wait()? {
                self.daemon = None;
                return Ok(status);
            }
            if asked.elapsed() > limit {
                self.kill9();
                return Err(io::Error::other(format!("still there {limit:?} after SIGTERM")));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The power goes and comes back.
    ///
    /// # Errors
    /// As [`Machine::boot`].
    pub fn power_cut(&mut self) -> io::Result<Boot> {
        self.kill9();
        self.forget_orders();
        let _ = fs::remove_file(self.folder.join("sysroot").join(REBOOT_PARAM));
        self.boot()
    }

    /// An orderly restart of the machine, as the daemon ordered it.
    ///
    /// # Errors
    /// As [`Machine::boot`], or the daemon did not end when asked to.
    pub async fn restart(&mut self) -> io::Result<Boot> {
        self.shut_down("reboot.target").await?;
        self.boot()
    }

    /// Somebody on the machine has it restarted.
    ///
    /// # Errors
    /// As [`Machine::restart`].
    pub async fn systemctl_reboot(&mut self) -> io::Result<Boot> {
        // systemctl forgets the argument of an earlier order.
        let _ = fs::remove_file(self.folder.join("sysroot").join(REBOOT_PARAM));
        self.restart().await
    }

    /// Somebody switches it off in good order, and on again.
    ///
    /// # Errors
    /// As [`Machine::restart`].
    pub async fn off_and_on(&mut self) -> io::Result<Boot> {
        self.shut_down("poweroff.target").await?;
        let _ = fs::remove_file(self.folder.join("sysroot").join(REBOOT_PARAM));
        self.boot()
    }

    /// A restart is under way, and the daemon has done its part.
    ///
    /// # Errors
    /// The daemon did not end when asked to.
    pub async fn sigterm_in_shutdown(&mut self) -> io::Result<()> {
        self.shut_down("reboot.target").await
    }

    /// systemd ends the services.
    async fn shut_down(&mut self, target: &str) -> io::Result<()> {
        let jobs = self.folder.join("jobs");
        fs::write(&jobs, format!("7 shutdown.target start waiting\n8 {target} start waiting\n"))?;
        if self.daemon.is_some() {
            self.sigterm(LIMIT).await?;
        }
        self.forget_orders();
        fs::remove_file(jobs)
    }

    /// Waits until the daemon orders a restart, or ends by itself. Cancel-safe.
    ///
    /// # Errors
    /// The pipe broke, or the kernel cannot tell.
    pub async fn next(&mut self) -> io::Result<Happening> {
        loop {
            // Cancel-safe: nothing is read before it is returned.
            tokio::select! {
                order = order(&self.orders) => return order.map(|()| Happening::RestartOrdered),
                () = tokio::time::sleep(LOOK) => if let Some(status) = self.ended()? {
                    return Ok(Happening::Ended(status));
                }
            }
        }
    }

    /// Waits until the daemon orders a restart.
    ///
    /// # Errors
    /// It ended by itself, or did neither within `limit`.
    pub async fn restart_order(&mut self, limit: Duration) -> io::Result<()> {
        match tokio::time::timeout(limit, self.next()).await {
            Ok(Ok(Happening::RestartOrdered)) => Ok(()),
            Ok(Ok(Happening::Ended(status))) => {
                Err(io::Error::other(format!("it ended: {status}")))
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other(format!("no restart was ordered within {limit:?}"))),
        }
    }

    /// Switches on a machine whose bootloader does not do what it was told: this slot boots.
    ///
    /// # Errors
    /// As [`Machine::boot`].
    pub fn boot_default(&mut self, slot: char) -> io::Result<Boot> {
        self.set_variables(&slot.to_string(), "")?;
        self.power_cut()
    }

    /// Orders of a boot that is over are nobody's.
    pub fn forget_orders(&self) {
        let mut words = [0_u8; 256];
        while self.orders.try_read(&mut words).is_ok() {}
    }

    /// The configuration file of the daemon.
    pub fn config_file(&self) -> PathBuf {
        self.folder.join("twinboot.toml")
    }

    /// What the daemon logs, in all its starts.
    pub fn log_file(&self) -> PathBuf {
        self.folder.join("twinbootd.log")
    }

    /// The socket of the device command.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("run/control.sock")
    }

    /// The saved state, as JSON; null while there is none.
    pub fn saved(&self) -> serde_json::Value {
        fs::read(self.folder.join("state/state.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    /// The name of the saved state, such as `fetching`; empty while there is none.
    pub fn saved_state(&self) -> String {
        let saved = self.saved();
        let state = saved.pointer("/saved/state");
        let name = state.and_then(|state| match state {
            serde_json::Value::Object(members) => members.keys().next().cloned(),
            other => other.as_str().map(str::to_owned),
        });
        name.unwrap_or_default()
    }

    /// Everything that helps to understand a failure. No secrets: the credential is left out.
    pub fn account(&self) -> String {
        let text = |name: &str| fs::read_to_string(self.folder.join(name)).unwrap_or_default();
        let log = text("twinbootd.log");
        let from = log.len().saturating_sub(20_000);
        let from = (from..=log.len()).find(|at| log.is_char_boundary(*at)).unwrap_or(0);
        format!(
            "boot: {:?}\n--- bootloader.env\n{}--- bootloader calls\n{}--- twinboot.toml\n{}--- \
             state.json\n{}\n--- twinbootd.log (end)\n{}",
            self.running,
            text("bootloader.env"),
            text("bootloader.log").replace('\n', "; "),
            text("twinboot.toml"),
            self.saved(),
            log.get(from..).unwrap_or_default(),
        )
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// Starts a program from a thread that never ends. It dies with that thread (`PR_SET_PDEATHSIG` of
/// prctl(2)), and those of a runtime end when they have had nothing to do for a while.
fn spawn(command: Command) -> io::Result<Child> {
    type Order = (Command, mpsc::Sender<io::Result<Child>>);
    static STARTER: LazyLock<Mutex<mpsc::Sender<Order>>> = LazyLock::new(|| {
        let (orders, queue) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in queue {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let gone = || io::Error::other("the thread that starts programs is gone");
    let (reply, started) = mpsc::channel();
    let starter = STARTER.lock().map_err(|_| gone())?.clone();
    starter.send((command, reply)).map_err(|_| gone())?;
    started.recv().map_err(|_| gone())?
}

async fn order(orders: &pipe::Receiver) -> io::Result<()> {
    let mut words = [0_u8; 256];
    loop {
        orders.readable().await?;
        match orders.try_read(&mut words) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX))
}

/// Sets `key`, such as `update.trial_limit_s`.
fn set(config: &mut toml::Table, key: &str, value: toml::Value) {
    let mut table = config;
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            table.insert(part.to_owned(), value);
            return;
        }
        let entry = table.entry(part).or_insert_with(|| toml::Table::new().into());
        match entry {
            toml::Value::Table(inner) => table = inner,
            _ => return,
        }
    }
}

/// A configuration for a short life: small delays, everything inside the folder.
fn defaults(folder: &Path, slots: &[Slot; 2]) -> toml::Table {
    let path = |name: &str| toml::Value::from(folder.join(name).display().to_string());
    let [a, b] = slots.each_ref().map(|slot| toml::Value::from(slot.device.display().to_string()));
    let program = |words: &[toml::Value]| toml::Value::from(words.to_vec());
    let mut config = toml::Table::new();
    for (key, value) in [
        ("hub.credential_file", path("hub-credential")),
        ("hub.retry_min_s", 1.into()),
        ("hub.retry_max_s", 2.into()),
        ("hub.refused_retry_s", 2.into()),
        ("report.progress_interval_s", 1.into()),
        ("report.progress_step_percent", 1.into()),
        ("report.journal_directory", path("journal")),
        ("update.trial_limit_s", 60.into()),
        ("fetch.retry_min_s", 1.into()),
        ("fetch.retry_max_s", 2.into()),
        ("slots.a.device", a),
        ("slots.b.device", b),
        ("install.checkpoint_mib", 1.into()),
        ("boot.kind", "custom".into()),
        ("boot.custom.command", program(&[path("bootloader.sh"), path("")])),
        ("health.directory", path("health.d")),
        ("health.interval_s", 1.into()),
        ("health.systemctl", path("bin/systemctl")),
        ("restart.command", program(&[path("restart.sh"), "{argument}".into()])),
        ("state.directory", path("state")),
        ("control.socket", path("run/control.sock")),
    ] {
        set(&mut config, key, value);
    }
    config
}

/// Number of the device that the file system of `path` lies on, as `/proc` shows it.
fn device_number(path: &Path) -> io::Result<String> {
    let number = path.metadata()?.dev();
    Ok(format!("{}:{}", nix::sys::stat::major(number), nix::sys::stat::minor(number)))
}

/// A file with this text and mode, whatever the umask.
fn write_mode(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    // The mode counts from the first moment: a text may be a secret.
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// The value of `key` in lines of `KEY=value`, without quotes.
fn release_value(text: &str, key: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .find_map(|(name, value)| (name == key).then(|| value.trim_matches('"').to_owned()))
}
