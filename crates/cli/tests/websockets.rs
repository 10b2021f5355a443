//! WebSockets through a reload and through an upgrade of the program.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use cofferdam_testkit::TenantDirectory;
use cofferdam_testkit::odoo::{MiniOdoo, OdooOptions};
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

const HOST: &str = "acme.example.com";

type Socket = WebSocketStream<TcpStream>;

async fn dial(gateway: SocketAddr) -> Socket {
    let tcp = TcpStream::connect(gateway).await.expect("the gateway refuses a connection");
    let (mut socket, _) =
        tokio_tungstenite::client_async(format!("ws://{HOST}/websocket"), tcp).await.expect("a handshake");
    let hello = socket.next().await.expect("a greeting").expect("a greeting");
    assert_eq!(hello, Message::text(format!("hello {HOST}")));
    socket
}

async fn echo(socket: &mut Socket, text: &str) {
    socket.send(Message::text(text)).await.expect("a message goes out");
    assert_eq!(socket.next().await.expect("an echo").expect("an echo"), Message::text(text));
}

struct Ends(std::process::Child, Vec<u32>);

impl Drop for Ends {
    fn drop(&mut self) {
        for pid in &self.1 {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `WEBSOCKETS=5000` for as many as are promised; each costs four file descriptors here and in the gateway.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_outlive_a_reload_and_are_told_one_after_the_other_to_come_again_to_a_successor() {
    let count: usize = std::env::var("WEBSOCKETS").map_or(200, |n| n.parse().unwrap());
    let odoo = MiniOdoo::start(OdooOptions::default()).await.unwrap();
    let main = format!(
        "http: {{ listen: ['127.0.0.1:0'] }}\npools:\n  odoo: {{ servers: [{{ address: '{}', gevent: '{}' }}], slots: 4 }}\n\
         plans: {{ standard: {{ max_websockets: 20000 }} }}\ndrain_timeout: 40s\n",
        odoo.http(),
        odoo.gevent()
    );
    let directory = TenantDirectory::new(&main).unwrap();
    let tenant = format!("tenant: acme\nhosts: [{HOST}]\nplacement: {{ pool: odoo }}\nplan: standard\n");
    directory.tenant("acme", &tenant).unwrap();
    let place = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
    command.args(["serve", "--workers", "2", "--log-format", "json", "--no-watch", "--config"]).arg(directory.path());
    command.arg("--handover").arg(place.path().join("handover.sock")).stdin(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (send, lines) = mpsc::channel();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    std::thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(|l| drop(send.send(l))));
    let mut processes = Ends(child, Vec::new());
    let wait_for = |message: &str| loop {
        let line = lines.recv_timeout(Duration::from_secs(30)).expect(message);
        let Ok(line) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
        if line["fields"]["message"] == message {
            return line["fields"].clone();
        }
    };
    let gateway: SocketAddr = wait_for("listening")["address"].as_str().unwrap().parse().unwrap();
    wait_for("ready");

    let at_once = Arc::new(Semaphore::new(64));
    let dialled: Vec<_> = (0..count)
        .map(|_| {
            let at_once = Arc::clone(&at_once);
            tokio::spawn(async move {
                let _place = at_once.acquire().await;
                dial(gateway).await
            })
        })
        .collect();
    let mut sockets = Vec::new();
    for socket in dialled {
        sockets.push(socket.await.unwrap());
    }
    // A reload, after which the same sockets go on.
    directory.main(&main.replace("slots: 4", "slots: 5")).unwrap();
    let pid = processes.0.id();
    assert!(Command::new("kill").args(["-HUP", &pid.to_string()]).status().unwrap().success());
    wait_for("configuration reloaded");
    for (n, socket) in sockets.iter_mut().enumerate() {
        echo(socket, &format!("after the reload {n}")).await;
    }
    // An upgrade: each is told to come again, and comes to the successor.
    let come = Arc::new(AtomicUsize::new(0));
    let back: Vec<_> = sockets
        .into_iter()
        .map(|mut socket| {
            let come = Arc::clone(&come);
            tokio::spawn(async move {
                let told = socket.next().await.expect("a goodbye").expect("a goodbye");
                let Message::Close(Some(frame)) = told else { panic!("{told:?}") };
                assert_eq!(frame.code, CloseCode::Away);
                let mut socket = dial(gateway).await;
                echo(&mut socket, "after the upgrade").await;
                come.fetch_add(1, Ordering::Relaxed);
                socket
            })
        })
        .collect();
    assert!(Command::new("kill").args(["-USR2", &pid.to_string()]).status().unwrap().success());
    let successor = wait_for("SIGUSR2: a successor starts");
    processes.1.push(u32::try_from(successor["pid"].as_u64().unwrap()).unwrap());
    wait_for("the predecessor drains");
    // Not all at once: they are spread over a quarter of the time that the drain may take.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let early = come.load(Ordering::Relaxed);
    assert!(early < count, "all {count} came again at once");
    let mut again = Vec::new();
    for socket in back {
        again.push(socket.await.unwrap());
    }
    for socket in &mut again {
        socket.send(Message::text("at the end")).await.unwrap();
        match socket.next().await.unwrap().unwrap() {
            Message::Text(text) => assert_eq!(text, "at the end"),
            // It had reached the predecessor's last moments.
            Message::Close(Some(frame)) if frame.code == CloseCode::Away => {
                echo(&mut dial(gateway).await, "at the end").await;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(again.len(), count);
}
