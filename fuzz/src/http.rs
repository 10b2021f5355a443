//! The frame of HTTP requests, and the database that one names.

use cofferdam_http::boundary::{Carrier, carrier, check_body, check_query};
use cofferdam_http::framing::{Chunks, check_head, head_end};

/// Panics when something is wrong.
pub fn run(data: &[u8]) {
    if let Ok(Some(end)) = head_end(data, 0) {
        // What has an end has been looked at for bare line feeds already.
        let _ = check_head(&data[..end]);
    }
    let mut whole = Chunks::default();
    let at_once = whole.push(data);
    let mut cut = Chunks::default();
    let one_by_one = data.iter().try_fold(0, |n, byte| cut.push(&[*byte]).map(|taken| n + taken));
    assert_eq!(at_once, one_by_one);

    let own = Some("acme_db");
    for carrier in [Carrier::JsonRpc, Carrier::XmlRpc, Carrier::Login, Carrier::Form] {
        let _ = check_body(carrier, "/web/login", Some("application/x-www-form-urlencoded"), data, own);
    }
    let _ = check_query("/auth_oauth/signin", data, own);
    if let Ok(path) = std::str::from_utf8(data) {
        let _ = carrier(path);
    }
}
