//! What the running system tells of itself, below a root that tests and containers can move.

use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};

use nix::libc::{self, STA_UNSYNC};

use super::file::FileError;
use crate::config;
use crate::update::{BootId, ParseError, Version};

/// The folder that stands for `/` when the agent looks at the running system: `/proc/cmdline`,
/// `/proc/self/mountinfo`, the boot id, `/dev/disk`, the device tree, os-release. Files and
/// programs that the configuration names are always taken as they are named there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sysroot(PathBuf);

impl Sysroot {
    /// The system below `folder`.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Sysroot(folder.into())
    }

    /// Where `path`, as it is named on the device, is found.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Whether this is the machine itself, and not one that is played in a folder.
    #[must_use]
    pub fn is_the_machine(&self) -> bool {
        self.0 == Path::new("/")
    }

    /// The text of `path`; `None` if there is no such file. Bytes that are not UTF-8 are replaced.
    ///
    /// # Errors
    /// The file is there but cannot be read.
    pub fn text(&self, path: impl AsRef<Path>) -> Result<Option<String>, FileError> {
        let path = self.path(path);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(FileError::new("read", &path)(error)),
        }
    }
}

impl Default for Sysroot {
    fn default() -> Self {
        Sysroot::new("/")
    }
}

/// The name of this boot of the machine.
///
/// # Errors
/// The kernel does not tell it.
pub fn boot_id(sysroot: &Sysroot) -> Result<BootId, FileError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let missing = || FileError::new("read", &sysroot.path(path))(io::ErrorKind::NotFound.into());
    let text = sysroot.text(path)?.ok_or_else(missing)?;
    match text.trim() {
        "" => Err(missing()),
        id => Ok(BootId(id.to_owned())),
    }
}

/// Whether a program that follows a time source has set the kernel's clock and still steers it
/// (`STA_UNSYNC` of adjtimex(2) is clear): systemd-timesyncd, ntpd, ptp4l, and chrony with `rtcsync`.
/// A machine that is played in a folder has no kernel of its own: false.
#[must_use]
pub fn kernel_clock_is_synchronised(sysroot: &Sysroot) -> bool {
    sysroot.is_the_machine() && kernel_clock_status().is_some_and(|status| status & STA_UNSYNC == 0)
}

/// The status bits of the kernel's clock; `None` if it may not be asked.
#[allow(unsafe_code, reason = "no library offers this call")]
fn kernel_clock_status() -> Option<libc::c_int> {
    let mut answer = MaybeUninit::<libc::timex>::zeroed();
    // SAFETY: `timex` is made of numbers, for which all bits zero are a value; `modes` = 0 asks and
    // changes nothing; the kernel writes within the one structure that the pointer leads to.
    let answer = unsafe {
        if libc::adjtimex(answer.as_mut_ptr()) < 0 {
            return None;
        }
        answer.assume_init()
    };
    Some(answer.status)
}

/// Why the version of the running image is not known.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// The file is there but cannot be read.
    #[error("cannot tell the running version")]
    File(#[source] FileError),
    /// What stands there is not a version.
    #[error("{key} in {} cannot be used", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Value and rule.
        source: ParseError,
    },
}

/// The version of the running image; `None` if the file or the key is missing, or empty.
///
/// # Errors
/// The file cannot be read, or holds something that is not a version.
pub fn running_version(
    device: &config::Device,
    sysroot: &Sysroot,
) -> Result<Option<Version>, VersionError> {
    let text = sysroot.text(&device.version_file).map_err(VersionError::File)?;
    let value = text.and_then(|text| key_value(&text, &device.version_key));
    value.filter(|value| !value.is_empty()).map(|value| value.parse()).transpose().map_err(
        |source| VersionError::Invalid {
            path: sysroot.path(&device.version_file),
            key: device.version_key.clone(),
            source,
        },
    )
}

