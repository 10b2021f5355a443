//! Pods and nodes of a Kubernetes cluster, as its API tells them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::Value;

use super::{Alone, Probe, seconds};
use crate::model::{CheckId, Evidence, Observation, Status, Topic};

/// Whoever answers for a cluster: its API server, or what it has once answered.
#[async_trait]
pub trait KubernetesApi: Send + Sync {
    /// The answer to `GET path`, or why there is none, in words.
    async fn get(&self, path: &str) -> Result<Value, String>;
}

/// A cluster's API server.
#[derive(Debug)]
pub struct KubernetesServer {
    url: String,
    /// Read for each look: tokens are replaced while they are used.
    token_file: Option<PathBuf>,
    client: reqwest::Client,
    alone: Alone,
}

impl KubernetesServer {
    /// The server at `url`, such as `https://kubernetes.default.svc`, whose certificate is signed by `authorities`. Fails, in
    /// words, where those are none.
    pub fn new(url: &str, token_file: Option<PathBuf>, authorities: Option<&str>) -> Result<Self, String> {
        reqwest::Url::parse(url).map_err(|e| e.to_string())?;
        let config = cofferdam_tls::towards_those(authorities).map_err(|e| e.to_string())?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(config)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(|e| e.to_string())?;
        Ok(Self { url: url.trim_end_matches('/').to_owned(), token_file, client, alone: Alone::default() })
    }
}

#[async_trait]
impl KubernetesApi for KubernetesServer {
    async fn get(&self, path: &str) -> Result<Value, String> {
        let mut request = self.client.get(format!("{}{path}", self.url));
        if let Some(file) = &self.token_file {
            let (path, failed) = (file.clone(), |e: String| format!("{}: {e}", file.display()));
            let token = self.alone.run(move || std::fs::read_to_string(path)).await.map_err(failed)?;
            let token = token.map_err(|e| failed(e.to_string()))?;
            request = request.bearer_auth(token.trim());
        }
        let answer = request.send().await.map_err(super::http::why)?;
        let status = answer.status().as_u16();
        let body: Value = answer.json().await.map_err(super::http::why)?;
        if status == 200 {
            return Ok(body);
        }
        Err(format!("it answers {status}: {}", body["message"].as_str().unwrap_or("no reason is given")))
    }
}

/// Looks at the nodes of a cluster, and at the pods of one namespace.
pub struct KubernetesProbe {
    /// What it is called.
    pub name: String,
    /// Whose pods.
    pub namespace: String,
    /// Who is asked.
    pub api: Arc<dyn KubernetesApi>,
    /// How often to look.
    pub interval: Duration,
}

impl std::fmt::Debug for KubernetesProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubernetesProbe").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A pod may take so long to be there.
const PATIENCE: f64 = 300.0;
/// What has happened so long ago is no news.
const NEWS: f64 = 600.0;
/// A list comes in parts of so many, and not in more parts than this.
const PART: usize = 500;
const PARTS: usize = 20;

impl KubernetesProbe {
    fn id(&self, aspect: &str) -> CheckId {
        CheckId::shared(&format!("kubernetes {}", self.name), aspect)
    }

    async fn list(&self, path: &str) -> Result<Vec<Value>, String> {
        let (mut items, mut from) = (Vec::new(), String::new());
        for _ in 0..PARTS {
            let mut answer = self.api.get(&format!("{path}?limit={PART}{from}")).await?;
            match answer.get_mut("items").map(Value::take) {
                Some(Value::Array(some)) => items.extend(some),
                Some(Value::Null) => {}
                _ => return Err(format!("{path} answers something else than a list")),
            }
            match answer["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) {
                // Made of letters that need no escape in a URL.
                Some(token) => from = format!("&continue={token}"),
                None => return Ok(items),
            }
        }
        Err(format!("{path} has more than {} entries", PART * PARTS))
    }

