//! What the demo sets up: the folder, the hub, the image server, the machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hubsim::{Hub, Options};

use crate::Arguments;
use crate::machine::{Machine, Plan};
use crate::nginx::Nginx;

/// The device's name in the hub.
pub const DEVICE: &str = "demo-pi";

/// Says that a folder is ours to empty.
const MARK: &str = ".twinboot-demo";

/// Longest path of a socket (`sun_path` in unix(7)) with its end.
const SOCKET_PATH_BYTES: usize = 108;

/// The device's own work, which every new system must be able to do. It lies in `health.d`.
const HEALTHY: &str =
    "#!/bin/sh\n# Stands for the device's own check: can it do its work?\nexit 0\n";

/// Everything that runs beside this program. Dropping it ends all of it.
#[derive(Debug)]
pub struct Stage {
    /// Azure IoT Hub.
    pub hub: Hub,
    /// The server of the images.
    pub images: Nginx,
    /// The device.
    pub machine: Machine,
    /// Takes the big files away at the end. After the machine: it is dropped in this order.
    _litter: Litter,
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
pub async fn set(arguments: &Arguments) -> Result<(Stage, Image)> {
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
    let image = Image { file, file_bytes: size(file)?, image_bytes: size("rootfs-2.0.0.img")? };

    let folder = empty_folder(&arguments.folder)?;
    let litter = Litter(folder.clone());
    let hub = Hub::start(Options::default()).await?;
    let credential = hub.add_device(DEVICE)?;
    let server_folder = folder.join("nginx");
    fs::create_dir(&server_folder)?;
    let server = Nginx::start(&server_folder, &images).context("nginx does not start")?;
    let mut machine = Machine::build(&Plan {
        folder: &folder,
        twinbootd: &twinbootd()?,
        slot_bytes: image.image_bytes,
        image: &images.join("rootfs-1.0.0.img"),
        loop_devices: true,
        credential: &credential,
    })
    .context("the machine cannot be built")?;

    let ca = folder.join("hub-ca.pem");
    fs::write(&ca, hub.ca_pem())?;
    let text = |path: &Path| path.display().to_string();
    machine.set("hub.host", "localhost");
    machine.set("hub.port", i64::from(hub.mqtt_addr().port()));
    machine.set("hub.ca_file", text(&ca));
    machine.set("fetch.ca_file", text(&server.ca()));
    machine.set("install.checkpoint_mib", 64);
    machine.set("update.trial_limit_s", if arguments.fail { 5 } else { 60 });
    machine.health_program("works", Some(&health_program(arguments.fail, &machine)))?;
    Ok((Stage { hub, images: server, machine, _litter: litter }, image))
}

fn health_program(fail: bool, machine: &Machine) -> String {
    if !fail {
        return HEALTHY.to_owned();
    }
    format!(
        "#!/bin/sh\n# Stands for the device's own check. In release 2 the pump does not work.\n\
         grep -q IMAGE_VERSION=1 '{}/sysroot/etc/os-release' && exit 0\n\
         echo 'the pump does not answer on its bus' >&2\nexit 1\n",
        machine.folder.display()
    )
}

/// The daemon that was built with this program: `target/release/twinbootd`.
fn twinbootd() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let path = own.ancestors().nth(2).unwrap_or(&own).join("twinbootd");
    if !path.exists() {
        bail!("{} is missing: run `make demo`, or `cargo build --release`", path.display());
    }
    Ok(path)
}

/// Makes the folder, or empties it if an earlier demo has made it.
fn empty_folder(path: &Path) -> Result<PathBuf> {
    if path.exists() {
        let ours = path.join(MARK).exists() || fs::read_dir(path)?.next().is_none();
        if !ours {
            bail!("{} holds other things; name a new folder with --folder", path.display());
        }
        fs::remove_dir_all(path)?;
    }
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    fs::write(path.join(MARK), "A demonstration of twinboot has made this folder.\n")?;
    let path = path.canonicalize()?;
    let socket = path.join("run/control.sock");
    if socket.as_os_str().len() >= SOCKET_PATH_BYTES {
        bail!("the path {} is too long for a socket; name another --folder", socket.display());
    }
    Ok(path)
}

/// What is too big, too secret or of no use once the machine is gone.
#[derive(Debug)]
struct Litter(PathBuf);

impl Drop for Litter {
    fn drop(&mut self) {
        for name in ["slot-a.img", "slot-b.img", "restart.fifo", "hub-credential"] {
            // It may not have been made yet.
            let _ = fs::remove_file(self.0.join(name));
        }
        for name in ["ca.key", "server.key"] {
            let _ = fs::remove_file(self.0.join("nginx").join(name));
        }
        let _ = fs::remove_dir_all(self.0.join("run"));
    }
}
