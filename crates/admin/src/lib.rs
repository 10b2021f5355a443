//! The admin listener: `/livez`, `/readyz`, `/metrics` and the REST API under `/api/v1`.
//!
//! What it needs of the running gateway reaches it through [`GatewayView`]; it knows neither plane.
//!
//! | route | what |
//! |---|---|
//! | `GET /livez` | 200 while the process serves; open to everybody |
//! | `GET /readyz` | 200 when traffic is welcome, 503 while draining; open to everybody |
//! | `GET /metrics` | Prometheus text format |
//! | `GET /api/v1/status` | generation, last reload, its errors |
//! | `GET /api/v1/tenants`, `GET /api/v1/tenants/{slug}` | tenants with their live usage |
//! | `GET /api/v1/gates` | gates with their slots |
//! | `GET /`, `GET /api/v1/health`, `GET /api/v1/tenants/{slug}/health`, `GET /api/v1/services` | health, where somebody watches it |
//! | `POST /api/v1/reload` | reads the configuration again; 200, or 422 with every error |
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod health;
mod metrics;
mod view;

pub use health::{HealthView, IsolationRow, serve_health};
pub use view::{
    CertificateView, ClusterView, Fault, GateView, GatewayView, OdooServerView, PlaneUsage, ReloadFailed, ServerView,
    StatusView, TenantView, TotalsView,
};

use std::cmp::Ordering;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::json;
use subtle::ConstantTimeEq;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

type View = Arc<dyn GatewayView>;

/// Serves the admin listener until `stop`; requests in flight finish.
///
/// When the view has a token, everything but `/livez` and `/readyz` wants it as `Authorization: Bearer …`.
pub async fn serve(listener: TcpListener, view: Arc<dyn GatewayView>, stop: CancellationToken) -> io::Result<()> {
    axum::serve(listener, router(view)).with_graceful_shutdown(stop.cancelled_owned()).await
}

fn router(view: View) -> Router {
    let guarded = Router::new()
        .route("/", get(health::overview))
        .route("/api/v1/health", get(health::all))
        .route("/api/v1/tenants/{slug}/health", get(health::tenant))
        .route("/api/v1/services", get(health::services))
        .route("/metrics", get(prometheus))
        .route("/api/v1/status", get(status))
        .route("/api/v1/tenants", get(tenants))
        .route("/api/v1/tenants/{slug}", get(tenant))
        .route("/api/v1/gates", get(gates))
        .route("/api/v1/servers", get(servers))
        .route("/api/v1/certificates", get(certificates))
        .route("/api/v1/cache/purge", post(purge))
        .route("/api/v1/reload", post(reload))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&view), authorize));
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .merge(guarded)
        .fallback(|| async { problem(StatusCode::NOT_FOUND, "no such resource") })
        .with_state(view)
}

async fn authorize(State(view): State<View>, request: Request, next: Next) -> Response {
    authorize_by(State(Arc::new(view.token())), request, next).await
}

/// Lets in who has the token, if there is one: as a bearer, or as the password of a browser, whatever the name.
///
/// Browsers send what they know of a site also for pages of other sites, and a page may give its own name our address. So whatever
/// changes something must not come from another site's page; and without a token nothing is answered under a name.
pub(crate) async fn authorize_by(State(token): State<Arc<Option<String>>>, request: Request, next: Next) -> Response {
    match refusal(&request, token.as_deref()) {
        Some(refusal) => refusal,
        None => next.run(request).await,
    }
}

