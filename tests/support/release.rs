//! Small releases for tests: real ext4 file systems with an os-release and something to move.
#![allow(dead_code, reason = "each test uses a part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

/// Bytes of an image; a slot of this size takes it exactly.
pub const IMAGE_BYTES: u64 = 12 << 20;

/// Bytes in it that no compressor shortens.
const RANDOM_BYTES: usize = 8 << 20;

/// How an image travels.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    Raw,
    Zst,
    Gz,
    Xz,
}

impl Form {
    pub const ALL: [Form; 4] = [Form::Raw, Form::Zst, Form::Gz, Form::Xz];

    /// The name of a release in this form.
    pub fn of(self, version: &str) -> String {
        match self.tool() {
            None => format!("{version}.img"),
            Some((suffix, _)) => format!("{version}.img.{suffix}"),
        }
    }

    fn tool(self) -> Option<(&'static str, &'static [&'static str])> {
        match self {
            Form::Raw => None,
            Form::Zst => Some(("zst", &["zstd", "-q", "-1", "-k", "-f"])),
            Form::Gz => Some(("gz", &["gzip", "-1", "-k", "-f"])),
            Form::Xz => Some(("xz", &["xz", "-0", "-k", "-f"])),
        }
    }
}

/// A file system with this `IMAGE_VERSION`. The same version gives the same random content.
pub fn make(folder: &Path, version: &str) -> PathBuf {
    let tree = folder.join(format!("tree-{version}"));
    fs::create_dir_all(tree.join("etc")).unwrap();
    let release = format!("ID=test\nIMAGE_VERSION=\"{version}\"\n");
    fs::write(tree.join("etc/os-release"), release).unwrap();
    let seed = version.bytes().fold(7_u64, |seed, byte| seed * 31 + u64::from(byte));
    let mut random = vec![0; RANDOM_BYTES];
    fastrand::Rng::with_seed(seed).fill(&mut random);
    fs::write(tree.join("content"), random).unwrap();
    let image = folder.join(format!("{version}.img"));
    fs::File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0", "-d"]).arg(&tree).arg(&image));
    fs::remove_dir_all(tree).unwrap();
    image
}

/// `image` in `form`, beside it.
pub fn pack(image: &Path, form: Form) -> PathBuf {
    let Some((suffix, [tool, arguments @ ..])) = form.tool() else { return image.to_owned() };
    run(Command::new(tool).args(arguments).arg(image));
    let mut packed = image.as_os_str().to_owned();
    packed.push(format!(".{suffix}"));
    packed.into()
}

/// SHA-256 of a file, in hexadecimal digits.
pub fn digest(file: &Path) -> String {
    digest_of(&fs::read(file).unwrap())
}

/// SHA-256 of bytes, in hexadecimal digits.
pub fn digest_of(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
