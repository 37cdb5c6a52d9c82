//! The daemon's end of the socket.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::{Gid, Group, chown};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Ask, MAX_LINE_BYTES, Reply};
use crate::config;
use crate::request::{Answer, Command, Request};
use crate::update::{Job, Origin, ParseError};

/// Connections served at a time; more wait for their turn, so that they never take all file
/// descriptors of the daemon.
const CONNECTIONS: usize = 64;

/// How long a connection may say nothing, or take nothing. A command asks at once.
const IDLE_LIMIT: Duration = Duration::from_secs(10);

/// Why the socket cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It could not be made.
    #[error("cannot listen on {}", socket.display())]
    Listen {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else is there, and it is not ours to remove.
    #[error("control.socket = {}: there is a file that is no socket; name another path", socket.display())]
    NoSocket {
        /// The path.
        socket: PathBuf,
    },
    /// Another daemon has it.
    #[error("another twinbootd already listens on {}; stop it first", socket.display())]
    Taken {
        /// The socket.
        socket: PathBuf,
    },
    /// The group of the configuration does not exist.
    #[error("control.group = \"{group}\": there is no such group; create it with `groupadd`")]
    NoSuchGroup {
        /// The group.
        group: String,
    },
}

/// The socket, open but not served yet.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    socket: PathBuf,
    allow_http: bool,
}

impl Server {
    /// Opens the socket with its permissions. A socket that nobody serves any more is replaced.
    ///
    /// # Errors
    /// The socket cannot be made, or another daemon serves it.
    pub fn open(control: &config::Control, allow_http: bool) -> Result<Self, ServerError> {
        let socket = control.socket.clone();
        let failed = |source| ServerError::Listen { socket: control.socket.clone(), source };
        if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
            return Err(ServerError::Taken { socket });
        }
        match std::fs::symlink_metadata(&socket) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ServerError::NoSocket { socket });
            }
            Ok(_) => std::fs::remove_file(&socket).map_err(failed)?,
        }
        // Connecting takes the right to write, which no umask in use grants to strangers, so
        // there is no moment in which the socket is open to them.
        let listener = UnixListener::bind(&socket).map_err(failed)?;
        let mode = match group(control)? {
            None => 0o600,
            Some(group) => {
                chown(&socket, None, Some(group)).map_err(|errno| failed(errno.into()))?;
                0o660
            }
        };
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
        Ok(Server { listener, socket, allow_http })
    }

    /// Serves until `cancel`, then removes the socket.
    pub async fn run(self, requests: mpsc::Sender<Request>, cancel: CancellationToken) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            // Cancel-safe: a permit and a connection that are not used are given back; a
            // connection is taken only by the last step.
            let next = async {
                let place = Arc::clone(&places).acquire_owned().await.map_err(io::Error::other)?;
                Ok((place, self.listener.accept().await?.0))
            };
            let accepted: io::Result<_> = tokio::select! {
                () = cancel.cancelled() => break,
                accepted = next => accepted,
            };
            match accepted {
                Ok((place, stream)) => {
                    let (requests, stop) = (requests.clone(), cancel.clone());
                    let allow_http = self.allow_http;
                    tokio::spawn(async move {
                        let _place = place;
                        tokio::select! {
                            () = stop.cancelled() => {}
                            result = serve(stream, &requests, allow_http) => {
                                if let Err(error) = result {
                                    debug!(%error, "a command went away");
                                }
                            }
                        }
                    });
                }
                Err(error) => {
                    warn!(%error, "cannot accept a connection of the device command");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
        remove(&self.socket);
    }
}

fn remove(socket: &Path) {
    if let Err(error) = std::fs::remove_file(socket) {
        debug!(%error, "the socket was gone already");
    }
}

fn group(control: &config::Control) -> Result<Option<Gid>, ServerError> {
    let Some(name) = &control.group else { return Ok(None) };
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(Some(group.gid)),
        _ => Err(ServerError::NoSuchGroup { group: name.clone() }),
    }
}

/// Answers line by line, until the other end goes or falls silent.
async fn serve(
    stream: UnixStream,
    requests: &mpsc::Sender<Request>,
    allow_http: bool,
) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let limit = u64::try_from(MAX_LINE_BYTES).unwrap_or(u64::MAX);
    loop {
        let mut line = Vec::new();
        let mut bounded = (&mut reader).take(limit);
        if timeout(IDLE_LIMIT, bounded.read_until(b'\n', &mut line)).await?? == 0 {
            return Ok(());
        }
        let is_whole = line.ends_with(b"\n");
        let answer = match parse(&line, allow_http) {
            _ if !is_whole => nonsense(&format!("a line must end within {MAX_LINE_BYTES} bytes")),
            Ok(command) => ask(command, requests).await,
            Err(refusal) => refusal,
        };
        let reply = Reply { status: answer.status, body: answer.body };
        let mut text = serde_json::to_vec(&reply)?;
        text.push(b'\n');
        timeout(IDLE_LIMIT, writer.write_all(&text)).await??;
        if !is_whole {
            return Ok(());
        }
    }
}

fn nonsense(problem: &str) -> Answer {
    Answer::refused(400, "invalidRequest", format!("the request makes no sense: {problem}"))
}

async fn ask(command: Command, requests: &mpsc::Sender<Request>) -> Answer {
    let (reply, answer) = oneshot::channel();
    let going_down =
        || Answer::refused(503, "goingDown", "twinbootd is going down; ask again in a moment");
    if requests.send(Request { command, reply }).await.is_err() {
        return going_down();
    }
    answer.await.unwrap_or_else(|_| going_down())
}

fn parse(line: &[u8], allow_http: bool) -> Result<Command, Answer> {
    let ask: Ask = serde_json::from_slice(line).map_err(|error| nonsense(&error.to_string()))?;
    let wrong = |key: &'static str| {
        move |problem: ParseError| {
            Answer::refused(400, "invalidRequest", format!("{key} = {problem}"))
        }
    };
    Ok(match ask {
        Ask::Status => Command::Status,
        Ask::Cancel => Command::Cancel,
        Ask::Confirm => Command::Confirm,
        Ask::Rollback => Command::RollBack(Origin::Local),
        Ask::Install { url, sha256, version } => {
            let job = Job {
                url: url.parse().map_err(wrong("url"))?,
                version: version.map(|text| text.parse()).transpose().map_err(wrong("version"))?,
                digest: sha256.map(|text| text.parse()).transpose().map_err(wrong("sha256"))?,
                size_bytes: None,
            };
            let in_the_clear = allow_http && job.digest.is_some();
            if !job.url.is_protected() && !in_the_clear {
                let rule = "must be an https URL; http needs fetch.allow_http = true and a digest";
                let problem = ParseError { value: job.url.to_string(), rule: rule.to_owned() };
                return Err(wrong("url")(problem));
            }
            Command::Install(job, Origin::Local)
        }
    })
}
