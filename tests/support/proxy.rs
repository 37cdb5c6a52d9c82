//! An HTTP proxy that knows CONNECT alone.

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Starts one. Tells its URL, and each place that somebody had it connect to.
pub async fn start() -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (opened, tunnels) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(tunnel(client, opened.clone()));
        }
    });
    (url, tunnels)
}

async fn tunnel(client: TcpStream, opened: mpsc::UnboundedSender<String>) {
    let mut client = BufReader::new(client);
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        assert_ne!(client.read_line(&mut request).await.unwrap(), 0);
    }
    let target = request.split(' ').nth(1).unwrap().to_owned();
    assert!(request.starts_with("CONNECT "), "{request}");
    let mut server = TcpStream::connect(&target).await.unwrap();
    opened.send(target).unwrap();
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
    let _ = copy_bidirectional(&mut client, &mut server).await;
}
