//! The state folder: certificates, identities, twins.
//!
//! `ca.pem` is for clients; `ca-key.pem`, `server-key.pem` and `hub.json` hold secrets and are
//! readable by their owner only.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use openssl::pkey::PKey;
use openssl::x509::X509;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use tokio_util::sync::CancellationToken;

use crate::access::Policies;
use crate::core::{Book, Core};
use crate::error::StartError;
use crate::identity::Identity;
use crate::registry::Record;
use crate::tls::{self, Credential};

const SCHEMA: u32 = 1;
/// Changes within this time are written together.
const GATHER: Duration = Duration::from_millis(100);
const SECRET: u32 = 0o600;
const PUBLIC: u32 = 0o644;

#[derive(Serialize, Deserialize)]
struct Saved {
    schema: u32,
    policies: Policies,
    identities: BTreeMap<Identity, Record>,
    /// Registered authorities, in PEM.
    authorities: Vec<String>,
}

/// The folder's authority, made at the first start.
pub(crate) fn authority(folder: &Path) -> Result<Credential, StartError> {
    let (certificate, key) = (folder.join("ca.pem"), folder.join("ca-key.pem"));
    fs::create_dir_all(folder).map_err(|source| file_error(folder, source))?;
    if certificate.exists() && key.exists() {
        let read = |path: &Path| fs::read(path).map_err(|source| file_error(path, source));
        return Ok(Credential {
            certificate: X509::from_pem(&read(&certificate)?).map_err(StartError::Certificate)?,
            key: PKey::private_key_from_pem(&read(&key)?).map_err(StartError::Certificate)?,
        });
    }
    let authority = tls::new_authority().map_err(StartError::Certificate)?;
    write_credential(&authority, &certificate, &key)?;
    Ok(authority)
}

/// Keeps the server's certificate for people who want to look at it.
pub(crate) fn save_server(folder: &Path, server: &Credential) -> Result<(), StartError> {
    write_credential(server, &folder.join("server.pem"), &folder.join("server-key.pem"))
}

fn write_credential(
    credential: &Credential,
    certificate: &Path,
    key: &Path,
) -> Result<(), StartError> {
    let key_pem = credential.key.private_key_to_pem_pkcs8().map_err(StartError::Certificate)?;
    let pem = credential.certificate.to_pem().map_err(StartError::Certificate)?;
    replace(key, &key_pem, SECRET).map_err(|source| file_error(key, source))?;
    replace(certificate, &pem, PUBLIC).map_err(|source| file_error(certificate, source))
}

fn file_error(path: &Path, source: io::Error) -> StartError {
    StartError::File { path: path.to_owned(), source }
}

fn state_file(folder: &Path) -> PathBuf {
    folder.join("hub.json")
}

/// What was saved, or nothing at the first start.
pub(crate) fn load(folder: &Path) -> Result<Option<(Policies, Book)>, StartError> {
    let path = state_file(folder);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StartError::File { path, source }),
    };
    let saved: Saved =
        serde_json::from_slice(&text).map_err(|source| StartError::State { path, source })?;
    let authorities = saved.authorities.iter().map(|pem| X509::from_pem(pem.as_bytes()));
    let authorities = authorities.collect::<Result<_, _>>().map_err(StartError::Certificate)?;
    let book = Book::new(saved.identities, authorities);
    Ok(Some((saved.policies, book)))
}

/// Saves whenever something changed, until `stop`, and once more then.
pub(crate) async fn keep_saving(core: Arc<Core>, folder: PathBuf, stop: CancellationToken) {
    loop {
        // Cancel-safe: both.
        tokio::select! {
            () = stop.cancelled() => break,
            () = core.dirty.notified() => {
                tokio::time::sleep(GATHER).await;
                save(&core, &folder).await;
            }
        }
    }
    save(&core, &folder).await;
}

async fn save(core: &Arc<Core>, folder: &Path) {
    let text = snapshot(core);
    let path = state_file(folder);
    let saving = tokio::task::spawn_blocking(move || replace(&path, &text?, SECRET));
    let result = saving.await.unwrap_or_else(|error| Err(io::Error::other(error)));
    if let Err(error) = result {
        let message = format!("cannot save the hub's state: {error}");
        core.tell(None, crate::events::EventKind::Warning { message });
    }
}

fn snapshot(core: &Core) -> io::Result<Vec<u8>> {
    let book = core.book();
    let pem = |authority: &X509| {
        let pem = authority.to_pem().map_err(io::Error::other)?;
        String::from_utf8(pem).map_err(io::Error::other)
    };
    let saved = Saved {
        schema: SCHEMA,
        policies: core.policies.clone(),
        identities: book.records.clone(),
        authorities: book.authorities.iter().map(pem).collect::<io::Result<_>>()?,
    };
    serde_json::to_vec(&saved).map_err(io::Error::other)
}

/// Writes beside the file, syncs, renames, syncs the folder.
fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = NamedTempFile::new_in(folder)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    fs::File::open(folder)?.sync_all()
}
