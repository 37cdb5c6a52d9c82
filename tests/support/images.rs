//! An image server that can misbehave in every way a device may meet, over real TLS.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::as_conversions,
    reason = "shared by tests"
)]

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::ssl::{Ssl, SslAcceptor, SslMethod, SslVerifyMode};
use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, SubjectAlternativeName};
use openssl::x509::{X509, X509Builder, X509NameBuilder};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_openssl::SslStream;

/// A certificate authority of its own, and what it signed.
pub struct Authority {
    /// The certificate to trust.
    pub ca_file: PathBuf,
    /// A client certificate and its key (mode 0600).
    pub client: (PathBuf, PathBuf),
    leaf: (X509, PKey<Private>),
    ca: X509,
}

impl Authority {
    /// Makes one, with its files in `folder`.
    pub fn new(folder: &Path) -> Self {
        let (ca, ca_key) = certificate("images CA", None);
        let leaf = certificate("localhost", Some((&ca, &ca_key)));
        let (client, client_key) = certificate("device", Some((&ca, &ca_key)));
        let write = |name: &str, bytes: Vec<u8>| {
            let path = folder.join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let key = write("client-key.pem", client_key.private_key_to_pem_pkcs8().unwrap());
        set_mode(&key, 0o600);
        Authority {
            ca_file: write("ca.pem", ca.to_pem().unwrap()),
            client: (write("client.pem", client.to_pem().unwrap()), key),
            leaf,
            ca,
        }
    }
}

/// Sets the permission bits of `path`.
pub fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn certificate(name: &str, issuer: Option<(&X509, &PKey<Private>)>) -> (X509, PKey<Private>) {
    let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
    let mut subject = X509NameBuilder::new().unwrap();
    subject.append_entry_by_nid(Nid::COMMONNAME, name).unwrap();
    let subject = subject.build();
    let mut builder = X509Builder::new().unwrap();
    builder.set_version(2).unwrap();
    let mut serial = BigNum::new().unwrap();
    serial.rand(64, openssl::bn::MsbOption::MAYBE_ZERO, false).unwrap();
    builder.set_serial_number(&serial.to_asn1_integer().unwrap()).unwrap();
    builder.set_subject_name(&subject).unwrap();
    builder.set_issuer_name(issuer.map_or(&subject, |(ca, _)| ca.subject_name())).unwrap();
    builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::days_from_now(2).unwrap()).unwrap();
    builder.set_pubkey(&key).unwrap();
    if issuer.is_none() {
        builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
    } else {
        let context = builder.x509v3_context(None, None);
        let names =
            SubjectAlternativeName::new().dns("localhost").ip("127.0.0.1").build(&context).unwrap();
        builder.append_extension(names).unwrap();
        let usage = ExtendedKeyUsage::new().server_auth().client_auth().build().unwrap();
        builder.append_extension(usage).unwrap();
    }
    builder.sign(issuer.map_or(&key, |(_, key)| key), MessageDigest::sha256()).unwrap();
    (builder.build(), key)
}

/// What the server does to one request instead of serving it well.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Answers with this status and these headers.
    Status(u16, Vec<(String, String)>),
    /// Says how much comes, sends so many bytes of it and closes the connection.
    Cut(usize),
    /// The same without a proper end of TLS or a word on the length: ends after so many bytes.
    Close(usize),
    /// Sends so many bytes and then nothing.
    Stall(usize),
    /// Takes the request and never answers.
    Silence,
    /// As `Cut`; afterwards the file has this content and `ETag`.
    Change(usize, Vec<u8>, Option<String>),
    /// Answers a range request with this `Content-Range` and status 206.
    Lie(String),
    /// Sends so many bytes each 10 ms.
    Slow(usize),
    /// Sends at most so many bytes, and the rest after [`ImageServer::release`].
    Hold(usize),
}

/// A file on the server.
#[derive(Clone, Debug)]
pub struct File {
    /// What it holds.
    pub content: Arc<Vec<u8>>,
    /// Its `ETag`, as it stands in the header.
    pub etag: Option<String>,
    /// Its `Last-Modified`.
    pub last_modified: Option<String>,
    /// Whether the server does ranges.
    pub has_ranges: bool,
    /// Whether the server tells the length.
    pub has_length: bool,
    /// What happens to the next requests, in order.
    pub faults: VecDeque<Fault>,
}