fn refusal(request: &Request, token: Option<&str>) -> Option<Response> {
    let text = |name: header::HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok());
    let host = text(header::HOST).unwrap_or_default();
    if token.is_none() && !host.is_empty() && !is_own_name(host) {
        let title = "without a token this is answered under `localhost` and addresses only";
        return Some(problem(StatusCode::FORBIDDEN, title));
    }
    let of_page = text(header::ORIGIN).and_then(|origin| origin.split_once("://")).map(|(_, authority)| authority);
    if !request.method().is_safe() && request.headers().contains_key(header::ORIGIN) && of_page != Some(host) {
        return Some(problem(StatusCode::FORBIDDEN, "this comes from a page of another site"));
    }
    let token = token?;
    let given = text(header::AUTHORIZATION).unwrap_or_default();
    let good = |given: &str| bool::from(given.as_bytes().ct_eq(token.as_bytes()));
    let by_browser = given.strip_prefix("Basic ").and_then(|text| STANDARD.decode(text).ok());
    let by_browser = by_browser.and_then(|text| String::from_utf8(text).ok());
    let password = by_browser.as_deref().and_then(|text| text.split_once(':')).map(|(_, password)| password);
    if given.strip_prefix("Bearer ").is_some_and(good) || password.is_some_and(good) {
        return None;
    }
    let mut refusal = problem(StatusCode::UNAUTHORIZED, "a bearer token is needed");
    let asks = if request.uri().path() == "/" { "Basic realm=\"health\"" } else { "Bearer" };
    refusal.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static(asks));
    Some(refusal)
}

/// Whether a Host is this machine whatever a name server says.
fn is_own_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    bare.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

async fn ready(State(view): State<View>) -> Response {
    if view.is_ready() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "draining\n").into_response()
    }
}

async fn prometheus(State(view): State<View>) -> Response {
    let mut text = metrics::render(&*view);
    if let Some(health) = view.health() {
        text.push_str(&health.metrics());
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn status(State(view): State<View>) -> Json<StatusView> {
    Json(view.status())
}

#[derive(Debug, Deserialize)]
struct Listing {
    /// `name`; `work`: those that have used most first; `now`: those with most running and waiting.
    #[serde(default)]
    sort: Option<String>,
    /// Only so many.
    limit: Option<usize>,
}

async fn tenants(State(view): State<View>, Query(listing): Query<Listing>) -> Response {
    let mut tenants = view.tenants();
    match listing.sort.as_deref() {
        None | Some("name") => {}
        Some("work") => tenants.sort_by(|a, b| b.work().total_cmp(&a.work())),
        Some("now") => {
            tenants.sort_by(|a, b| (b.now(), b.work()).partial_cmp(&(a.now(), a.work())).unwrap_or(Ordering::Equal));
        }
        Some(_) => return problem(StatusCode::BAD_REQUEST, "`sort` is `name`, `work` or `now`"),
    }
    tenants.truncate(listing.limit.unwrap_or(usize::MAX));
    Json(tenants).into_response()
}

async fn tenant(State(view): State<View>, Path(slug): Path<String>) -> Response {
    match view.tenant(&slug) {
        Some(tenant) => Json(tenant).into_response(),
        None => problem(StatusCode::NOT_FOUND, "no such tenant"),
    }
}

async fn gates(State(view): State<View>) -> Json<Vec<GateView>> {
    Json(view.gates())
}

async fn certificates(State(view): State<View>) -> Json<Vec<CertificateView>> {
    Json(view.certificates())
}

async fn servers(State(view): State<View>) -> Json<Vec<OdooServerView>> {
    Json(view.servers())
}

#[derive(Debug, Deserialize)]
struct Purge {
    /// The tenant; absent: all.
    tenant: Option<String>,
    /// What its paths begin with; absent: everything.
    path: Option<String>,
}

async fn purge(State(view): State<View>, Query(what): Query<Purge>) -> Response {
    if view.purge_cache(what.tenant.as_deref(), what.path.as_deref()) {
        StatusCode::NO_CONTENT.into_response()
    } else {
        problem(StatusCode::NOT_FOUND, "no such tenant")
    }
}

async fn reload(State(view): State<View>) -> Response {
    match view.reload().await {
        Ok(status) => Json(status).into_response(),
        Err(ReloadFailed { errors }) => {
            let body = json!({
                "title": "the configuration has errors; the running one is unchanged",
                "status": 422,
                "errors": errors,
            });
            (StatusCode::UNPROCESSABLE_ENTITY, Json(body)).into_response()
        }
    }
}

fn problem(status: StatusCode, title: &str) -> Response {
    (status, Json(json!({ "title": title, "status": status.as_u16() }))).into_response()
}
