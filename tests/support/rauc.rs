//! Debian's real RAUC service, on a bus and with slots of its own. Needs root: RAUC mounts bundles.
#![allow(dead_code, reason = "each test uses a part")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use twinboot::config;
use twinboot::rauc::Rauc;

/// What the board is called.
pub const COMPATIBLE: &str = "twinboot-test";

/// Longer than anything takes.
const LIMIT: Duration = Duration::from_secs(60);

const BUS: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=SOCKET</listen>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
</busconfig>
"#;

/// RAUC's own boot loader program, for `bootloader=custom`: a primary slot and a state for each.
const BOOTLOADER: &str = r#"#!/bin/sh
set -eu
folder=$(dirname "$0")
case $1 in
    get-primary) cat "$folder/primary" ;;
    set-primary) echo "$2" >"$folder/primary"; echo good >"$folder/state-$2" ;;
    get-state) cat "$folder/state-$2" ;;
    set-state)
        echo "$3" >"$folder/state-$2"
        # Like RAUC's own backends: a bad slot is not the primary one.
        [ "$3" = bad ] && [ "$(cat "$folder/primary")" = "$2" ] || exit 0
        [ "$2" = A ] && echo B >"$folder/primary" || echo A >"$folder/primary"
        ;;
    *) exit 64 ;;
esac
"#;

/// A boot loader as RAUC knows it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Backend {
    /// A program with files in the folder.
    Custom,
    /// An environment block `grubenv` in the folder.
    Grub,
    /// None: RAUC leaves the choice to somebody else.
    Noop,
}

/// How RAUC is set up.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// Where everything of it lies; must exist.
    pub folder: &'a Path,
    /// Slots A and B.
    pub devices: [&'a Path; 2],
    pub backend: Backend,
    /// Whether an installation makes its slot the next one to boot.
    pub activates: bool,
    /// RAUC's type of the slots.
    pub kind: &'a str,
}

/// RAUC on its bus.
pub struct RaucService {
    folder: PathBuf,
    bus: Child,
    service: Option<Child>,
}

/// What a bundle is to be.
#[derive(Clone, Copy, Debug)]
pub struct Bundle<'a> {
    pub version: &'a str,
    pub compatible: &'a str,
    /// Class of the slots that it holds an image for.
    pub class: &'a str,
    /// Name of the key that signs it: `key`, or `stranger`.
    pub key: &'a str,
    /// A program that RAUC runs before it writes; it ends well once the file `go` is in the folder.
    pub waits: bool,
}

impl Default for Bundle<'_> {
    fn default() -> Self {
        Bundle {
            version: "2.0.0",
            compatible: COMPATIBLE,
            class: "rootfs",
            key: "key",
            waits: false,
        }
    }
}

