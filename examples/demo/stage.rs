//! What the demo sets up: the folder, the hub, the image server, the machine.

use std::env;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hubsim::{Hub, Options};
use indicatif::BinaryBytes;
use nix::sys::statvfs::statvfs;

use crate::Arguments;
use crate::machine::slots::let_go;
use crate::machine::{Machine, Plan};
use crate::nginx::Nginx;
use crate::view::View;

/// The device's name in the hub.
pub const DEVICE: &str = "demo-pi";

/// What the health check of release 2 says with `--fail`.
pub const PROBLEM: &str = "the pump does not answer";

/// Says that a folder is ours to empty, and is locked while a demo runs in it.
const MARK: &str = ".twinboot-demo";

/// The files that hold the slots.
const SLOT_FILES: [&str; 2] = ["slot-a.img", "slot-b.img"];

/// What is run beside the daemon, and the Debian packages that have it.
const TOOLS: [(&str, &str); 4] = [
    ("nginx", "nginx"),
    ("openssl", "openssl"),
    ("setpriv", "util-linux"),
    ("debugfs", "e2fsprogs"),
];

/// Longest path of a socket (`sun_path` in unix(7)) with its end.
const SOCKET_PATH_BYTES: usize = 108;

/// For logs, keys and the state, beside the slots.
const SMALL_FILES_BYTES: u64 = 16 << 20;

/// How long the new system has, in seconds; with `--fail` nobody wants to wait for the end.
const TRIAL_LIMIT_S: [u32; 2] = [60, 5];

/// Everything that runs beside this program. Dropping it ends all of it, in this order.
#[derive(Debug)]
pub struct Stage {
    /// The device.
    pub machine: Machine,
    /// The server of the images.
    pub images: Nginx,
    /// Azure IoT Hub.
    pub hub: Hub,
    /// Takes the big files away at the end.
    _folder: Folder,
}

/// The new image.
#[derive(Debug)]
pub struct Image {
    /// The file that is fetched.
    pub file: &'static str,
    /// Bytes of that file.
    pub file_bytes: u64,
    /// Bytes of the file system in it.
    pub image_bytes: u64,
}

/// Builds all of it; the machine is still off.
///
/// # Errors
/// Something is missing, taken or full; the text tells what to do.
pub async fn set(arguments: &Arguments, view: &View) -> Result<(Stage, Image)> {
    for (tool, package) in TOOLS {
        let on_path = |folders| env::split_paths(&folders).any(|path| path.join(tool).is_file());
        if !env::var_os("PATH").is_some_and(on_path) {
            bail!(
                "{tool} is not there: `make packages` installs it (Debian's {package}; \
                 /usr/sbin must be on PATH)"
            );
        }
    }
    let (images, image) = find_image(arguments)?;
    let folder = Folder::take(&arguments.folder)?;
    let path = &folder.path;
    check_space(path, 2 * image.image_bytes + SMALL_FILES_BYTES)?;

    let options = Options { state: Some(path.join("hub")), ..Options::default() };
    let hub = Hub::start(options).await.context("hubsim does not start")?;
    let page = format!("https://localhost:{}/", hub.https_addr().port());
    view.tell("hubsim", &format!("plays Azure IoT Hub; {page} shows the twin in a browser"));

    let server_folder = path.join("nginx");
    fs::create_dir(&server_folder)?;
    let server = Nginx::start(&server_folder, &images).context("nginx does not start")?;
    let sizes = [image.file_bytes, image.image_bytes].map(BinaryBytes);
    view.tell("nginx", &format!("serves {}", server.url(image.file)));
    view.more(&format!("{}, a file system of {} for release 2.0.0", sizes[0], sizes[1]));

    let credential = hub.add_device(DEVICE)?;
    let mut machine = Machine::build(&Plan {
        folder: path,
        twinbootd: &twinbootd()?,
        slot_bytes: image.image_bytes,
        image: &images.join("rootfs-1.0.0.img"),
        loop_devices: !arguments.plain_files,
        credential: &credential,
    })
    .context("the machine cannot be built")?;
    configure(&mut machine, arguments, &hub, &server)?;
    let [a, b] = machine.slots.each_ref().map(|slot| slot.device.display());
    let kind = if machine.slot('A').is_block_device() { "loop devices" } else { "plain files" };
    view.tell("machine", &format!("is built: slots A and B of {} are {kind}", sizes[1]));
    view.more(&format!("{a} and {b}"));
    Ok((Stage { machine, images: server, hub, _folder: folder }, image))
}

