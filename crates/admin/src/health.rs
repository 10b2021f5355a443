//! Health as the admin surface shows it: `application/health+json`, services, and a page for people.

use std::io;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde::Serialize;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::view::TenantView;
use crate::{View, problem};

/// Whoever knows how everything is.
pub trait HealthView: Send + Sync + 'static {
    /// Everything, as `application/health+json`.
    fn health(&self) -> Value;
    /// One tenant, as `application/health+json`. None if there is no such tenant.
    fn tenant_health(&self, slug: &str) -> Option<Value>;
    /// Business services.
    fn services(&self) -> Value;
    /// Metrics in Prometheus' text format.
    fn metrics(&self) -> String;
    /// A page that needs nothing else, with the tenants' use of what they share where that is known.
    fn page(&self, isolation: &[IsolationRow]) -> String;
}

/// How a tenant fares among the others.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct IsolationRow {
    /// Its name.
    pub tenant: String,
    /// Work running on both planes.
    pub running: u32,
    /// Work waiting on both planes.
    pub waiting: u32,
    /// How long granted work has waited on average, in seconds.
    pub mean_wait: f64,
    /// All but one in a hundred of the last grants had waited for so many seconds at most; on the slower plane.
    pub p99_wait: f64,
    /// Work so far, in slot-seconds.
    pub work: f64,
    /// Work turned away so far.
    pub rejected: u64,
    /// What holds it back, in words.
    pub warnings: Vec<String>,
}

impl IsolationRow {
    fn of(tenant: &TenantView) -> Self {
        let mut row = Self { tenant: tenant.tenant.clone(), warnings: tenant.warnings.clone(), ..Self::default() };
        let (mut waited, mut granted) = (0.0, 0);
        for usage in [&tenant.http, &tenant.postgres].into_iter().flatten() {
            row.running += usage.running + usage.nested;
            row.waiting += usage.waiting;
            row.work += usage.slot_seconds;
            row.rejected += usage.rejected;
            waited += usage.wait_seconds;
            row.p99_wait = row.p99_wait.max(usage.wait_p99_seconds);
            granted += usage.granted;
        }
        if granted > 0 {
            row.mean_wait = waited / granted as f64;
        }
        row
    }
}

/// Serves health alone, until `stop`: for whoever watches beside a gateway.
///
/// With a token, everything wants it, as a bearer or as the password of a browser.
pub async fn serve_health(
    listener: TcpListener,
    health: Arc<dyn HealthView>,
    token: Option<String>,
    stop: CancellationToken,
) -> io::Result<()> {
    let guard = axum::middleware::from_fn_with_state(Arc::new(token), crate::authorize_by);
    let router = Router::new()
        .route("/", get(|State(health): State<Arc<dyn HealthView>>| async move { page(&*health, &[]) }))
        .route("/metrics", get(|State(health): State<Arc<dyn HealthView>>| async move { text(health.metrics()) }))
        .route(
            "/api/v1/health",
            get(|State(health): State<Arc<dyn HealthView>>| async move { health_json(health.health()) }),
        )
        .route(
            "/api/v1/services",
            get(|State(health): State<Arc<dyn HealthView>>| async move { Json(health.services()) }),
        )
        .route(
            "/api/v1/tenants/{slug}/health",
            get(|State(health): State<Arc<dyn HealthView>>, Path(slug): Path<String>| async move {
                of_tenant(&*health, &slug)
            }),
        )
        .route_layer(guard)
        .fallback(|| async { problem(StatusCode::NOT_FOUND, "no such resource") })
        .with_state(health);
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

pub(crate) async fn overview(State(view): State<View>) -> Response {
    let Some(health) = view.health() else { return nobody() };
    let rows: Vec<IsolationRow> = view.tenants().iter().map(IsolationRow::of).collect();
    page(&*health, &rows)
}

pub(crate) async fn all(State(view): State<View>) -> Response {
    view.health().map_or_else(nobody, |health| health_json(health.health()))
}

pub(crate) async fn tenant(State(view): State<View>, Path(slug): Path<String>) -> Response {
    view.health().map_or_else(nobody, |health| of_tenant(&*health, &slug))
}

pub(crate) async fn services(State(view): State<View>) -> Response {
    view.health().map_or_else(nobody, |health| Json(health.services()).into_response())
}

fn nobody() -> Response {
    problem(StatusCode::NOT_FOUND, "nobody watches health here; see `cofferdam serve --health`")
}

fn of_tenant(health: &dyn HealthView, slug: &str) -> Response {
    health.tenant_health(slug).map_or_else(|| problem(StatusCode::NOT_FOUND, "no such tenant"), health_json)
}

/// The draft wants a status that says the same as the body: 503 for what fails.
fn health_json(value: Value) -> Response {
    let failed = value.get("status").and_then(Value::as_str) == Some("fail");
    let status = if failed { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (status, [(header::CONTENT_TYPE, "application/health+json")], value.to_string()).into_response()
}

fn text(text: String) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

fn page(health: &dyn HealthView, rows: &[IsolationRow]) -> Response {
    let mut answer = ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], health.page(rows)).into_response();
    let headers = answer.headers_mut();
    // What tenants have named themselves is in it: nothing but what is written here runs.
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                  frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}
