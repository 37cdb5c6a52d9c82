//! A slot's device, opened past the page cache where the kernel allows that.
//!
//! `O_DIRECT` costs a quarter of the CPU time of buffered writes, leaves the memory of the other
//! programs alone, and is the only way to read what the medium really holds.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};
use nix::sys::stat::{major, minor};

use super::InstallError;

/// Alignment in memory and on the medium that direct access needs at most: the page size.
pub(super) const ALIGN: usize = 4096;

/// Memory for direct access: starts at a multiple of [`ALIGN`].
#[derive(Debug)]
pub(super) struct AlignedBuffer {
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// `len` zeros.
    pub(super) fn new(len: usize) -> Self {
        let storage = vec![0; len + ALIGN];
        let start = storage.as_ptr().align_offset(ALIGN);
        AlignedBuffer { storage, start, len }
    }

    /// The memory.
    pub(super) fn bytes(&self) -> &[u8] {
        self.storage.get(self.start..self.start + self.len).unwrap_or_default()
    }

    /// The memory, to be filled.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.storage.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }
}

/// An open slot.
#[derive(Debug)]
pub(super) struct Medium {
    device: PathBuf,
    file: File,
    capacity: u64,
    is_direct: bool,
}

impl Medium {
    /// Opens `device` for reading.
    pub(super) fn open_to_read(device: &Path) -> Result<Self, InstallError> {
        Self::open(device, OpenOptions::new().read(true), OFlag::empty())
    }

    /// Opens `device` for reading and writing, and keeps others from mounting it meanwhile.
    ///
    /// # Errors
    /// [`InstallError::InUse`] if it is mounted, or claimed by another part of the system.
    pub(super) fn open_to_write(device: &Path) -> Result<Self, InstallError> {
        if let Some(problem) = use_of(device) {
            return Err(InstallError::InUse { device: device.to_owned(), problem });
        }
        // Without O_CREAT, O_EXCL on a block device claims it, as a mount does: open(2).
        Self::open(device, OpenOptions::new().read(true).write(true), OFlag::O_EXCL)
    }