impl RaucService {
    /// A bus without RAUC.
    pub fn bus(plan: &Plan<'_>) -> Self {
        let folder = plan.folder.canonicalize().unwrap();
        for name in ["mnt", "data"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        for key in ["key", "stranger"] {
            run(Command::new("openssl")
                .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj"])
                .arg(format!("/CN={key}"))
                .arg("-keyout")
                .arg(folder.join(format!("{key}.pem")))
                .arg("-out")
                .arg(folder.join(format!("{key}-cert.pem"))));
        }
        let program = folder.join("bootloader");
        fs::write(&program, BOOTLOADER).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        for (name, text) in [("primary", "A"), ("state-A", "good"), ("state-B", "bad")] {
            fs::write(folder.join(name), format!("{text}\n")).unwrap();
        }
        let bootloader = match plan.backend {
            Backend::Custom => "custom".to_owned(),
            Backend::Noop => "noop".to_owned(),
            Backend::Grub => {
                let block = folder.join("grubenv");
                run(Command::new("grub-editenv").arg(&block).arg("create"));
                run(Command::new("grub-editenv").arg(&block).args([
                    "set",
                    "ORDER=A B",
                    "A_OK=1",
                    "A_TRY=0",
                    "B_OK=1",
                    "B_TRY=0",
                ]));
                format!("grub\ngrubenv={}", block.display())
            }
        };
        let handlers = match plan.backend {
            Backend::Custom => {
                format!("[handlers]\nbootloader-custom-backend={}\n", program.display())
            }
            Backend::Grub | Backend::Noop => String::new(),
        };
        let at = folder.display();
        let [a, b] = plan.devices.map(Path::display);
        let kind = plan.kind;
        let text = format!(
            "[system]\ncompatible={COMPATIBLE}\nbootloader={bootloader}\nstatusfile={at}/data/status\n\
             mountprefix={at}/mnt\nactivate-installed={}\n[keyring]\npath={at}/key-cert.pem\n{handlers}\
             [slot.rootfs.0]\ndevice={a}\ntype={kind}\nbootname=A\n\
             [slot.rootfs.1]\ndevice={b}\ntype={kind}\nbootname=B\n\
             [slot.other.0]\ndevice=/dev/null\n",
            plan.activates,
        );
        fs::write(folder.join("system.conf"), text).unwrap();
        let socket = folder.join("bus");
        let text = BUS.replace("SOCKET", &socket.display().to_string());
        fs::write(folder.join("bus.conf"), text).unwrap();
        let mut bus = dies_with_us("dbus-daemon")
            .arg(format!("--config-file={}", folder.join("bus.conf").display()))
            .args(["--nofork", "--nopidfile", "--print-address=1"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(bus.stdout.take().unwrap()).read_line(&mut address).unwrap();
        assert!(address.contains("unix:"), "the bus does not start");
        RaucService { folder, bus, service: None }
    }

    /// RAUC on a bus, in a system that was started from slot `booted`.
    pub fn start(plan: &Plan<'_>, booted: char) -> Self {
        let mut rauc = Self::bus(plan);
        rauc.start_service(booted);
        rauc
    }

    /// Starts the service in a system that was started from slot `booted`.
    pub fn start_service(&mut self, booted: char) {
        assert!(self.service.is_none(), "it runs already");
        let log = File::options().create(true).append(true).open(self.log_file()).unwrap();
        let service = dies_with_us("rauc")
            .arg(format!("--conf={}", self.folder.join("system.conf").display()))
            .arg(format!("--override-boot-slot={booted}"))
            .arg("service")
            .env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", self.socket().display()))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.service = Some(service);
        let begun = Instant::now();
        let settings = self.settings();
        // On a thread of its own: a test may be driving a runtime on this one.
        let connect = || Rauc::new(&settings).connect().map(drop);
        let connect = || std::thread::scope(|scope| scope.spawn(connect).join().unwrap());
        while let Err(error) = connect() {
            assert!(begun.elapsed() < LIMIT, "RAUC does not come up: {error}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills the service in the middle of whatever it does.
    pub fn kill_service(&mut self) {
        if let Some(mut service) = self.service.take() {
            let _ = service.kill();
            let _ = service.wait();
        }
        let _ = umount2(&self.folder.join("mnt/bundle"), MntFlags::MNT_DETACH);
        // A service that was killed leaves its loop device behind.
        let left = Command::new("losetup")
            .args(["--noheadings", "--output", "NAME", "--associated"])
            .arg(self.settings().bundle_file)
            .output()
            .unwrap();
        for device in String::from_utf8_lossy(&left.stdout).lines() {
            // Fails if the kernel was faster: its last user has just gone.
            let _ = Command::new("losetup").arg("--detach").arg(device.trim()).output();
        }
    }

    /// The bus.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("bus")
    }

    /// The settings for twinboot.
    pub fn settings(&self) -> config::Rauc {
        config::Rauc {
            bus: self.socket(),
            bundle_file: self.folder.join("data/update.raucb"),
            ..Default::default()
        }
    }

    /// A file of the boot loader program, such as `primary`.
    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(name)).unwrap().trim().to_owned()
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("rauc.log")
    }

    /// What the service said in all its starts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// Waits until the service has said this.
    pub fn says(&self, words: &str) {
        let begun = Instant::now();
        while !self.log().contains(words) {
            assert!(begun.elapsed() < LIMIT, "RAUC never says {words:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Lets bundles that wait go on, now and later.
    pub fn go(&self) {
        fs::write(self.folder.join("go"), "").unwrap();
    }

    /// A bundle with `image` in it, made by `rauc bundle`.
    pub fn bundle(&self, image: &Path, bundle: Bundle<'_>) -> PathBuf {
        let content = self.folder.join("content");
        let _ = fs::remove_dir_all(&content);
        fs::create_dir_all(&content).unwrap();
        fs::copy(image, content.join("image.img")).unwrap();
        let mut manifest =
            format!("[update]\ncompatible={}\nversion={}\n", bundle.compatible, bundle.version);
        if bundle.waits {
            manifest.push_str("[hooks]\nfilename=hook\n");
            let hook = content.join("hook");
            let text = format!(
                "#!/bin/sh\necho 'the hook waits' >&2\nwhile [ ! -e '{}' ]; do sleep 0.02; done\n",
                self.folder.join("go").display()
            );
            fs::write(&hook, text).unwrap();
            fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
        }
        manifest.push_str(&format!("[image.{}]\nfilename=image.img\n", bundle.class));
        if bundle.waits {
            manifest.push_str("hooks=post-install\n");
        }
        fs::write(content.join("manifest.raucm"), manifest).unwrap();
        let file = self.folder.join(format!("{}-{}.raucb", bundle.version, fastrand::u32(..)));
        run(Command::new("rauc")
            .arg("bundle")
            .arg(format!(
                "--cert={}",
                self.folder.join(format!("{}-cert.pem", bundle.key)).display()
            ))
            .arg(format!("--key={}", self.folder.join(format!("{}.pem", bundle.key)).display()))
            .args([&content, &file]));
        file
    }
}

impl Drop for RaucService {
    fn drop(&mut self) {
        self.go();
        self.kill_service();
        let _ = self.bus.kill();
        let _ = self.bus.wait();
        if std::thread::panicking() {
            eprintln!("--- rauc.log\n{}", self.log());
        }
    }
}

/// A program that ends when the test does, however that happens.
fn dies_with_us(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).stdin(Stdio::null());
    command
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