/// The value of `key` in a text of `KEY=value` lines with the quoting of os-release(5). The last
/// line wins, as it would in a shell.
#[must_use]
pub fn key_value(text: &str, key: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().split_once('='))
        .rfind(|(name, _)| *name == key)
        .map(|(_, value)| unquote(value))
}

fn unquote(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    let mut quote = None;
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        match (character, quote) {
            ('\\', None | Some('"')) => text.extend(characters.next()),
            ('"' | '\'', None) => quote = Some(character),
            (mark, Some(open)) if mark == open => quote = None,
            (other, _) => text.push(other),
        }
    }
    text
}

/// The arguments of a kernel command line, as the kernel cuts them (`lib/cmdline.c`,
/// `next_arg`): at white space outside double quotes, until `--`. Quotes around an argument or
/// its value are taken away.
#[must_use]
pub fn kernel_arguments(line: &str) -> Vec<(String, Option<String>)> {
    let mut quoted = false;
    line.split(|character: char| {
        quoted ^= character == '"';
        character.is_ascii_whitespace() && !quoted
    })
    .filter(|argument| !argument.is_empty())
    .take_while(|argument| *argument != "--")
    .map(|argument| match argument.trim_matches('"').split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.trim_matches('"').to_owned())),
        None => (argument.trim_matches('"').to_owned(), None),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_the_quoting_of_os_release() {
        let text = "# a comment\nNAME=\"Debian GNU/Linux\"\nID=debian\nEMPTY=\nIMAGE_VERSION='1.2 b'\n\
                    MIX=\"a \\\"b\\\" \\$c\"\n  INDENTED=yes  \nTWICE=1\nTWICE=2\nTAIL=a\\ b\n\
                    OPEN=\"never closed\nNO EQUALS";
        for (key, value) in [
            ("NAME", Some("Debian GNU/Linux")),
            ("ID", Some("debian")),
            ("EMPTY", Some("")),
            ("IMAGE_VERSION", Some("1.2 b")),
            ("MIX", Some("a \"b\" $c")),
            ("INDENTED", Some("yes")),
            ("TWICE", Some("2")),
            ("TAIL", Some("a b")),
            ("OPEN", Some("never closed")),
            ("VERSION", None),
            ("", None),
        ] {
            assert_eq!(key_value(text, key).as_deref(), value, "{key}");
        }
    }

    #[test]
    fn cuts_a_command_line_as_the_kernel_does() {
        let line = "quiet root=/dev/sda2  dyndbg=\"file a.c +p\" \"opt=with blank\" rauc.slot=A\n";
        let cut: Vec<String> = kernel_arguments(line)
            .into_iter()
            .map(|(key, value)| format!("{key}|{}", value.unwrap_or_else(|| "-".to_owned())))
            .collect();
        let expected =
            ["quiet|-", "root|/dev/sda2", "dyndbg|file a.c +p", "opt|with blank", "rauc.slot|A"];
        assert_eq!(cut, expected);
        assert_eq!(kernel_arguments("a=1 -- b=2"), kernel_arguments("a=1"));
        assert_eq!(kernel_arguments(""), Vec::new());
    }

    #[test]
    fn finds_paths_below_the_root() {
        for (root, path, found) in [
            ("/", "/proc/cmdline", "/proc/cmdline"),
            ("/m", "/proc/cmdline", "/m/proc/cmdline"),
            ("/m", "etc/os-release", "/m/etc/os-release"),
        ] {
            assert_eq!(Sysroot::new(root).path(path), Path::new(found));
        }
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in any::<String>(), key in ".{0,3}") {
            let _ = key_value(&text, &key);
            let _ = kernel_arguments(&text);
        }

        #[test]
        fn a_double_quoted_value_is_read_as_it_was_meant(value in "[^\n\r]*") {
            let escaped: String = value
                .chars()
                .flat_map(|c| matches!(c, '\\' | '"' | '$' | '`').then_some('\\').into_iter().chain([c]))
                .collect();
            prop_assert_eq!(key_value(&format!("K=\"{escaped}\""), "K"), Some(value));
        }
    }
}
