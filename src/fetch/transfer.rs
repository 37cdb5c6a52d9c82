//! One file over HTTP, however often the transfer breaks: ranges, validators, retries.

use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_RANGE, DATE, ETAG, HeaderMap, HeaderName, IF_RANGE, LAST_MODIFIED,
    RANGE, RETRY_AFTER, TRANSFER_ENCODING,
};
use reqwest::{Client, Response, StatusCode};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::{info, warn};

use super::client::{Refused, refused, sentence};
use super::pipeline::{Closed, Feed, Identity, length};
use super::retry::{Pace, Patience};
use crate::agent::FetchEvent;
use crate::config;
use crate::update::{Failure, FailureKind, ImageUrl, Progress};

/// Why a transfer ends for good.
#[derive(Debug)]
pub(super) enum Stop {
    /// It failed.
    Failed(Failure),
    /// The pipeline is closed, and knows why.
    Closed,
    /// The file is not the one that the checkpoint is about. Start at its beginning.
    Stale,
}

impl From<Closed> for Stop {
    fn from(Closed: Closed) -> Self {
        Stop::Closed
    }
}

/// Why one request ended.
enum Broken {
    /// For good.
    Stop(Stop),
    /// Another one may do better.
    Again { problem: String, after: Option<Duration> },
}

impl From<Stop> for Broken {
    fn from(stop: Stop) -> Self {
        Broken::Stop(stop)
    }
}

/// A file under way.
#[derive(Debug)]
pub(super) struct Transfer<'a> {
    client: &'a Client,
    url: &'a ImageUrl,
    stall_limit: Duration,
    answer_limit: Duration,
    patience: Patience,
    pace: Pace,
    /// Bytes of the file that are through.
    pub(super) position: u64,
    /// What is known of it: from the request, a checkpoint, an earlier answer.
    pub(super) identity: Identity,
    /// Length that the caller said it has.
    pub(super) size_bytes: Option<u64>,
    /// Everything known comes from a checkpoint: nothing is lost by starting again.
    pub(super) may_start_again: bool,
    /// Whether the server has answered with the file once.
    is_begun: bool,
}

impl<'a> Transfer<'a> {
    /// A transfer of the file at `url`, from its beginning.
    pub(super) fn new(client: &'a Client, settings: &config::Fetch, url: &'a ImageUrl) -> Self {
        let stall_limit = settings.stall_limit_s.duration();
        Transfer {
            client,
            url,
            stall_limit,
            answer_limit: stall_limit + settings.connect_limit_s.duration(),
            patience: Patience::new(
                settings.retry_min_s.duration(),
                settings.retry_max_s.duration(),
                settings.retry_budget_s.duration(),
            ),
            pace: Pace::new(settings.rate_limit_bytes_per_s.map(|rate| rate.get())),
            position: 0,
            identity: Identity::default(),
            size_bytes: None,
            may_start_again: false,
            is_begun: false,
        }
    }

    /// Feeds the rest of the file to `feed`.
    ///
    /// # Errors
    /// Part of the file may have been fed.
    pub(super) async fn run(
        &mut self,
        feed: &mut Feed,
        events: &mpsc::Sender<FetchEvent>,
        progress: &watch::Sender<Progress>,
    ) -> Result<(), Stop> {
        loop {
            let Err(broken) = self.attempt(feed, events, progress).await else { return Ok(()) };
            self.wait(broken).await?;
        }
    }

    /// Reads a small file whole; `None` if the server does not have it, or keeps it to itself.
    ///
    /// # Errors
    /// The server does not answer, or with something else.
    pub(super) async fn read_small(&mut self, max_bytes: usize) -> Result<Option<String>, Stop> {
        loop {
            match self.attempt_small(max_bytes).await {
                Ok(text) => return Ok(text),
                Err(broken) => self.wait(broken).await?,
            }
        }
    }