/// The folder of the images, and the one that is fetched.
fn find_image(arguments: &Arguments) -> Result<(PathBuf, Image)> {
    let images = arguments.images.canonicalize().with_context(|| {
        format!("no images in {}: run `make image`", arguments.images.display())
    })?;
    let file = arguments.image.file();
    let size = |name: &str| -> Result<u64> {
        let path = images.join(name);
        let found = fs::metadata(&path)
            .with_context(|| format!("{} is missing: run `make image`", path.display()))?;
        Ok(found.len())
    };
    size("rootfs-1.0.0.img")?;
    let image = Image { file, file_bytes: size(file)?, image_bytes: size("rootfs-2.0.0.img")? };
    Ok((images, image))
}

fn check_space(folder: &Path, needed: u64) -> Result<()> {
    let found = statvfs(folder).context("the free space cannot be told")?;
    let free = found.blocks_available().saturating_mul(found.fragment_size());
    if free < needed {
        bail!(
            "{} has {} free, the demo needs {}: make room, or name another place with \
             ARGS=\"--folder FOLDER\"",
            folder.display(),
            BinaryBytes(free),
            BinaryBytes(needed)
        );
    }
    Ok(())
}

/// The daemon's configuration, beside what every played machine has.
fn configure(
    machine: &mut Machine,
    arguments: &Arguments,
    hub: &Hub,
    server: &Nginx,
) -> Result<()> {
    let ca = machine.folder.join("hub-ca.pem");
    fs::write(&ca, hub.ca_pem())?;
    let text = |path: &Path| path.display().to_string();
    machine.set("hub.host", "localhost");
    machine.set("hub.port", i64::from(hub.mqtt_addr().port()));
    machine.set("hub.ca_file", text(&ca));
    machine.set("fetch.ca_file", text(&server.ca()));
    if let Some(megabytes) = arguments.rate {
        machine.set("fetch.rate_limit_bytes_per_s", i64::from(megabytes) * 1_000_000);
    }
    machine.set("install.checkpoint_mib", 64);
    let [well, fail] = TRIAL_LIMIT_S;
    machine.set("update.trial_limit_s", i64::from(if arguments.fail { fail } else { well }));
    machine.health_program("pump", Some(&health_program(arguments.fail, &machine.folder)))?;
    Ok(())
}

/// The device's own work, which every new system must be able to do. It lies in `health.d`.
fn health_program(fail: bool, folder: &Path) -> String {
    let release = folder.join("sysroot/etc/os-release");
    let check = if fail {
        format!(
            "# In release 2 it does not.\n\
             grep -q IMAGE_VERSION=1 '{}' && exit 0\n\
             echo '{PROBLEM} on its bus' >&2\n\
             exit 1\n",
            release.display()
        )
    } else {
        "exit 0\n".to_owned()
    };
    format!(
        "#!/bin/sh\n# Stands for the device's own check: does the pump it drives work?\n{check}"
    )
}

/// The daemon that was built with this program: `target/release/twinbootd`.
fn twinbootd() -> Result<PathBuf> {
    let own = env::current_exe()?;
    let path = own.ancestors().nth(2).unwrap_or(&own).join("twinbootd");
    if !path.exists() {
        bail!("{} is missing: run `make build`", path.display());
    }
    Ok(path)
}

/// The folder of this run. Dropped, it loses what is too big, too secret or of no use once the
/// machine is gone.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// Held while the demo runs.
    _lock: File,
}

impl Folder {
    /// Makes the folder, or empties it if an earlier demo has made it, however that ended.
    fn take(path: &Path) -> Result<Self> {
        let name = path.display();
        let mark = path.join(MARK);
        fs::create_dir_all(path).with_context(|| format!("{name} cannot be made"))?;
        if !mark.exists() && fs::read_dir(path)?.next().is_some() {
            bail!("{name} holds other things; name a new one with ARGS=\"--folder FOLDER\"");
        }
        let lock = File::create(&mark)
            .with_context(|| format!("{name} cannot be written; is it another user's?"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "another demo runs in {name}: wait for its end, or name another place with \
                 ARGS=\"--folder FOLDER\""
            ),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("{name} cannot be locked"));
            }
        }
        let path = path.canonicalize()?;
        for file in SLOT_FILES {
            let_go(&path.join(file));
        }
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())
            } else if entry.file_name() != MARK {
                fs::remove_file(entry.path())
            } else {
                Ok(())
            }
            .with_context(|| format!("{} cannot be removed", entry.path().display()))?;
        }
        let socket = path.join("run/control.sock");
        if socket.as_os_str().len() >= SOCKET_PATH_BYTES {
            bail!(
                "the path {} is too long for a socket; name a shorter one with \
                 ARGS=\"--folder FOLDER\"",
                socket.display()
            );
        }
        Ok(Folder { path, _lock: lock })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Each may not have been made yet.
        for name in SLOT_FILES.into_iter().chain(["restart.fifo", "hub-credential"]) {
            let _ = fs::remove_file(self.path.join(name));
        }
        for name in ["hub", "nginx", "run", "sysroot"] {
            let _ = fs::remove_dir_all(self.path.join(name));
        }
    }
}
