//! What the bench sets up: image server, hub, slots and the machine around the daemon.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use hubsim::{Hub, Options};
use openssl::x509::X509;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::machine::{Machine, Plan};
use crate::nginx::Nginx;

/// The device's name in the hub.
pub const DEVICE: &str = "bench-pi";
/// The image as it is.
pub const RAW: &str = "rootfs-2.0.0.img";
/// The same, compressed with zstd.
pub const ZSTD: &str = "rootfs-2.0.0.img.zst";
/// Images of [`BIG_BYTES`]: empty, and several times the other one, in as many zstd frames.
pub const BIG: [&str; 2] = ["big.img", "big.img.zst"];
/// Bytes of a slot, and of the big images.
pub const BIG_BYTES: u64 = 2 << 30;

/// Everything that runs beside this program. Dropping it ends all of it.
pub struct Stage {
    /// The device.
    pub machine: Machine,
    /// The server of the images.
    pub images: Nginx,
    /// Azure IoT Hub.
    pub hub: Hub,
    /// Bytes of the image.
    pub image_bytes: u64,
    root: PathBuf,
    _folder: TempDir,
}

impl Stage {
    /// Builds all of it; the machine is still off.
    pub async fn build(images: &Path) -> Self {
        let images = images.canonicalize().expect("no images: run `make image`");
        fs::create_dir_all("build").unwrap();
        // Short, because a socket's path must be.
        let folder = tempfile::Builder::new().prefix("bench-").tempdir_in("build").unwrap();
        let path = folder.path().canonicalize().unwrap();
        remove_at_panic(path.clone());
        let root = path.join("images");
        fs::create_dir(&root).unwrap();
        for name in [RAW, ZSTD] {
            for name in [name.to_owned(), format!("{name}.sha256")] {
                symlink(images.join(&name), root.join(&name)).unwrap();
            }
        }
        let image_bytes = fs::metadata(root.join(RAW)).expect("run `make image`").len();
        big_images(&root, image_bytes);

        let hub = Hub::start(Options::default()).await.unwrap();
        let credential = hub.add_device(DEVICE).unwrap();
        let server_folder = path.join("nginx");
        fs::create_dir(&server_folder).unwrap();
        let server = Nginx::start(&server_folder, &root).unwrap();
        let mut machine = Machine::build(&Plan {
            folder: &path,
            twinbootd: &as_shipped(&path),
            slot_bytes: BIG_BYTES,
            image: &images.join("rootfs-1.0.0.img"),
            loop_devices: true,
            credential: &credential,
        })
        .unwrap();
        write_out(&machine.slot('B').file);
        // Without the page cache of the file below, as a real medium has none. Where the file
        // system cannot do that, all competitors have the same double cache.
        let device = &machine.slot('B').device;
        let _ = Command::new("losetup").arg("--direct-io=on").arg(device).status();

        // A folder, as the default is.
        let ca = path.join("certs");
        fs::create_dir(&ca).unwrap();
        let pem = hub.ca_pem();
        let hash = X509::from_pem(pem.as_bytes()).unwrap().subject_name_hash();
        fs::write(ca.join(format!("{hash:08x}.0")), pem).unwrap();
        let text = |path: &Path| path.display().to_string();
        machine.set("hub.host", "localhost");
        machine.set("hub.port", i64::from(hub.mqtt_addr().port()));
        machine.set("hub.ca_file", text(&ca));
        machine.set("fetch.ca_file", text(&server.ca()));
        // As it is shipped.
        machine.unset("install", "checkpoint_mib");
        machine.unset("report", "progress_interval_s");
        machine.unset("report", "progress_step_percent");
        Stage { machine, images: server, hub, image_bytes, root, _folder: folder }
    }

    /// Bytes of a file on the server.
    pub fn size(&self, file: &str) -> u64 {
        fs::metadata(self.root.join(file)).unwrap().len()
    }
}

/// A release build ends at a panic without dropping anything; the folder is to go all the same.
fn remove_at_panic(folder: PathBuf) {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        // What it holds is told above; nobody is left to be told of this.
        let _ = fs::remove_dir_all(&folder);
    }));
}

/// The daemon that was built with this program: `target/release/twinbootd`.
fn twinbootd() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.ancestors().nth(2).unwrap().join("twinbootd");
    assert!(path.exists(), "{} is missing: run `make bench`", path.display());
    path
}

/// A program that starts the daemon in the environment that its systemd unit gives it.
fn as_shipped(folder: &Path) -> PathBuf {
    let unit = include_str!("../../systemd/twinbootd.service");
    let variables: Vec<_> =
        unit.lines().filter_map(|line| line.strip_prefix("Environment=")).collect();
    let path = folder.join("twinbootd");
    let daemon = twinbootd();
    let text =
        format!("#!/bin/sh\nexec env {} '{}' \"$@\"\n", variables.join(" "), daemon.display());
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Makes both big images, with their digests beside them.
fn big_images(root: &Path, image_bytes: u64) {
    let [empty, packed] = BIG.map(|name| root.join(name));
    fs::File::create(&empty).unwrap().set_len(BIG_BYTES).unwrap();
    let frame = fs::read(root.join(ZSTD)).unwrap();
    let mut out = fs::File::create(&packed).unwrap();
    let mut hash = Sha256::new();
    for _ in 0..BIG_BYTES / image_bytes {
        out.write_all(&frame).unwrap();
        hash.update(&frame);
    }
    write_digest(&packed, hash);
    let mut hash = Sha256::new();
    let zeros = vec![0; 1 << 20];
    for _ in 0..BIG_BYTES >> 20 {
        hash.update(&zeros);
    }
    write_digest(&empty, hash);
}

fn write_digest(image: &Path, hash: Sha256) {
    let digits: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let name = image.file_name().unwrap().to_str().unwrap();
    fs::write(image.with_file_name(format!("{name}.sha256")), format!("{digits}  {name}\n"))
        .unwrap();
}

/// Fills a slot, so that no run pays for the allocations of the file system below.
fn write_out(file: &Path) {
    let mut out = fs::OpenOptions::new().write(true).open(file).unwrap();
    let block = vec![0xEE; 1 << 20];
    for _ in 0..BIG_BYTES >> 20 {
        out.write_all(&block).unwrap();
    }
    out.sync_all().unwrap();
}