    fn open(device: &Path, options: &mut OpenOptions, flags: OFlag) -> Result<Self, InstallError> {
        let failed = |source: io::Error| InstallError::Open { device: device.to_owned(), source };
        let kind = std::fs::metadata(device).map_err(failed)?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            return Err(failed(io::Error::other("is neither a block device nor a regular file")));
        }
        let flags = if kind.is_block_device() { flags } else { OFlag::empty() };
        let mut file = options.custom_flags(flags.bits()).open(device).map_err(|source| {
            if source.raw_os_error() == Some(libc_code(Errno::EBUSY)) {
                let problem = "the kernel says that it is mounted or claimed".to_owned();
                InstallError::InUse { device: device.to_owned(), problem }
            } else {
                failed(source)
            }
        })?;
        let capacity = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let mut medium = Medium { device: device.to_owned(), file, capacity, is_direct: false };
        medium.set_direct(true);
        Ok(medium)
    }

    /// The device's path.
    pub(super) fn device(&self) -> &Path {
        &self.device
    }

    /// Bytes it can hold.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Writes `bytes` at `offset`, which is a multiple of [`ALIGN`], as `bytes` is in memory. An
    /// end that fills no whole page goes through the page cache.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), InstallError> {
        let (pages, tail) = bytes.split_at(bytes.len() - bytes.len() % ALIGN);
        let tail_offset = offset + length(pages);
        let written = match self.file.write_all_at(pages, offset) {
            Err(error) if self.gives_up_direct(&error) => self.file.write_all_at(pages, offset),
            written => written,
        };
        written.map_err(|source| self.write_error(offset, source))?;
        if tail.is_empty() {
            return Ok(());
        }
        let was_direct = self.is_direct;
        self.set_direct(false);
        let written = self.file.write_all_at(tail, tail_offset);
        self.set_direct(was_direct);
        written.map_err(|source| self.write_error(tail_offset, source))
    }

    /// Reads at `offset` into `bytes`, which is aligned in memory and a whole number of pages
    /// long. Answers how many bytes came, at least one.
    pub(super) fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<usize, InstallError> {
        let read = match self.file.read_at(bytes, offset) {
            Err(error) if self.gives_up_direct(&error) => {
                self.forget_cached();
                self.file.read_at(bytes, offset)
            }
            read => read,
        };
        let read = read.and_then(|count| match count {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the device ends here")),
            count => Ok(count),
        });
        read.map_err(|source| InstallError::Read { device: self.device.clone(), offset, source })
    }

    /// Makes sure that later reads come from the medium.
    ///
    /// # Errors
    /// Bytes written earlier, by whomever, did not reach it.
    pub(super) fn settle(&self) -> Result<(), InstallError> {
        self.sync()?;
        self.forget_cached();
        Ok(())
    }

    /// Brings everything written to the medium.
    pub(super) fn sync(&self) -> Result<(), InstallError> {
        self.file
            .sync_all()
            .map_err(|source| InstallError::Sync { device: self.device.clone(), source })
    }

    fn write_error(&self, offset: u64, source: io::Error) -> InstallError {
        InstallError::Write { device: self.device.clone(), offset, source }
    }

    /// Some file systems take the flag and refuse the access; the page cache serves those.
    fn gives_up_direct(&mut self, error: &io::Error) -> bool {
        let refused = self.is_direct && error.raw_os_error() == Some(libc_code(Errno::EINVAL));
        if refused {
            self.set_direct(false);
        }
        refused
    }

    fn set_direct(&mut self, wanted: bool) {
        let flags = if wanted { OFlag::O_DIRECT } else { OFlag::empty() };
        self.is_direct = fcntl(&self.file, FcntlArg::F_SETFL(flags)).is_ok() && wanted;
    }

    fn forget_cached(&self) {
        // Advice only: where it is not taken, there is no medium behind the cache either (tmpfs).
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

/// A length in memory as a length on a medium.
pub(super) fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[allow(clippy::as_conversions, reason = "errno values are the discriminants")]
const fn libc_code(errno: Errno) -> i32 {
    errno as i32
}

/// Who uses `device`, in a person's words: the mount point of it, or of a loop device on it.
fn use_of(device: &Path) -> Option<String> {
    let metadata = std::fs::metadata(device).ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    if metadata.file_type().is_block_device() {
        let number = metadata.rdev();
        return mount_point(&mounts, &format!("{}:{}", major(number), minor(number)))
            .map(|point| format!("it is mounted at {point}"));
    }
    let device = device.canonicalize().ok()?;
    std::fs::read_dir("/sys/block").ok()?.filter_map(Result::ok).find_map(|entry| {
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        if Path::new(backing.trim_end_matches('\n')) != device {
            return None;
        }
        let number = std::fs::read_to_string(entry.path().join("dev")).ok()?;
        let point = mount_point(&mounts, number.trim())?;
        let name = entry.file_name();
        Some(format!("/dev/{} on it is mounted at {point}", name.to_string_lossy()))
    })
}

/// Where the device `number` (`major:minor`) is mounted, from the text of proc(5)'s `mountinfo`:
/// the third field is the device, the fifth the mount point.
fn mount_point<'a>(mounts: &'a str, number: &str) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        (fields.nth(2) == Some(number)).then(|| fields.nth(1)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_where_a_device_is_mounted() {
        let mounts = "22 1 8:2 / / rw,relatime - ext4 /dev/sda2 rw\n\
                      30 22 7:1 / /mnt/new\\040root rw - ext4 /dev/loop1 rw\n";
        for (number, point) in
            [("8:2", Some("/")), ("7:1", Some("/mnt/new\\040root")), ("7:2", None)]
        {
            assert_eq!(mount_point(mounts, number), point);
        }
    }

    #[test]
    fn buffers_are_aligned() {
        let buffer = AlignedBuffer::new(3 * ALIGN);
        assert_eq!(buffer.bytes().as_ptr().align_offset(ALIGN), 0);
        assert_eq!(buffer.bytes().len(), 3 * ALIGN);
    }
}
