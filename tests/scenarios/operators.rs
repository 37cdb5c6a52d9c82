//! The operators' programs of Microsoft's tutorials, as they are printed: `tests/operators/` has
//! them. Each runs twice in a row, so that the second run finds what the first one left.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use hubsim::Options;
use serde_json::Value;
use tokio::process::Command;

use crate::world::machine::{Happening, LIMIT};
use crate::world::network::in_own_network;
use crate::world::{DEVICE, World};

/// The service SDKs reach the hub by its name, at 443.
const HUB: &str = "operators.azure-devices.net";

/// Runs `story` in a network where the hub's name means the loopback address.
fn in_network(name: &str, story: impl Future<Output = ()>) {
    in_own_network(name, HUB, || {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(2).enable_all().build().unwrap().block_on(story);
    });
}

/// The two updates: image, and the slot that it ends in.
const UPDATES: [(&str, char); 2] = [("2.0.0", 'B'), ("3.0.0", 'A')];

async fn world() -> World {
    let https = SocketAddr::from(([127, 0, 0, 1], 443));
    let options = Options { hub_name: HUB.to_owned(), https, ..Options::default() };
    let mut world = World::with(options, false).await;
    world.start().await;
    world
}

/// A part of what `packaging/setup/sdks.sh` installs; its absence fails the test.
fn installed(path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("build/sdks").join(path);
    assert!(path.exists(), "{} is missing: run packaging/setup/sdks.sh", path.display());
    path
}

fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/operators").join(name)
}

/// Lets an operator run a program, and plays the machine until it ends. It must succeed.
async fn operate(world: &mut World, command: &mut Command) -> Vec<String> {
    command
        .env("IOTHUB_CONNECTION", world.hub().service_connection_string())
        .env("NODE_EXTRA_CA_CERTS", world.hub().ca_path())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    for proxy in ["HTTPS_PROXY", "ALL_PROXY", "https_proxy", "all_proxy"] {
        command.env_remove(proxy);
    }
    let ends = command.output();
    let played = async {
        tokio::pin!(ends);
        loop {
            // Cancel-safe: the program is kept, and `next` takes nothing that it does not return.
            tokio::select! {
                output = &mut ends => return output.unwrap(),
                happening = world.machine.next() => match happening.unwrap() {
                    Happening::RestartOrdered => drop(world.machine.restart().await.unwrap()),
                    Happening::Ended(status) => panic!("the daemon ended by itself: {status}"),
                }
            }
        }
    };
    let ended = tokio::time::timeout(4 * LIMIT, played).await;
    let Output { status, stdout, stderr } = ended.expect("the operator's program ends");
    let told = String::from_utf8(stdout).unwrap();
    assert!(status.success(), "{status}\n{told}{}", String::from_utf8_lossy(&stderr));
    told.lines().map(str::to_owned).collect()
}

#[test]
fn the_node_tutorial() {
    in_network("operators::the_node_tutorial", async {
        let mut world = world().await;
        for (version, slot) in UPDATES {
            world.slow(&format!("{version}.img"), 1);
            let mut node = Command::new("node");
            node.env("NODE_PATH", installed("node/node_modules"))
                .arg(program("firmware_update.js"))
                .args(["--device", DEVICE, "--version", version])
                .args(["--uri", &world.url(&format!("{version}.img"))]);
            let lines = operate(&mut world, &mut node).await;
            // It ended because the update did, not because of what the last one left.
            world.assert_runs(slot, version);

            let lines: Vec<Value> =
                lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
            let (answers, states): (Vec<Value>, Vec<Value>) =
                lines.into_iter().partition(|line| line.get("answer").is_some());
            assert_eq!(answers.len(), 1, "{answers:?}");
            assert_eq!(answers[0]["answer"]["status"], 200, "{answers:?}");
            let (last, before) = states.split_last().unwrap();
            assert!(before.iter().any(|state| state["status"] == "downloading"), "{before:?}");
            for state in before {
                assert_ne!(state["status"], "applyComplete", "{state}");
                assert_eq!(state.get("lastFirmwareUpdate"), None, "{state}");
            }
            assert_eq!(last["status"], "applyComplete", "{last}");
            assert!(last["lastFirmwareUpdate"].is_string(), "{last}");
            assert_eq!(last.get("error"), None, "{last}");
        }
    });
}

#[test]
fn the_python_tutorial() {
    in_network("operators::the_python_tutorial", async {
        let mut world = world().await;
        for (version, slot) in UPDATES {
            world.slow(&format!("{version}.img"), 1);
            let mut python = Command::new(installed("python/bin/python"));
            python
                .arg(program("firmware_update.py"))
                .args(["--device", DEVICE, "--uri", &world.url(&format!("{version}.img"))])
                .arg("--ca")
                .arg(world.hub().ca_path());
            let lines = operate(&mut world, &mut python).await;
            // It ended because the update did, not because of what the last one left.
            world.assert_runs(slot, version);

            let (answer, states) = lines.split_first().unwrap();
            assert!(answer.starts_with("answer {\"status\": 200,"), "{answer}");
            assert!(states.contains(&"state downloading".to_owned()), "{states:?}");
            assert!(!states.contains(&"state unknown".to_owned()), "{states:?}");
            assert_eq!(states.last().unwrap(), "state completed", "{states:?}");
        }
    });
}
