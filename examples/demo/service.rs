//! The operator's side: Azure IoT Hub's service REST API over HTTPS.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use hubsim::Hub;
use reqwest::{Certificate, Client, Method};
use serde_json::{Value, json};

/// The version of the service API, as Microsoft's SDKs name it.
const API: &str = "api-version=2021-04-12";

/// What an operator's back end holds: the hub's address and a token of a shared access policy.
#[derive(Debug)]
pub struct Service {
    client: Client,
    base: String,
    token: String,
    device: String,
}

impl Service {
    /// For `device` at `hub`.
    pub fn new(hub: &Hub, device: &str) -> Result<Self> {
        let authority = Certificate::from_pem(hub.ca_pem().as_bytes())?;
        let client = Client::builder()
            .tls_certs_only([authority])
            .timeout(Duration::from_secs(60))
            .build()?;
        Ok(Service {
            client,
            base: format!("https://localhost:{}", hub.https_addr().port()),
            token: hub.service_token(),
            device: device.to_owned(),
        })
    }

    /// Where direct methods are called.
    pub fn method_url(&self) -> String {
        format!("{}/twins/{}/methods?{API}", self.base, self.device)
    }

    /// Where the twin is read.
    pub fn twin_url(&self) -> String {
        format!("{}/twins/{}?{API}", self.base, self.device)
    }

    /// Calls the direct method and returns its status and answer.
    pub async fn call(&self, method: &str, payload: Value) -> Result<(u64, Value)> {
        let body = json!({
            "methodName": method,
            "payload": payload,
            "responseTimeoutInSeconds": 30,
        });
        let mut answer = self.ask(Method::POST, self.method_url(), Some(body)).await?;
        let status = answer.get("status").and_then(Value::as_u64).context("no status")?;
        let payload = answer.get_mut("payload").map(Value::take).unwrap_or_default();
        Ok((status, payload))
    }

    /// The reported properties of the device's twin.
    pub async fn reported(&self) -> Result<Value> {
        let mut twin = self.ask(Method::GET, self.twin_url(), None).await?;
        let reported = twin.pointer_mut("/properties/reported").map(Value::take);
        reported.context("a twin without reported properties")
    }

    async fn ask(&self, method: Method, url: String, body: Option<Value>) -> Result<Value> {
        let mut request = self.client.request(method, url).header("Authorization", &self.token);
        if let Some(body) = body {
            request = request.header("Content-Type", "application/json").body(body.to_string());
        }
        let answer = request.send().await.context("the hub's service API does not answer")?;
        let (status, text) = (answer.status(), answer.text().await?);
        if !status.is_success() {
            bail!("the hub's service API answered {status}: {text}");
        }
        Ok(serde_json::from_str(&text)?)
    }
}
