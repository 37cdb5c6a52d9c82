//! systemd's end of the notify socket, see `sd_notify(3)`.
#![allow(dead_code, reason = "each test uses a part")]

use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::machine::{LIMIT, LOOK, Machine};

/// What the daemon told systemd, with when.
#[derive(Clone, Default)]
pub struct Systemd {
    told: Arc<Mutex<Vec<(Instant, String)>>>,
}

impl Systemd {
    /// Listens to the daemon of `machine` in all its starts from now on.
    pub fn listen(machine: &mut Machine) -> Self {
        let path = machine.folder.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        machine.environment("NOTIFY_SOCKET", &path);
        let systemd = Systemd::default();
        let told = Arc::downgrade(&systemd.told);
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        std::thread::spawn(move || {
            let mut text = vec![0; 8192];
            while let Some(told) = told.upgrade() {
                if let Ok(length) = socket.recv(&mut text) {
                    let text = String::from_utf8_lossy(&text[..length]).trim_end().to_owned();
                    told.lock().unwrap().push((Instant::now(), text));
                }
            }
        });
        systemd
    }

    /// Every message so far.
    pub fn told(&self) -> Vec<String> {
        self.told.lock().unwrap().iter().map(|(_, text)| text.clone()).collect()
    }

    /// How often it was told exactly this.
    pub fn times(&self, message: &str) -> usize {
        self.told().iter().filter(|text| text.lines().any(|line| line == message)).count()
    }

    /// Waits until it is told something with this in it.
    pub async fn hears(&self, part: &str) {
        let wait = async {
            while !self.told().iter().any(|text| text.contains(part)) {
                tokio::time::sleep(LOOK).await;
            }
        };
        let heard = tokio::time::timeout(LIMIT, wait).await;
        heard.unwrap_or_else(|_| panic!("systemd never hears {part:?}: {:#?}", self.told()));
    }
}
