//! Why the hub cannot be reached. MQTT libraries say "connect failure"; a person needs to know
//! whether it is the name, the network, the certificate or the clock. Asked once after a failure.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use openssl::error::ErrorStack;
use openssl::ssl::{
    HandshakeError, SslConnector, SslConnectorBuilder, SslFiletype, SslMethod, SslVerifyMode,
};
use openssl::x509::store::X509Lookup;
use tokio::time::timeout;

/// Longest head of a proxy's answer.
const MAX_PROXY_ANSWER_BYTES: u64 = 8192;

// Results of a certificate check, from OpenSSL's x509_vfy.h, where they never change.
const VERIFIED: i32 = 0;
const NOT_YET_VALID: i32 = 9;
const EXPIRED: i32 = 10;
const WRONG_HOST: i32 = 62;
const WRONG_ADDRESS: i32 = 64;

/// Where a connection goes.
#[derive(Clone, Debug)]
pub struct Target {
    /// Host name or address; the certificate must be for it.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Certificates the hub must chain to, PEM.
    pub ca_file: PathBuf,
    /// Host and port of the HTTP proxy between, if there is one.
    pub proxy: Option<(String, u16)>,
    /// Limit for each of: name, TCP, TLS.
    pub limit: Duration,
}

/// Why the hub cannot be reached. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// No address for the name.
    #[error("the name {host} has no address: check it, and the DNS of this network")]
    Name {
        /// The name.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// No TCP connection.
    #[error("no TCP connection to {address}: check the port, and firewalls between")]
    Tcp {
        /// Where to.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The proxy does not let the connection through.
    #[error("the proxy {proxy} does not open a way to {target}: it says \"{answer}\"")]
    Proxy {
        /// The proxy.
        proxy: String,
        /// Where to.
        target: String,
        /// The first line of its answer.
        answer: String,
    },
    /// The file of certificates cannot be used.
    #[error("the certificates in {} (hub.ca_file) cannot be read", path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ErrorStack,
    },
    /// The certificate's issuer is not trusted.
    #[error(
        "the certificate of {host} is not trusted ({problem}): put its issuer into {} (hub.ca_file)",
        ca_file.display()
    )]
    Untrusted {
        /// The host.
        host: String,
        /// The file of trusted certificates.
        ca_file: PathBuf,
        /// What OpenSSL says.
        problem: &'static str,
    },
    /// The certificate is for somebody else.
    #[error("the certificate is not for {host} ({problem}): check hub.host and the hub's name")]
    WrongName {
        /// The host.
        host: String,
        /// What OpenSSL says.
        problem: &'static str,
    },
    /// The certificate is not valid at this time.
    #[error(
        "the certificate of {host} is not valid now ({problem}): check the clock of this device"
    )]
    NotNow {
        /// The host.
        host: String,
        /// What OpenSSL says.
        problem: &'static str,
    },
    /// TLS failed otherwise.
    #[error("no TLS connection to {host}: {problem}")]
    Tls {
        /// The host.
        host: String,
        /// What OpenSSL says.
        problem: String,
    },
}

impl Cause {
    /// Whether the hub was not reached at all, so that nothing is known of what it thinks of this
    /// device, or this device of it.
    #[must_use]
    pub fn lies_on_the_way(&self) -> bool {
        matches!(self, Cause::Name { .. } | Cause::Tcp { .. } | Cause::Proxy { .. })
    }
}

/// Tries name, TCP, proxy and TLS, one after the other.
///
/// # Errors
/// The first that fails. If none fails, the trouble lies behind TLS, with the hub itself.
pub async fn diagnose(target: &Target) -> Result<(), Cause> {
    let (host, port) = target.proxy.clone().unwrap_or((target.host.clone(), target.port));
    let addresses = resolve(&host, port, target.limit).await?;
    let stream = connect(&addresses, &format!("{host}:{port}"), target.limit).await?;
    let other = |problem: String| Cause::Tls { host: target.host.clone(), problem };
    let attempt = {
        let target = target.clone();
        tokio::task::spawn_blocking(move || handshake(stream, &target))
    };
    match timeout(target.limit, attempt).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(other(error.to_string())),
        Err(_) => Err(other("no answer in time".to_owned())),
    }
}

async fn resolve(host: &str, port: u16, limit: Duration) -> Result<Vec<SocketAddr>, Cause> {
    let failed = |source| Cause::Name { host: host.to_owned(), source };
    let found = timeout(limit, tokio::net::lookup_host((host, port)))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(failed)?;
    let addresses: Vec<SocketAddr> = found.collect();
    if addresses.is_empty() { Err(failed(io::ErrorKind::NotFound.into())) } else { Ok(addresses) }
}

