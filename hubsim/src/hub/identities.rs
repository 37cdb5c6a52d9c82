//! Who may connect: devices, modules, authorities, and the texts with which they do.

use openssl::x509::X509;

use super::Hub;
use crate::error::HubError;
use crate::events::Reason;
use crate::identity::Identity;
use crate::registry::{Authentication, Record, Status, checked_thumbprint};

impl Hub {
    /// Registers a device or module (`device/module`) with fresh keys, if it is not there yet, and
    /// returns its connection string.
    ///
    /// # Errors
    /// The id cannot exist, or a module's device does not.
    pub fn add_device(&self, id: &str) -> Result<String, HubError> {
        let identity: Identity = id.parse()?;
        if self.core.book().record(&identity).is_err() {
            self.add(&identity, Authentication::fresh())?;
        }
        self.device_connection_string(id)
    }

    /// Registers a device that shows a self-signed certificate with this thumbprint (SHA-1 or
    /// SHA-256, in hexadecimal digits).
    ///
    /// # Errors
    /// The id cannot exist or exists, or the thumbprint is none.
    pub fn add_x509_device(&self, id: &str, thumbprint: &str) -> Result<(), HubError> {
        let primary = Some(checked_thumbprint(thumbprint.to_owned())?);
        self.add(&id.parse()?, Authentication::SelfSigned { primary, secondary: None })
    }

    /// Registers a device that shows a certificate of a registered authority with its id as name.
    ///
    /// # Errors
    /// The id cannot exist or exists.
    pub fn add_ca_signed_device(&self, id: &str) -> Result<(), HubError> {
        self.add(&id.parse()?, Authentication::CertificateAuthority)
    }

    /// Registers an authority for devices' certificates.
    ///
    /// # Errors
    /// The text is not one certificate in PEM.
    pub fn add_device_authority(&self, pem: &str) -> Result<(), HubError> {
        let authority = X509::from_pem(pem.as_bytes())
            .map_err(|_| HubError::ArgumentInvalid("not a certificate in PEM".to_owned()))?;
        self.core.book().trust(authority);
        self.core.dirty.notify_one();
        Ok(())
    }

    fn add(&self, identity: &Identity, authentication: Authentication) -> Result<(), HubError> {
        let mut book = self.core.book();
        if book.records.contains_key(identity) {
            return Err(HubError::AlreadyExists(identity.clone()));
        }
        if identity.module_id().is_some() {
            book.record(&Identity::device(identity.device_id())?)?;
        }
        let record = Record::new(authentication, &self.core.clock.stamp());
        book.records.insert(identity.clone(), record);
        self.core.dirty.notify_one();
        Ok(())
    }

    /// Deletes a device with its modules and twins; their connections are cut.
    ///
    /// # Errors
    /// There is none of this id.
    pub fn remove_device(&self, id: &str) -> Result<(), HubError> {
        self.core.delete_device(&id.parse()?, None)
    }

    /// Enables or disables an identity; disabling cuts its connection.
    ///
    /// # Errors
    /// There is none of this id.
    pub fn set_enabled(&self, id: &str, enabled: bool) -> Result<(), HubError> {
        let identity = id.parse()?;
        let mut book = self.core.book();
        let record = book.record_mut(&identity)?;
        record.status = if enabled { Status::Enabled } else { Status::Disabled };
        if !enabled {
            self.core.cut_in(&mut book, &identity, Reason::IdentityRemoved);
        }
        self.core.dirty.notify_one();
        Ok(())
    }

    /// The connection string of a device or module with keys.
    ///
    /// # Errors
    /// There is none of this id, or it has no keys.
    pub fn device_connection_string(&self, id: &str) -> Result<String, HubError> {
        let identity: Identity = id.parse()?;
        let book = self.core.book();
        let Authentication::Sas { primary, .. } = &book.record(&identity)?.authentication else {
            return Err(HubError::ArgumentInvalid(format!("{identity} has no keys")));
        };
        let module = identity.module_id().map(|module| format!(";ModuleId={module}"));
        Ok(format!(
            "HostName={};DeviceId={}{};SharedAccessKey={primary}",
            self.hub_name(),
            identity.device_id(),
            module.unwrap_or_default(),
        ))
    }

    /// The connection string of the policy `iothubowner`, which may do everything.
    pub fn service_connection_string(&self) -> String {
        self.policy_connection_string("iothubowner").unwrap_or_default()
    }

    /// The connection string of a shared access policy: `iothubowner`, `service`, `device`,
    /// `registryRead` or `registryReadWrite`.
    pub fn policy_connection_string(&self, policy: &str) -> Option<String> {
        let key = self.core.policies.key(policy)?;
        let name = self.hub_name();
        Some(format!("HostName={name};SharedAccessKeyName={policy};SharedAccessKey={key}"))
    }

    /// A service token of `iothubowner`, valid for an hour on the hub's clock.
    pub fn service_token(&self) -> String {
        let key = self.core.policies.key("iothubowner").unwrap_or_default();
        let expiry = self.core.clock.unix().saturating_add(3600);
        crate::sas::token(self.hub_name(), key, expiry, Some("iothubowner")).unwrap_or_default()
    }
}