    /// Waits before the next request, if there is to be one.
    async fn wait(&mut self, broken: Broken) -> Result<(), Stop> {
        let (problem, after) = match broken {
            Broken::Stop(stop) => return Err(stop),
            Broken::Again { problem, after } => (problem, after),
        };
        let Some(delay) = self.patience.next_delay(after) else {
            let detail = format!(
                "{} could not be fetched, with nothing new for {} s, {} bytes so far: {problem}; \
                 check the server and the network",
                self.url,
                self.patience.waited().as_secs(),
                self.position
            );
            return Err(Stop::Failed(Failure::new(FailureKind::Network, detail)));
        };
        let retry_in_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        warn!(url = %self.url, at_byte = self.position, retry_in_ms, problem, "transfer broke off");
        tokio::time::sleep(delay).await;
        Ok(())
    }

    async fn attempt(
        &mut self,
        feed: &mut Feed,
        events: &mpsc::Sender<FetchEvent>,
        progress: &watch::Sender<Progress>,
    ) -> Result<(), Broken> {
        if self.is_complete() {
            return Ok(());
        }
        let response = self.request().await?;
        let Some(mut skip_bytes) = self.accept(&response)? else { return Ok(()) };
        if !self.is_begun {
            self.is_begun = true;
            let total_bytes = self.identity.total_bytes;
            info!(url = %self.url, total_bytes, from_byte = self.position, "fetching");
            // A caller that does not listen any more cancels.
            let _ = events.send(FetchEvent::Began).await;
            progress.send_modify(|progress| {
                progress.total_bytes = total_bytes;
                progress.fetched_bytes = self.position;
            });
        }
        feed.identify(self.identity.clone());
        let is_chunked = response.headers().contains_key(TRANSFER_ENCODING);
        let mut response = response;
        while let Some(bytes) = self.chunk(&mut response).await? {
            let bytes = bytes.as_ref();
            self.pace.take(length(bytes)).await;
            let skip = usize::try_from(skip_bytes).unwrap_or(usize::MAX).min(bytes.len());
            let (skipped, fresh) = bytes.split_at(skip);
            skip_bytes -= length(skipped);
            if fresh.is_empty() {
                continue;
            }
            self.position += length(fresh);
            if self.identity.total_bytes.is_some_and(|total| self.position > total) {
                return Err(self.wrong_length(self.position).into());
            }
            feed.push(fresh).await.map_err(Stop::from)?;
            self.patience.progress();
            progress.send_modify(|progress| progress.fetched_bytes = self.position);
        }
        match self.identity.total_bytes {
            Some(total) if self.position < total && is_chunked => {
                Err(self.wrong_length(self.position).into())
            }
            Some(total) if self.position < total => {
                let problem = format!("the server ended at byte {} of {total}", self.position);
                Err(again(problem))
            }
            _ => Ok(()),
        }
    }

    fn is_complete(&self) -> bool {
        self.position > 0 && self.identity.total_bytes == Some(self.position)
    }

    async fn request(&self) -> Result<Response, Broken> {
        let mut request = self.client.get(self.url.with_secrets().clone());
        // A server that compresses on the fly would make another file of it.
        request = request.header(ACCEPT_ENCODING, "identity");
        if self.position > 0 {
            request = request.header(RANGE, format!("bytes={}-", self.position));
            if let Some(validator) = &self.identity.validator {
                request = request.header(IF_RANGE, validator);
            }
        }
        match timeout(self.answer_limit, request.send()).await {
            Err(_) => Err(again("the server does not answer")),
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(match refused(&error) {
                Some(refused) => Stop::Failed(self.redirected(refused)).into(),
                None => again(sentence(error)),
            }),
        }
    }

    fn redirected(&self, refused: Refused) -> Failure {
        let (kind, advice) = match refused {
            Refused::TooMany(_) => {
                (FailureKind::BadServer, "correct the server or raise fetch.max_redirects")
            }
            Refused::Insecure => {
                (FailureKind::InsecureUrl, "correct the server; https must not become http")
            }
        };
        Failure::new(kind, format!("{} is not fetched: {refused}; {advice}", self.url))
    }