    fn nodes(&self, nodes: &[Value], now: Timestamp) -> Observation {
        let mut troubles: Vec<(Status, String)> = Vec::new();
        for node in nodes {
            let name = name_of(node);
            for condition in node["status"]["conditions"].as_array().into_iter().flatten() {
                let (kind, state) = (text(&condition["type"]), text(&condition["status"]));
                let reason = text(&condition["reason"]);
                match (kind, state) {
                    ("Ready", "True") => {}
                    ("Ready", _) => troubles.push((Status::Fail, format!("node {name} is not ready: {reason}"))),
                    ("MemoryPressure" | "DiskPressure" | "PIDPressure" | "NetworkUnavailable", "True") => {
                        troubles.push((Status::Warn, format!("node {name} has {kind}: {reason}")));
                    }
                    _ => {}
                }
            }
        }
        self.told("nodes", Topic::Capacity, now, nodes.len(), "nodes are ready", troubles)
    }

    fn pods(&self, pods: &[Value], now: Timestamp) -> Observation {
        let mut troubles: Vec<(Status, String)> = Vec::new();
        for pod in pods {
            let name = name_of(pod);
            let phase = text(&pod["status"]["phase"]);
            let age = since(&pod["status"]["startTime"], now)
                .or_else(|| since(&pod["metadata"]["creationTimestamp"], now))
                .unwrap_or(0.0);
            if phase == "Succeeded" || !pod["metadata"]["deletionTimestamp"].is_null() {
                continue;
            }
            if phase == "Failed" {
                troubles.push((Status::Warn, format!("pod {name} has failed: {}", text(&pod["status"]["reason"]))));
                continue;
            }
            let containers = ["initContainerStatuses", "containerStatuses"];
            let containers = containers.iter().flat_map(|list| pod["status"][*list].as_array().into_iter().flatten());
            let mut explained = false;
            for container in containers {
                let waits = text(&container["state"]["waiting"]["reason"]);
                if !matches!(waits, "" | "ContainerCreating" | "PodInitializing") {
                    explained = true;
                    let message = text(&container["state"]["waiting"]["message"]);
                    let restarts = container["restartCount"].as_u64().unwrap_or(0);
                    let text = format!("pod {name} does not start: {waits}, {restarts} times restarted: {message}");
                    troubles.push((Status::Fail, text));
                }
                let ended = &container["lastState"]["terminated"];
                if since(&ended["finishedAt"], now).is_some_and(|ago| ago < NEWS) && !explained {
                    let (why, code) = (text(&ended["reason"]), ended["exitCode"].as_i64().unwrap_or(0));
                    troubles.push((Status::Warn, format!("a container of pod {name} was restarted: {why} ({code})")));
                }
            }
            let ready = pod["status"]["conditions"].as_array().into_iter().flatten();
            let ready = ready.filter(|condition| text(&condition["type"]) == "Ready").collect::<Vec<_>>();
            for condition in ready.iter().filter(|condition| text(&condition["status"]) != "True") {
                let lasts = since(&condition["lastTransitionTime"], now).unwrap_or(age);
                if lasts > PATIENCE && !explained {
                    let why = format!("{phase}, {}", text(&condition["reason"]));
                    troubles.push((Status::Fail, format!("pod {name} is not ready for {}: {why}", seconds(lasts))));
                    explained = true;
                }
            }
            if ready.is_empty() && age > PATIENCE && !explained {
                let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
                let unplaced =
                    conditions.filter(|c| text(&c["type"]) == "PodScheduled" && text(&c["status"]) == "False");
                let why = unplaced.map(|c| format!(": {}, {}", text(&c["reason"]), text(&c["message"]))).next();
                let text = format!("pod {name} is {phase} for {}{}", seconds(age), why.unwrap_or_default());
                troubles.push((Status::Fail, text));
            }
        }
        self.told("pods", Topic::Availability, now, pods.len(), "pods are as they should be", troubles)
    }

