//! The daemon's end of the socket.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group, chown};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Ask, MAX_LINE_BYTES, Reply};
use crate::config;
use crate::request::{Answer, Command, Request};
use crate::update::{Job, Origin, ParseError};

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
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
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
        loop {
            // Cancel-safe: `accept` is.
            tokio::select! {
                () = cancel.cancelled() => break,
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let (requests, stop) = (requests.clone(), cancel.clone());
                        let allow_http = self.allow_http;
                        tokio::spawn(async move {
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
                        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                    }
                },
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

async fn serve(
    stream: UnixStream,
    requests: &mpsc::Sender<Request>,
    allow_http: bool,
) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let limit = u64::try_from(MAX_LINE_BYTES).unwrap_or(u64::MAX);
    loop {
        let mut line = String::new();
        let read = (&mut reader).take(limit).read_line(&mut line).await?;
        if read == 0 {
            return Ok(());
        }
        if !line.ends_with('\n') {
            return Err(io::Error::other("a line without an end"));
        }
        let answer = match parse(&line, allow_http) {
            Ok(command) => ask(command, requests).await,
            Err(refusal) => refusal,
        };
        let reply = Reply { status: answer.status, body: answer.body };
        let mut text = serde_json::to_vec(&reply)?;
        text.push(b'\n');
        writer.write_all(&text).await?;
    }
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

fn parse(line: &str, allow_http: bool) -> Result<Command, Answer> {
    let ask: Ask = serde_json::from_str(line).map_err(|error| {
        Answer::refused(400, "invalidRequest", format!("the request makes no sense: {error}"))
    })?;
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
