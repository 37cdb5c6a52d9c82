//! The HTTPS client: whom it trusts, which redirects it follows, and its errors as sentences.

use std::error::Error;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use reqwest::redirect::{Attempt, Policy};
use reqwest::{Certificate, Client, Identity, Proxy};

use crate::config;

/// Why images cannot be fetched with these settings.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// A file that a setting names cannot be read.
    #[error("cannot read {key} {}", path.display())]
    File {
        /// The setting.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others may read the private key.
    #[error("{key} {} has the mode {mode:04o}: others must not read it, run chmod 600", path.display())]
    KeyMode {
        /// The setting.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file does not hold what it should.
    #[error("{key} {} is not usable: {rule}", path.display())]
    Content {
        /// The setting.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What it must hold.
        rule: &'static str,
        /// Why.
        source: reqwest::Error,
    },
    /// The TLS library did not start.
    #[error("cannot set up HTTPS")]
    Client(#[source] reqwest::Error),
}

/// Redirects that are not followed. Both are final.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Refused {
    /// More than the setting allows.
    #[error("it redirects more than {0} times")]
    TooMany(u64),
    /// From `https` to something less.
    #[error("it redirects to an address without TLS")]
    Insecure,
}

/// Reads the files that `settings` name, to see that they are good. Makes no client: with one,
/// OpenSSL reads the system's certificates too, which costs two megabytes.
///
/// # Errors
/// A setting names a file that is of no use.
pub(super) fn check(settings: &config::Fetch) -> Result<(), FetchError> {
    certificates("fetch.ca_file", &settings.ca_file)?;
    if let (Some(certificate), Some(key)) =
        (&settings.client_certificate_file, &settings.client_key_file)
    {
        identity(certificate, key)?;
    }
    Ok(())
}

/// A client for one fetch. Made anew each time: the certificates take memory only while they are
/// needed, and renewed ones are taken without a restart.
///
/// # Errors
/// A setting names a file that is of no use.
pub(super) fn client(
    settings: &config::Fetch,
    user_agent: &str,
    allow_http: bool,
) -> Result<Client, FetchError> {
    let max_redirects = settings.max_redirects.get();
    let follow = move |attempt: Attempt<'_>| {
        let hops = u64::try_from(attempt.previous().len()).unwrap_or(u64::MAX);
        if hops > max_redirects {
            attempt.error(Refused::TooMany(max_redirects))
        } else if attempt.url().scheme() != "https" && !allow_http {
            attempt.error(Refused::Insecure)
        } else {
            attempt.follow()
        }
    };
    // No total limit: a large image on a slow link is fine. A stall is not, and the reader of
    // the body has a limit for that. The connection is not kept: there is one file to fetch.
    let mut builder = Client::builder()
        .tls_backend_native()
        .tls_certs_only(certificates("fetch.ca_file", &settings.ca_file)?)
        .user_agent(user_agent)
        .redirect(Policy::custom(follow))
        .referer(false)
        .no_proxy()
        .connect_timeout(settings.connect_limit_s.duration())
        .pool_max_idle_per_host(0);
    if let Some(proxy) = &settings.proxy {
        builder = builder.proxy(Proxy::all(proxy.url().clone()).map_err(FetchError::Client)?);
    }
    if let (Some(certificate), Some(key)) =
        (&settings.client_certificate_file, &settings.client_key_file)
    {
        builder = builder.identity(identity(certificate, key)?);
    }
    builder.build().map_err(FetchError::Client)
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<Certificate>, FetchError> {
    Certificate::from_pem_bundle(&read(key, path)?).map_err(|source| FetchError::Content {
        key,
        path: path.to_owned(),
        rule: "must hold certificates in PEM",
        source,
    })
}

fn identity(certificate: &Path, private_key: &Path) -> Result<Identity, FetchError> {
    let key = "fetch.client_key_file";
    let failed = |source| FetchError::File { key, path: private_key.to_owned(), source };
    let mode = std::fs::metadata(private_key).map_err(failed)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(FetchError::KeyMode { key, path: private_key.to_owned(), mode });
    }
    let chain = read("fetch.client_certificate_file", certificate)?;
    Identity::from_pkcs8_pem(&chain, &read(key, private_key)?).map_err(|source| {
        FetchError::Content {
            key,
            path: private_key.to_owned(),
            rule: "must hold the PKCS #8 private key, in PEM, of fetch.client_certificate_file",
            source,
        }
    })
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, FetchError> {
    std::fs::read(path).map_err(|source| FetchError::File { key, path: path.to_owned(), source })
}

/// Whether `error` is a redirect that was not followed.
pub(super) fn refused(error: &reqwest::Error) -> Option<Refused> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(refused) = error.downcast_ref::<Refused>() {
            return Some(*refused);
        }
        cause = error.source();
    }
    None
}

/// What went wrong, without the URL, which may hold secrets.
pub(super) fn sentence(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut causes = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Wrappers repeat what they wrap.
        if !causes.last().is_some_and(|last: &String| last.ends_with(&text)) {
            causes.push(text);
        }
        cause = error.source();
    }
    if causes.is_empty() { error.to_string() } else { causes.join(": ") }
}