/// A blocking connection to the first address that answers.
async fn connect(
    addresses: &[SocketAddr],
    shown: &str,
    limit: Duration,
) -> Result<TcpStream, Cause> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses {
        let opened = timeout(limit, tokio::net::TcpStream::connect(address)).await;
        match opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => return blocking(stream, limit).map_err(|source| tcp(shown, source)),
            Err(error) => last = error,
        }
    }
    Err(tcp(shown, last))
}

fn tcp(address: &str, source: io::Error) -> Cause {
    Cause::Tcp { address: address.to_owned(), source }
}

fn blocking(stream: tokio::net::TcpStream, limit: Duration) -> io::Result<TcpStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    Ok(stream)
}

/// Has certificates from a file, or from a folder with names by their hashes (`c_rehash`), trusted.
fn trust(connector: &mut SslConnectorBuilder, ca_file: &Path) -> Result<(), ErrorStack> {
    match ca_file.to_str().filter(|_| ca_file.is_dir()) {
        Some(folder) => connector
            .cert_store_mut()
            .add_lookup(X509Lookup::hash_dir())?
            .add_dir(folder, SslFiletype::PEM),
        None => connector.set_ca_file(ca_file),
    }
}

/// Blocks; every read and write has the limit.
fn handshake(mut stream: TcpStream, target: &Target) -> Result<(), Cause> {
    let host = target.host.clone();
    let other = |problem: String| Cause::Tls { host: target.host.clone(), problem };
    if let Some((proxy, port)) = &target.proxy {
        open_tunnel(&mut stream, &format!("{proxy}:{port}"), target)?;
    }
    let stack = |error: ErrorStack| other(error.to_string());
    let mut connector = SslConnector::builder(SslMethod::tls_client()).map_err(stack)?;
    connector.set_verify(SslVerifyMode::PEER);
    trust(&mut connector, &target.ca_file)
        .map_err(|source| Cause::CaFile { path: target.ca_file.clone(), source })?;
    let error = match connector.build().connect(&target.host, stream) {
        Ok(_) => return Ok(()),
        Err(HandshakeError::SetupFailure(error)) => return Err(stack(error)),
        Err(HandshakeError::WouldBlock(_)) => return Err(other("no answer in time".to_owned())),
        Err(HandshakeError::Failure(handshake)) => handshake,
    };
    let result = error.ssl().verify_result();
    let problem = result.error_string();
    Err(match result.as_raw() {
        VERIFIED => other(error.error().to_string()),
        NOT_YET_VALID | EXPIRED => Cause::NotNow { host, problem },
        WRONG_HOST | WRONG_ADDRESS => Cause::WrongName { host, problem },
        _ => Cause::Untrusted { host, ca_file: target.ca_file.clone(), problem },
    })
}

