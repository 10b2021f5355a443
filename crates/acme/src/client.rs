//! How an authority is reached.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use http_body_util::BodyExt;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};

use crate::AcmeError;

/// How long one request to an authority may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The largest answer that is read.
const LARGEST: usize = 1 << 20;

/// Requests to an authority.
pub(crate) struct Client(reqwest::Client);

impl Client {
    pub(crate) fn new(authorities: Option<&str>) -> Result<Self, AcmeError> {
        let tls = cofferdam_tls::towards_those(authorities).map_err(|e| AcmeError::Client(e.to_string()))?;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .https_only(true)
            .redirect(reqwest::redirect::Policy::none())
            .timeout(PATIENCE)
            .build();
        client.map(Self).map_err(|e| AcmeError::Client(e.to_string()))
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>>;

impl HttpClient for Client {
    fn request(&self, request: http::Request<BodyWrapper<bytes::Bytes>>) -> Answer {
        let client = self.0.clone();
        Box::pin(async move {
            let other = |error: reqwest::Error| Error::Other(Box::new(error.without_url()));
            let (head, body) = request.into_parts();
            let body = match body.collect().await {
                Ok(body) => body.to_bytes(),
                Err(never) => match never {},
            };
            let request = http::Request::from_parts(head, body);
            let mut answer = client.execute(request.try_into().map_err(other)?).await.map_err(other)?;
            // A page of a proxy in between, most likely: no problem of the authority's.
            let kind = answer.headers().get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
            if answer.status().is_server_error() && !kind.is_some_and(|kind| kind.contains("json")) {
                return Err(Error::Other(format!("the authority answers {}", answer.status()).into()));
            }
            let mut parts = http::Response::new(()).into_parts().0;
            parts.status = answer.status();
            parts.headers = std::mem::take(answer.headers_mut());
            let mut whole = Vec::new();
            while let Some(part) = answer.chunk().await.map_err(other)? {
                if whole.len() + part.len() > LARGEST {
                    return Err(Error::Str("the authority's answer is too long"));
                }
                whole.extend_from_slice(&part);
            }
            Ok(BytesResponse { parts, body: Box::new(bytes::Bytes::from(whole)) })
        })
    }
}
