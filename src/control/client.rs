//! The command's end of the socket. Blocking: the command has nothing else to do.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Ask, MAX_LINE_BYTES, Reply};

/// The daemon answers a new run within two seconds; a slow bootloader tool may take some more.
const LIMIT: Duration = Duration::from_secs(60);

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

/// Why the daemon could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "twinbootd is not there: nothing listens on {}; start it with `systemctl start \
         twinbootd`, or look at `systemctl status twinbootd`",
        socket.display()
    )]
    NotThere {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket keeps strangers out.
    #[error(
        "not allowed to use {}; run the command as root, or as a member of the group that \
         control.group names",
        socket.display()
    )]
    NotAllowed {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to twinbootd broke; ask again")]
    Broken(#[source] io::Error),
    /// The daemon speaks another language.
    #[error("twinbootd gave an answer that makes no sense; are both of the same version?")]
    Nonsense(#[source] serde_json::Error),
}

impl Client {
    /// Connects to the daemon at `socket`.
    ///
    /// # Errors
    /// The daemon is not there, or keeps this user out.
    pub fn connect(socket: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket).map_err(|source| {
            let socket = socket.to_owned();
            match source.kind() {
                io::ErrorKind::PermissionDenied => ClientError::NotAllowed { socket, source },
                _ => ClientError::NotThere { socket, source },
            }
        })?;
        stream.set_read_timeout(Some(LIMIT)).map_err(ClientError::Broken)?;
        Ok(Client { stream: BufReader::new(stream) })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The connection broke; whether the daemon did what was asked is not known.
    pub fn ask(&mut self, ask: &Ask) -> Result<Reply, ClientError> {
        let mut line = serde_json::to_vec(ask).map_err(ClientError::Nonsense)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(ClientError::Broken)?;
        let mut answer = String::new();
        let limit = u64::try_from(MAX_LINE_BYTES).unwrap_or(u64::MAX);
        let read = self.stream.by_ref().take(limit).read_line(&mut answer);
        match read.map_err(ClientError::Broken)? {
            0 => Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into())),
            _ => serde_json::from_str(&answer).map_err(ClientError::Nonsense),
        }
    }
}