/// Asks an HTTP proxy for a way through (RFC 9110 section 9.3.6).
fn open_tunnel(stream: &mut TcpStream, proxy: &str, target: &Target) -> Result<(), Cause> {
    let to = format!("{}:{}", target.host, target.port);
    let failed = |source| tcp(proxy, source);
    let question = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n");
    stream.write_all(question.as_bytes()).map_err(failed)?;
    // Nothing that follows the head can be swallowed: in TLS the client speaks first.
    let mut head = BufReader::new(stream.take(MAX_PROXY_ANSWER_BYTES)).lines();
    let line = head.next().unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()));
    let line = line.map_err(failed)?;
    for field in head {
        if field.map_or(true, |field| field.is_empty()) {
            break;
        }
    }
    if line.split(' ').nth(1).is_some_and(|status| status.starts_with('2')) {
        return Ok(());
    }
    let shown = line.chars().filter(|c| !c.is_control()).take(120).collect();
    Err(Cause::Proxy { proxy: proxy.to_owned(), target: to, answer: shown })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use openssl::asn1::Asn1Time;
    use openssl::hash::MessageDigest;
    use openssl::pkey::{PKey, Private};
    use openssl::rsa::Rsa;
    use openssl::ssl::SslAcceptor;
    use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
    use openssl::x509::{X509, X509Builder, X509NameBuilder};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    /// A certificate that signs itself, for `name`, valid between two UNIX times.
    fn certificate(name: &str, from: i64, until: i64) -> (PKey<Private>, X509) {
        let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
        let mut subject = X509NameBuilder::new().unwrap();
        subject.append_entry_by_text("CN", name).unwrap();
        let subject = subject.build();
        let mut builder = X509Builder::new().unwrap();
        builder.set_version(2).unwrap();
        builder.set_subject_name(&subject).unwrap();
        builder.set_issuer_name(&subject).unwrap();
        builder.set_pubkey(&key).unwrap();
        builder.set_not_before(&Asn1Time::from_unix(from).unwrap()).unwrap();
        builder.set_not_after(&Asn1Time::from_unix(until).unwrap()).unwrap();
        builder.append_extension(BasicConstraints::new().ca().build().unwrap()).unwrap();
        let names = SubjectAlternativeName::new()
            .dns(name)
            .build(&builder.x509v3_context(None, None))
            .unwrap();
        builder.append_extension(names).unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        (key, builder.build())
    }

    /// Shakes hands with everybody who connects.
    async fn server(key: PKey<Private>, certificate: X509) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).unwrap();
        acceptor.set_private_key(&key).unwrap();
        acceptor.set_certificate(&certificate).unwrap();
        let acceptor = acceptor.build();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let stream = blocking(stream, LIMIT).unwrap();
                let acceptor = acceptor.clone();
                tokio::task::spawn_blocking(move || acceptor.accept(stream).map(drop).is_ok());
            }
        });
        port
    }

    fn target(port: u16, ca_file: &Path) -> Target {
        Target {
            host: "localhost".into(),
            port,
            ca_file: ca_file.into(),
            proxy: None,
            limit: LIMIT,
        }
    }

    const LONG_AGO: i64 = 1_000_000_000;
    const FAR_AHEAD: i64 = 4_000_000_000;

    #[tokio::test]
    async fn tells_what_is_wrong_with_the_certificate() {
        let folder = tempfile::tempdir().unwrap();
        let pem = folder.path().join("ca.pem");
        let (_, stranger) = certificate("localhost", LONG_AGO, FAR_AHEAD);
        for (name, from, until, trusted, complaint) in [
            ("localhost", LONG_AGO, FAR_AHEAD, true, None),
            ("localhost", LONG_AGO, FAR_AHEAD, false, Some("is not trusted")),
            ("other.example", LONG_AGO, FAR_AHEAD, true, Some("is not for localhost")),
            ("localhost", LONG_AGO, LONG_AGO + 9, true, Some("check the clock")),
            ("localhost", FAR_AHEAD - 9, FAR_AHEAD, true, Some("check the clock")),
        ] {
            let (key, certificate) = certificate(name, from, until);
            let bundle = if trusted { &certificate } else { &stranger };
            fs::write(&pem, bundle.to_pem().unwrap()).unwrap();
            let port = server(key, certificate).await;
            let found = diagnose(&target(port, &pem)).await;
            match complaint {
                None => assert!(found.is_ok(), "{found:?}"),
                Some(text) => {
                    let cause = found.unwrap_err();
                    assert!(cause.to_string().contains(text), "{cause}");
                    assert!(!cause.lies_on_the_way(), "{cause}");
                }
            }
        }
    }

    #[tokio::test]
    async fn tells_that_the_file_of_certificates_is_missing() {
        let (key, certificate) = certificate("localhost", LONG_AGO, FAR_AHEAD);
        let port = server(key, certificate).await;
        let cause = diagnose(&target(port, Path::new("/nowhere.pem"))).await.unwrap_err();
        assert!(cause.to_string().contains("/nowhere.pem (hub.ca_file)"), "{cause}");
    }

    #[tokio::test]
    async fn tells_that_the_port_is_closed() {
        let port = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap().port()
        };
        let cause = diagnose(&target(port, Path::new("/ca.pem"))).await.unwrap_err();
        assert!(matches!(cause, Cause::Tcp { .. }) && cause.lies_on_the_way(), "{cause:?}");
        assert!(cause.to_string().contains(&format!("localhost:{port}")), "{cause}");
    }

    #[tokio::test]
    async fn tells_that_the_name_is_unknown() {
        // RFC 6761 section 6.4: "invalid" never has an address.
        let target = Target { host: "hub.invalid".into(), ..target(8883, Path::new("/ca.pem")) };
        let cause = diagnose(&target).await.unwrap_err();
        assert!(matches!(cause, Cause::Name { .. }) && cause.lies_on_the_way(), "{cause:?}");
    }

    #[tokio::test]
    async fn tells_what_the_proxy_says() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 1024];
            let length = stream.read(&mut head).await.unwrap();
            stream.write_all(b"HTTP/1.1 403 Not for you\r\n\r\n").await.unwrap();
            String::from_utf8_lossy(&head[..length]).into_owned()
        });
        let proxy = Some(("127.0.0.1".to_owned(), port));
        let target = Target { proxy, ..target(8883, Path::new("/ca.pem")) };
        let cause = diagnose(&target).await.unwrap_err();
        assert!(cause.to_string().contains("403 Not for you"), "{cause}");
        assert!(asked.await.unwrap().starts_with("CONNECT localhost:8883 HTTP/1.1\r\n"));
    }
}