    /// The worst first, and how many there are.
    fn told(
        &self,
        aspect: &str,
        topic: Topic,
        now: Timestamp,
        all: usize,
        calm: &str,
        mut troubles: Vec<(Status, String)>,
    ) -> Observation {
        troubles.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        let number = troubles.len();
        let (status, text) = match troubles.into_iter().next() {
            None if all == 0 => (Status::Warn, format!("there are no {aspect}: is the right name looked for?")),
            None => (Status::Pass, format!("all {all} {calm}")),
            Some((status, text)) if number == 1 => (status, text),
            Some((status, text)) => (status, format!("{text}; and {} others are not well", number - 1)),
        };
        let figure = Evidence::new("not_well", number as f64, "").limited(0.0);
        Observation::pass(self.id(aspect), topic, now, text).with(status).figure(figure)
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn name_of(object: &Value) -> &str {
    text(&object["metadata"]["name"])
}

fn since(value: &Value, now: Timestamp) -> Option<f64> {
    let at: Timestamp = value.as_str()?.parse().ok()?;
    Some(now.duration_since(at).as_secs_f64())
}

#[async_trait]
impl Probe for KubernetesProbe {
    fn name(&self) -> String {
        format!("kubernetes {}", self.name)
    }

    fn checks(&self) -> Vec<CheckId> {
        ["reachable", "nodes", "pods"].iter().map(|aspect| self.id(aspect)).collect()
    }

    fn reachability(&self) -> CheckId {
        self.id("reachable")
    }

    fn interval(&self) -> Duration {
        self.interval
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(15)
    }

    async fn look(&self, now: Timestamp) -> Vec<Observation> {
        let started = Instant::now();
        let reachable = |status, text: String| {
            Observation::pass(self.reachability(), Topic::Availability, now, text).with(status).took(started.elapsed())
        };
        let pods = format!("/api/v1/namespaces/{}/pods", self.namespace);
        let (nodes, pods) = match (self.list("/api/v1/nodes").await, self.list(&pods).await) {
            (Ok(nodes), Ok(pods)) => (nodes, pods),
            (Err(error), _) | (_, Err(error)) => {
                return vec![reachable(Status::Fail, format!("its API cannot be asked: {error}"))];
            }
        };
        let took = seconds(started.elapsed().as_secs_f64());
        vec![
            reachable(Status::Pass, format!("its API answers in {took}")),
            self.nodes(&nodes, now),
            self.pods(&pods, now),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Answers in the shape that the API documents, cut to what is read.
    struct Answers(Value, Value);

    #[async_trait]
    impl KubernetesApi for Answers {
        async fn get(&self, path: &str) -> Result<Value, String> {
            match path {
                "/api/v1/nodes?limit=500" => Ok(self.0.clone()),
                "/api/v1/namespaces/odoo/pods?limit=500" => {
                    Ok(json!({ "kind": "PodList", "metadata": { "continue": "abc" }, "items": [self.1[0]] }))
                }
                "/api/v1/namespaces/odoo/pods?limit=500&continue=abc" => {
                    Ok(json!({ "kind": "PodList", "metadata": {}, "items": self.1.as_array().unwrap()[1..] }))
                }
                other => Err(format!("nobody asks for {other}")),
            }
        }
    }

    fn node(name: &str, ready: &str, pressure: &str) -> Value {
        json!({ "metadata": { "name": name }, "status": { "conditions": [
            { "type": "MemoryPressure", "status": pressure, "reason": "KubeletHasInsufficientMemory" },
            { "type": "Ready", "status": ready, "reason": "NodeStatusUnknown" },
        ] } })
    }

    fn pod(name: &str, status: Value) -> Value {
        json!({ "metadata": { "name": name, "creationTimestamp": "2026-11-27T07:00:00Z" }, "status": status })
    }

    async fn look(nodes: Vec<Value>, pods: Vec<Value>) -> Vec<Observation> {
        let probe = KubernetesProbe {
            name: "main".into(),
            namespace: "odoo".into(),
            api: Arc::new(Answers(json!({ "kind": "NodeList", "metadata": {}, "items": nodes }), json!(pods))),
            interval: Duration::from_secs(30),
        };
        let found = probe.look("2026-11-27T08:00:00Z".parse().unwrap()).await;
        assert_eq!(found.len(), 3);
        found
    }

    fn well(name: &str) -> Value {
        pod(
            name,
            json!({ "phase": "Running", "startTime": "2026-11-27T07:00:00Z",
                    "conditions": [{ "type": "Ready", "status": "True" }],
                    "containerStatuses": [{ "restartCount": 3, "state": { "running": {} }, "lastState": { "terminated":
                        { "reason": "Error", "exitCode": 1, "finishedAt": "2026-11-27T07:10:00Z" } } }] }),
        )
    }

    /// Answers that an API server has sent.
    struct Recorded(Option<u16>);

    #[async_trait]
    impl KubernetesApi for Recorded {
        async fn get(&self, path: &str) -> Result<Value, String> {
            if let Some(status) = self.0 {
                return Err(format!("it answers {status}"));
            }
            let body = match path {
                "/api/v1/nodes?limit=500" => include_str!("../../tests/recorded/kubernetes-nodes.json"),
                "/api/v1/namespaces/odoo/pods?limit=500" => include_str!("../../tests/recorded/kubernetes-pods.json"),
                other => return Err(format!("nobody asks for {other}")),
            };
            serde_json::from_str(body).map_err(|e| e.to_string())
        }
    }

    fn recorded(status: Option<u16>) -> KubernetesProbe {
        let (name, namespace, interval) = ("main".into(), "odoo".into(), Duration::from_secs(30));
        KubernetesProbe { name, namespace, api: Arc::new(Recorded(status)), interval }
    }

    /// "Kubernetes pods and nodes through an API trait (recorded real responses in tests)."
    #[tokio::test]
    async fn what_an_api_server_says_of_nodes_and_pods_is_understood() {
        let probe = recorded(None);
        let now: Timestamp = "2026-11-27T21:20:00Z".parse().unwrap();
        let nodes = probe.list("/api/v1/nodes").await.unwrap();
        let pods = probe.list("/api/v1/namespaces/odoo/pods").await.unwrap();
        // Each alone, so that it is seen what is said of it: the state of the whole is that of the worst.
        let said = |of: Observation| (of.status, of.text);
        let node = |name: &str| {
            let one: Vec<Value> = nodes.iter().filter(|node| name_of(node) == name).cloned().collect();
            assert_eq!(one.len(), 1, "{name}");
            said(probe.nodes(&one, now))
        };
        assert_eq!((nodes.len(), pods.len()), (7, 16));
        for well in ["control-1", "worker-1", "worker-5"] {
            assert_eq!(node(well).0, Status::Pass, "{well}: one that takes no new pods is well too");
        }
        for (name, status, words) in [
            ("worker-2", Status::Warn, "has MemoryPressure: KubeletHasInsufficientMemory"),
            ("worker-3", Status::Fail, "is not ready: NodeStatusUnknown"),
            ("worker-4", Status::Fail, "is not ready: KubeletNotReady"),
            ("worker-6", Status::Fail, "is not ready: NodeStatusNeverUpdated"),
        ] {
            let (found, text) = node(name);
            assert!(found == status && text.contains(words), "{name}: {found:?} {text}");
        }
        let pod = |name: &str, number: usize| {
            let some: Vec<Value> = pods.iter().filter(|pod| name_of(pod).starts_with(name)).cloned().collect();
            assert_eq!(some.len(), number, "{name}");
            said(probe.pods(&some, now))
        };
        // Of those that go nobody is told: `odoo-debug` has an hour to go, `odoo-shell` has failed and is held back.
        for well in ["odoo-debug", "odoo-shell", "odoo-migrate", "postgres-0", "odoo-web-c86fd99c7-c7g84"] {
            assert_eq!(pod(well, 1).0, Status::Pass, "{well}");
        }
        for (name, number, status, words) in [
            ("odoo-analytics", 1, Status::Fail, "is Pending for 10 min: Unschedulable, 0/7 nodes are available"),
            ("odoo-addons", 1, Status::Fail, "does not start: CrashLoopBackOff, 5 times restarted: back-off 2m40s"),
            ("odoo-backup", 1, Status::Warn, "has failed"),
            // The one on a node that is gone is being deleted, the other cannot be placed.
            ("odoo-cache", 2, Status::Fail, "Unschedulable"),
            ("odoo-cron", 1, Status::Warn, "was restarted: OOMKilled (137)"),
            ("odoo-longpoll", 1, Status::Fail, "is not ready for 8 min: Running, ContainersNotReady"),
            ("odoo-report", 1, Status::Fail, "does not start: ImagePullBackOff, 0 times restarted: Back-off pulling"),
            ("odoo-web-c86fd99c7-gtzc5", 1, Status::Warn, "has failed: Evicted"),
            ("odoo-worker", 1, Status::Fail, "does not start: CrashLoopBackOff, 7 times restarted: back-off 5m0s"),
        ] {
            let (found, text) = pod(name, number);
            assert!(found == status && text.contains(words), "{name}: {found:?} {text}");
        }
        let found = probe.look(now).await;
        assert_eq!(found.iter().map(|o| o.status).collect::<Vec<_>>(), [Status::Pass, Status::Fail, Status::Fail]);
        for status in [401, 403, 410] {
            let found = recorded(Some(status)).look(now).await;
            assert!(found.len() == 1 && found[0].status == Status::Fail && found[0].text.contains(&status.to_string()));
        }
    }

    /// Pages, and what is refused, over a socket, byte for byte as the server sent them.
    #[tokio::test]
    async fn pages_of_an_api_server_are_followed_to_the_end() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let first = include_str!("../../tests/recorded/kubernetes-pods-page1.json");
        let second = include_str!("../../tests/recorded/kubernetes-pods-page2.json");
        let token = serde_json::from_str::<Value>(first).unwrap()["metadata"]["continue"].as_str().unwrap().to_owned();
        let next = serde_json::from_str::<Value>(second).unwrap()["metadata"]["continue"].as_str().unwrap().to_owned();
        tokio::spawn(async move {
            loop {
                let (mut tcp, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 8_192];
                let read = tcp.read(&mut request).await.unwrap();
                let request = String::from_utf8_lossy(&request[..read]).into_owned();
                let asked = request.split(' ').nth(1).unwrap();
                let (status, body) = match asked {
                    "/api/v1/namespaces/odoo/pods?limit=500" => ("200 OK", first.to_owned()),
                    asked if asked.ends_with(&format!("&continue={token}")) => ("200 OK", second.to_owned()),
                    // The last page, cut from what the server would go on with.
                    asked if asked.ends_with(&format!("&continue={next}")) => (
                        "200 OK",
                        r#"{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[]}"#
                            .to_owned(),
                    ),
                    "/api/v1/nodes?limit=500" => {
                        ("403 Forbidden", include_str!("../../tests/recorded/kubernetes-forbidden.json").to_owned())
                    }
                    _ => (
                        "401 Unauthorized",
                        include_str!("../../tests/recorded/kubernetes-unauthorized.json").to_owned(),
                    ),
                };
                let length = body.len();
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
                );
                tcp.write_all((head + &body).as_bytes()).await.unwrap();
            }
        });
        let (name, namespace, interval) = ("main".into(), "odoo".into(), Duration::from_secs(30));
        let api = Arc::new(KubernetesServer::new(&url, None, None).unwrap());
        let probe = KubernetesProbe { name, namespace, api, interval };
        let pods = probe.list("/api/v1/namespaces/odoo/pods").await.unwrap();
        assert_eq!(pods.len(), 2);
        assert_ne!(name_of(&pods[0]), name_of(&pods[1]));
        let refused = probe.look("2026-11-27T21:20:00Z".parse().unwrap()).await;
        assert!(refused[0].status == Status::Fail && refused[0].text.contains("403"), "{refused:#?}");
    }

    /// Something else than an API server answers.
    struct Odd(Value);

    #[async_trait]
    impl KubernetesApi for Odd {
        async fn get(&self, _: &str) -> Result<Value, String> {
            Ok(self.0.clone())
        }
    }

    #[tokio::test]
    async fn what_is_no_list_is_no_answer() {
        for odd in [json!([]), json!("well"), json!({ "items": {} }), json!(null), json!({})] {
            let (name, namespace, interval) = ("main".into(), "odoo".into(), Duration::from_secs(30));
            let probe = KubernetesProbe { name, namespace, api: Arc::new(Odd(odd.clone())), interval };
            let found = probe.look("2026-11-27T08:00:00Z".parse().unwrap()).await;
            assert!(found.len() == 1 && found[0].status == Status::Fail, "{odd}: {found:#?}");
        }
    }

    #[tokio::test]
    async fn the_token_is_read_each_time_and_what_is_refused_is_said() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            loop {
                let (mut tcp, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 4_096];
                let read = tcp.read(&mut request).await.unwrap();
                let good =
                    String::from_utf8_lossy(&request[..read]).to_lowercase().contains("authorization: bearer new");
                let (status, body) = if good {
                    ("200 OK", r#"{"items":[],"metadata":{}}"#)
                } else {
                    ("401 Unauthorized", r#"{"kind":"Status","message":"Unauthorized"}"#)
                };
                let answer =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
                tcp.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let directory = tempfile::tempdir().unwrap();
        let token = directory.path().join("token");
        std::fs::write(&token, "old\n").unwrap();
        let server = KubernetesServer::new(&url, Some(token.clone()), None).unwrap();
        assert_eq!(server.get("/api/v1/nodes").await.unwrap_err(), "it answers 401: Unauthorized");
        std::fs::write(&token, "new\n").unwrap();
        assert!(server.get("/api/v1/nodes").await.unwrap()["items"].is_array());
    }

    #[tokio::test]
    async fn what_is_as_it_should_be_passes() {
        let done = pod("backup-1", json!({ "phase": "Succeeded" }));
        let mut going = well("web-2");
        going["metadata"]["deletionTimestamp"] = json!("2026-11-27T07:59:59Z");
        let young = pod("web-3", json!({ "phase": "Pending", "startTime": "2026-11-27T07:59:00Z" }));
        let found = look(vec![node("a", "True", "False")], vec![well("web-1"), done, going, young]).await;
        assert!(found.iter().all(|observation| observation.status == Status::Pass), "{found:#?}");
        assert_eq!(found[1].text, "all 1 nodes are ready");
    }

    #[tokio::test]
    async fn nodes_and_pods_that_are_not_well_are_told_the_worst_first() {
        let crashing = pod(
            "web-1",
            json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "False" }],
                    "containerStatuses": [{ "restartCount": 7, "state": { "waiting":
                        { "reason": "CrashLoopBackOff", "message": "back-off 5m0s" } } }] }),
        );
        let mut killed = well("web-2");
        killed["status"]["containerStatuses"][0]["lastState"]["terminated"] =
            json!({ "reason": "OOMKilled", "exitCode": 137, "finishedAt": "2026-11-27T07:58:00Z" });
        let pending = pod("web-3", json!({ "phase": "Pending" }));
        let nodes = vec![node("a", "True", "True"), node("b", "Unknown", "False")];
        let found = look(nodes, vec![crashing.clone(), killed.clone(), pending]).await;
        assert_eq!(found[1].status, Status::Fail);
        assert_eq!(found[1].text, "node b is not ready: NodeStatusUnknown; and 1 others are not well");
        assert_eq!(found[2].status, Status::Fail);
        let expected = "pod web-1 does not start: CrashLoopBackOff, 7 times restarted: back-off 5m0s; and 2 others";
        assert!(found[2].text.starts_with(expected), "{}", found[2].text);
        let found = look(vec![node("a", "True", "True")], vec![killed]).await;
        assert_eq!(found[1].text, "node a has MemoryPressure: KubeletHasInsufficientMemory");
        assert_eq!((found[1].status, found[2].status), (Status::Warn, Status::Warn));
        assert_eq!(found[2].text, "a container of pod web-2 was restarted: OOMKilled (137)");
        let late = pod(
            "web-4",
            json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "False", "reason":
                "ContainersNotReady", "lastTransitionTime": "2026-11-27T07:50:00Z" }] }),
        );
        let found = look(vec![], vec![late]).await;
        assert_eq!(found[2].text, "pod web-4 is not ready for 10 min: Running, ContainersNotReady");
    }
}