    async fn chunk(
        &self,
        response: &mut Response,
    ) -> Result<Option<impl AsRef<[u8]> + use<>>, Broken> {
        match timeout(self.stall_limit, response.chunk()).await {
            Err(_) => {
                let limit_s = self.stall_limit.as_secs();
                Err(again(format!("the server sent nothing for {limit_s} s")))
            }
            Ok(Err(error)) => Err(again(sentence(error))),
            Ok(Ok(bytes)) => Ok(bytes),
        }
    }

    /// Looks at status and headers. Answers how many bytes of the body are known already, or
    /// `None` if all of the file is.
    fn accept(&mut self, response: &Response) -> Result<Option<u64>, Broken> {
        let headers = response.headers();
        match response.status() {
            StatusCode::OK => {
                self.agree(headers, response.content_length())?;
                // The server does not do ranges, or not this time.
                Ok(Some(self.position))
            }
            StatusCode::PARTIAL_CONTENT if self.position > 0 => {
                let range = text(headers, &CONTENT_RANGE).and_then(ContentRange::parse);
                let Some(range) = range.filter(|range| range.first == Some(self.position)) else {
                    let shown = text(headers, &CONTENT_RANGE).unwrap_or("no Content-Range");
                    let shown: String = shown.chars().take(80).collect();
                    return Err(self.bad_server(&format!(
                        "answered with \"{shown}\" when asked for bytes from {} on",
                        self.position
                    )));
                };
                self.agree(headers, range.total)?;
                Ok(Some(0))
            }
            StatusCode::RANGE_NOT_SATISFIABLE if self.position > 0 => {
                let total = text(headers, &CONTENT_RANGE)
                    .and_then(ContentRange::parse)
                    .and_then(|range| range.total);
                self.agree(headers, total)?;
                if total == Some(self.position) {
                    return Ok(None);
                }
                Err(self.bad_server("has no bytes behind those it sent"))
            }
            status => Err(self.status(status, headers)),
        }
    }

    /// What a status that brings no file means.
    fn status(&self, status: StatusCode, headers: &HeaderMap) -> Broken {
        let failed = |kind, advice: &str| {
            let detail = format!("the server answers {status} for {}; {advice}", self.url);
            Stop::Failed(Failure::new(kind, detail)).into()
        };
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => {
                failed(FailureKind::NotFound, "upload the image or correct the URL")
            }
            StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
                failed(FailureKind::AccessDenied, "renew the access that the URL carries")
            }
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Broken::Again {
                problem: format!("the server answers {status}"),
                after: retry_after(headers),
            },
            status if status.is_server_error() => Broken::Again {
                problem: format!("the server answers {status}"),
                after: retry_after(headers),
            },
            _ => failed(FailureKind::BadServer, "check what is behind this URL"),
        }
    }

    fn bad_server(&self, what: &str) -> Broken {
        let detail = format!("the server of {} {what}; correct the server", self.url);
        Stop::Failed(Failure::new(FailureKind::BadServer, detail)).into()
    }

    /// Compares what an answer says of the file with what is known, and learns from it.
    fn agree(&mut self, headers: &HeaderMap, total_bytes: Option<u64>) -> Result<(), Stop> {
        let found = Identity { validator: validator(headers), total_bytes };
        let has_changed = self.identity.differs_from(&found);
        if has_changed && self.may_start_again && !self.is_begun {
            return Err(Stop::Stale);
        }
        if has_changed {
            let detail = format!(
                "{} changed on the server while it was fetched, at byte {}; ask for the update \
                 again",
                self.url, self.position
            );
            return Err(Stop::Failed(Failure::new(FailureKind::ImageChanged, detail)));
        }
        if let Some((found, wanted)) = found.total_bytes.zip(self.size_bytes)
            && found != wanted
        {
            return Err(self.wrong_length(found));
        }
        self.identity.validator = self.identity.validator.take().or(found.validator);
        self.identity.total_bytes =
            self.identity.total_bytes.or(found.total_bytes).or(self.size_bytes);
        Ok(())
    }

    fn wrong_length(&self, found: u64) -> Stop {
        let wanted = self.size_bytes.or(self.identity.total_bytes).unwrap_or_default();
        let detail = format!(
            "{} has {found} bytes and should have {wanted}; upload the image again or correct the \
             size",
            self.url
        );
        Stop::Failed(Failure::new(FailureKind::DigestMismatch, detail))
    }

    async fn attempt_small(&mut self, max_bytes: usize) -> Result<Option<String>, Broken> {
        let mut response = self.request().await?;
        match response.status() {
            StatusCode::OK => {}
            // Stores that hide what they have not answer 403 for it.
            StatusCode::NOT_FOUND
            | StatusCode::GONE
            | StatusCode::FORBIDDEN
            | StatusCode::UNAUTHORIZED => return Ok(None),
            status => return Err(self.status(status, response.headers())),
        }
        let mut all = Vec::new();
        while let Some(bytes) = self.chunk(&mut response).await? {
            all.extend_from_slice(bytes.as_ref());
            if all.len() > max_bytes {
                return Err(self.bad_server(&format!("sent more than {max_bytes} bytes")));
            }
        }
        Ok(Some(String::from_utf8_lossy(&all).into_owned()))
    }
}

