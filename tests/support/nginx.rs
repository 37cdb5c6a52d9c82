//! nginx as `tests/https/nginx.conf.in` has it, with a certificate made for the run.
#![allow(dead_code, reason = "the tests and the demo each use a part")]

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const TEMPLATE: &str = include_str!("../https/nginx.conf.in");

/// How long it may take to listen.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How many ports are tried.
const PORT_TRIES: u32 = 5;

/// A running server. It ends when this is dropped, or when the process ends.
#[derive(Debug)]
pub struct Nginx {
    process: Child,
    folder: PathBuf,
    address: SocketAddr,
}

/// One response, as the server logged it.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct Transfer {
    /// The path of the request.
    pub path: String,
    /// The status of the response.
    pub status: u16,
    /// The request's `Range`, or nothing.
    pub range: String,
    /// Bytes of the body.
    pub body: u64,
    /// Bytes with the headers.
    pub sent: u64,
}

impl Nginx {
    /// Serves `root`; what the server writes goes to `folder`, which must exist.
    ///
    /// # Errors
    /// The certificate could not be made, or nginx did not start; the text says why.
    pub fn start(folder: &Path, root: &Path) -> io::Result<Self> {
        certificate(folder)?;
        // nginx cannot be told to take any port: one is reserved and given free again. Somebody
        // may be quicker.
        let mut tries = 1;
        loop {
            let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
            match Nginx::start_at(folder, root, address) {
                Err(error) if tries < PORT_TRIES && error.kind() == io::ErrorKind::AddrInUse => {
                    tries += 1;
                }
                result => return result,
            }
        }
    }

    fn start_at(folder: &Path, root: &Path, address: SocketAddr) -> io::Result<Self> {
        let path = |path: &Path| path.display().to_string();
        let text = TEMPLATE
            .replace("@RUN@", &path(folder))
            .replace("@ROOT@", &path(root))
            .replace("@LISTEN@", &address.to_string())
            .replace("@SERVER_NAME@", "localhost")
            .replace("@CERTIFICATE@", &path(&folder.join("server.pem")))
            .replace("@KEY@", &path(&folder.join("server.key")));
        let config = folder.join("nginx.conf");
        fs::write(&config, text)?;
        let errors = fs::File::create(folder.join("nginx.log"))?;
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "nginx", "-e", "stderr", "-p"])
            .arg(folder)
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .process_group(0)
            .spawn()?;
        let mut nginx = Nginx { process, folder: folder.to_owned(), address };
        nginx.wait_until_it_listens()?;
        Ok(nginx)
    }

    /// It writes its pid once it listens. A connection would prove less: the port may be another's.
    fn wait_until_it_listens(&mut self) -> io::Result<()> {
        let begun = Instant::now();
        let pid = self.folder.join("nginx.pid");
        while fs::read_to_string(&pid).unwrap_or_default().trim().is_empty() {
            let problem = match self.process.try_wait()? {
                Some(status) => format!("nginx ended with {status}"),
                None if begun.elapsed() > START_LIMIT => "nginx does not listen".to_owned(),
                None => {
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
            };
            let log = fs::read_to_string(self.folder.join("nginx.log")).unwrap_or_default();
            let taken = log.contains("Address already in use");
            let kind = if taken { io::ErrorKind::AddrInUse } else { io::ErrorKind::Other };
            return Err(io::Error::new(kind, format!("{problem}: {}", log.trim_end())));
        }
        Ok(())
    }

    /// The URL of a file in the root.
    pub fn url(&self, name: &str) -> String {
        format!("https://localhost:{}/{name}", self.address.port())
    }

    /// The certificate that clients must trust.
    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// Every response so far.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn transfers(&self) -> io::Result<Vec<Transfer>> {
        let text = fs::read_to_string(self.folder.join("access.log"))?;
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let id = i32::try_from(self.process.id()).unwrap_or(i32::MAX);
        let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        let _ = self.process.wait();
    }
}

/// A self-signed authority for `localhost` in `ca.pem`, and its certificate in `server.pem`.
fn certificate(folder: &Path) -> io::Result<()> {
    let file = |name: &str| folder.join(name).display().to_string();
    let openssl = |arguments: &[&str]| -> io::Result<()> {
        let output = Command::new("openssl").args(arguments).stdin(Stdio::null()).output()?;
        if output.status.success() {
            return Ok(());
        }
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    let authority = [
        &["req", "-x509", "-subj", "/CN=image server CA"],
        &key[..],
        &["-keyout", &file("ca.key"), "-out", &file("ca.pem")],
    ];
    openssl(&authority.concat())?;
    let server = [
        &["req", "-x509", "-subj", "/CN=localhost"],
        &key[..],
        &["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        &["-addext", "basicConstraints=critical,CA:FALSE"],
        &["-CA", &file("ca.pem"), "-CAkey", &file("ca.key")],
        &["-keyout", &file("server.key"), "-out", &file("server.pem")],
    ];
    openssl(&server.concat())
}
