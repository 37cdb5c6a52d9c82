//! What the agent asks of Linux: files that survive a power cut, outside programs, devices,
//! mounts, the network's lines, the restart. Everything in here blocks.

mod device;
mod file;
mod link;
mod machine;
mod restart;
mod shutdown;
mod tool;

pub use device::{
    DeviceNumber, MountedRoot, block_number, file_system_kind, file_system_number, mounted_root,
};
pub use file::{FileError, replace_file, sync_folder, temporary_of};
pub use link::cut_off;
pub use machine::{
    Sysroot, VersionError, boot_id, kernel_arguments, kernel_clock_is_synchronised, key_value,
    running_version,
};
pub use restart::{RestartError, restart, restart_words};
pub use shutdown::{Shutdown, carry_argument, shutdown};
pub use tool::{Finished, Tail, Tool, ToolError};
pub(crate) use tool::{KILL_LIMIT, SLICE, Stream, hide_private_variables, wait};