fn again(problem: impl Into<String>) -> Broken {
    Broken::Again { problem: problem.into(), after: None }
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// What can stand in `If-Range` (RFC 9110 section 13.1.5): a strong `ETag`, else a date.
fn validator(headers: &HeaderMap) -> Option<String> {
    let strong = text(headers, &ETAG).filter(|etag| etag.starts_with('"'));
    strong.or_else(|| text(headers, &LAST_MODIFIED)).map(str::to_owned)
}

/// `Retry-After` (RFC 9110 section 10.2.3). A date in it is measured by the server's own clock:
/// the device may have none.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = text(headers, &RETRY_AFTER)?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let then = httpdate::parse_http_date(value).ok()?;
    let now = httpdate::parse_http_date(text(headers, &DATE)?).ok()?;
    then.duration_since(now).ok()
}

/// `Content-Range` (RFC 9110 section 14.4): `bytes 5-9/10`, `bytes 5-9/*` or `bytes */10`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct ContentRange {
    first: Option<u64>,
    total: Option<u64>,
}

impl ContentRange {
    fn parse(text: &str) -> Option<Self> {
        let (range, total) = text.strip_prefix("bytes ")?.trim().split_once('/')?;
        let total = if total == "*" { None } else { Some(total.parse().ok()?) };
        if range == "*" {
            return Some(ContentRange { first: None, total });
        }
        let (first, last) = range.split_once('-')?;
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        let is_sound = first <= last && total.is_none_or(|total| last < total);
        is_sound.then_some(ContentRange { first: Some(first), total })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_content_ranges() {
        let range = |first, total| Some(ContentRange { first, total });
        for (text, expected) in [
            ("bytes 5-9/10", range(Some(5), Some(10))),
            ("bytes 5-9/*", range(Some(5), None)),
            ("bytes */10", range(None, Some(10))),
            ("bytes 5-10/10", None),
            ("bytes 9-5/10", None),
            ("bytes -5/10", None),
            ("pages 5-9/10", None),
            ("bytes 5-9", None),
            ("", None),
        ] {
            assert_eq!(ContentRange::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn measures_retry_after_by_the_servers_clock() {
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        let later = "Sun, 06 Nov 1994 08:50:07 GMT";
        for (value, date, expected) in [
            ("120", date, Some(120)),
            (later, date, Some(30)),
            (date, later, None),
            (later, "", None),
            ("soon", date, None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            headers.insert(DATE, date.parse().unwrap());
            assert_eq!(retry_after(&headers), expected.map(Duration::from_secs), "{value} {date}");
        }
    }

    #[test]
    fn takes_only_strong_validators() {
        for (etag, modified, expected) in [
            (Some("\"a\""), Some("date"), Some("\"a\"")),
            (Some("W/\"a\""), Some("date"), Some("date")),
            (Some("W/\"a\""), None, None),
            (None, None, None),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in [(ETAG, etag), (LAST_MODIFIED, modified)] {
                if let Some(value) = value {
                    headers.insert(name, value.parse().unwrap());
                }
            }
            assert_eq!(validator(&headers).as_deref(), expected);
        }
    }
}