impl File {
    /// A file that is served well.
    pub fn new(content: impl Into<Vec<u8>>) -> Self {
        File {
            content: Arc::new(content.into()),
            etag: Some("\"v1\"".to_owned()),
            last_modified: None,
            has_ranges: true,
            has_length: true,
            faults: VecDeque::new(),
        }
    }

    /// The same with these faults.
    pub fn with(mut self, faults: impl IntoIterator<Item = Fault>) -> Self {
        self.faults.extend(faults);
        self
    }
}

/// A request that came.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    /// Its path, without the query.
    pub path: String,
    /// Where its range begins.
    pub from: Option<usize>,
    /// Its headers, names in lower case.
    pub headers: HashMap<String, String>,
    /// Bytes of the body that were sent in answer.
    pub sent: usize,
}

#[derive(Default)]
struct State {
    files: HashMap<String, File>,
    seen: Vec<Seen>,
}

/// The server. It ends with the runtime it was started on.
#[derive(Clone)]
pub struct ImageServer {
    /// Port for `https`.
    pub port: u16,
    /// Port for `http`.
    pub http_port: u16,
    state: Arc<Mutex<State>>,
    releases: Arc<watch::Sender<()>>,
}

impl ImageServer {
    /// Starts it on loopback. With `asks_client`, only clients of `authority` get in.
    pub async fn start(authority: &Authority, asks_client: bool) -> Self {
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls()).unwrap();
        acceptor.set_certificate(&authority.leaf.0).unwrap();
        acceptor.set_private_key(&authority.leaf.1).unwrap();
        if asks_client {
            acceptor.cert_store_mut().add_cert(authority.ca.clone()).unwrap();
            acceptor.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
        }
        let acceptor = acceptor.build();
        let tls = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = ImageServer {
            port: tls.local_addr().unwrap().port(),
            http_port: plain.local_addr().unwrap().port(),
            state: Arc::default(),
            releases: Arc::default(),
        };
        let this = server.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = tls.accept().await {
                let (this, ssl) = (this.clone(), Ssl::new(acceptor.context()).unwrap());
                tokio::spawn(async move {
                    let mut stream = SslStream::new(ssl, stream).unwrap();
                    if std::pin::Pin::new(&mut stream).accept().await.is_ok() {
                        this.answer(stream).await;
                    }
                });
            }
        });
        let this = server.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = plain.accept().await {
                let this = this.clone();
                tokio::spawn(async move { this.answer(stream).await });
            }
        });
        server
    }

    /// Puts a file at `path`.
    pub fn put(&self, path: &str, file: File) {
        self.state.lock().unwrap().files.insert(path.to_owned(), file);
    }

    /// Changes the file at `path`.
    pub fn edit(&self, path: &str, change: impl FnOnce(&mut File)) {
        change(self.state.lock().unwrap().files.get_mut(path).unwrap());
    }

    /// Lets every transfer go on that is held now.
    pub fn release(&self) {
        self.releases.send_replace(());
    }

    /// The requests for `path` so far.
    pub fn seen(&self, path: &str) -> Vec<Seen> {
        let state = self.state.lock().unwrap();
        state.seen.iter().filter(|seen| seen.path == path).cloned().collect()
    }

    /// Bytes of bodies that were sent for `path`, without those of its first `requests`.
    pub fn sent_since(&self, path: &str, requests: usize) -> usize {
        self.seen(path).iter().skip(requests).map(|seen| seen.sent).sum()
    }

    async fn answer<S: AsyncRead + AsyncWrite + Unpin>(&self, mut stream: S) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        let head = String::from_utf8(head).unwrap();
        let mut lines = head.split("\r\n");
        let target = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
        let path = target.split('?').next().unwrap().to_owned();
        let headers: HashMap<String, String> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect();
        let from = headers
            .get("range")
            .map(|range| range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
        let (index, file, fault) = {
            let mut state = self.state.lock().unwrap();
            state.seen.push(Seen { path: path.clone(), from, headers: headers.clone(), sent: 0 });
            let index = state.seen.len() - 1;
            let file = state.files.get_mut(&path);
            let fault = file.and_then(|file| file.faults.pop_front());
            (index, state.files.get(&path).cloned(), fault)
        };
        let Some(file) = file else {
            let _ = write_head(&mut stream, 404, &[("Content-Length".into(), "0".into())]).await;
            return;
        };
        self.serve(&mut stream, (index, &path), &file, fault, from, &headers).await;
        let _ = stream.shutdown().await;
    }

    async fn serve<S: AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        (index, path): (usize, &str),
        file: &File,
        fault: Option<Fault>,
        from: Option<usize>,
        headers: &HashMap<String, String>,
    ) {
        // Before the first byte: whoever saw a byte come and then releases is heard.
        let mut releases = self.releases.subscribe();
        let mut answer: Vec<(String, String)> = vec![("Connection".into(), "close".into())];
        match &fault {
            Some(Fault::Status(status, more)) => {
                answer.extend(more.iter().cloned());
                answer.push(("Content-Length".into(), "0".into()));
                let _ = write_head(stream, *status, &answer).await;
                return;
            }
            Some(Fault::Silence) => return std::future::pending().await,
            _ => {}
        }
        let is_same = headers.get("if-range").is_none_or(|validator| {
            Some(validator) == file.etag.as_ref() || Some(validator) == file.last_modified.as_ref()
        });
        let total = file.content.len();
        let from = from.filter(|_| file.has_ranges && is_same);
        for (name, value) in [("ETag", &file.etag), ("Last-Modified", &file.last_modified)] {
            if let Some(value) = value {
                answer.push((name.into(), value.clone()));
            }
        }
        if from.is_some_and(|from| from >= total) {
            answer.push(("Content-Range".into(), format!("bytes */{total}")));
            answer.push(("Content-Length".into(), "0".into()));
            let _ = write_head(stream, 416, &answer).await;
            return;
        }
        let body = &file.content[from.unwrap_or(0)..];
        let status = match (from, &fault) {
            (_, Some(Fault::Lie(range))) => {
                answer.push(("Content-Range".into(), range.clone()));
                206
            }
            (Some(from), _) => {
                answer
                    .push(("Content-Range".into(), format!("bytes {from}-{}/{total}", total - 1)));
                206
            }
            (None, _) => 200,
        };
        let is_chunked = !file.has_length && !matches!(fault, Some(Fault::Close(_)));
        if is_chunked {
            answer.push(("Transfer-Encoding".into(), "chunked".into()));
        } else if !matches!(fault, Some(Fault::Close(_))) {
            answer.push(("Content-Length".into(), body.len().to_string()));
        }
        if write_head(stream, status, &answer).await.is_err() {
            return;
        }
        let (count, step) = match fault {
            Some(
                Fault::Cut(count)
                | Fault::Close(count)
                | Fault::Stall(count)
                | Fault::Change(count, ..),
            ) => (count.min(body.len()), usize::MAX),
            Some(Fault::Slow(step)) => (body.len(), step),
            _ => (body.len(), usize::MAX),
        };
        let mut hold = match fault {
            Some(Fault::Hold(bytes)) => Some(bytes),
            _ => None,
        };
        let mut sent = 0;
        for piece in body[..count].chunks(step.min(64 * 1024)) {
            sent += piece.len();
            if hold.is_some_and(|bytes| sent > bytes) {
                let _ = releases.changed().await;
                hold = None;
            }
            let framed = if is_chunked {
                [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat()
            } else {
                piece.to_vec()
            };
            if stream.write_all(&framed).await.is_err() || stream.flush().await.is_err() {
                return;
            }
            self.state.lock().unwrap().seen[index].sent += piece.len();
            if step != usize::MAX {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        if is_chunked && count == body.len() {
            let _ = stream.write_all(b"0\r\n\r\n").await;
        }
        match fault {
            Some(Fault::Stall(_)) => std::future::pending().await,
            Some(Fault::Change(_, content, etag)) => self.edit(path, |file| {
                file.content = Arc::new(content);
                file.etag = etag;
            }),
            _ => {}
        }
    }
}

async fn write_head<S: AsyncWrite + Unpin>(
    stream: &mut S,
    status: u16,
    headers: &[(String, String)],
) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {status} Status\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.flush().await
}
