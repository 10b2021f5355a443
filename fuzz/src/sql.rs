//! Reading what a statement does to the session, and what kind of work a path is.

/// Panics when something is wrong.
pub fn run(data: &[u8]) {
    let _ = cofferdam_postgres::sql::effect(data);
    let _ = cofferdam_postgres::sql::listen(data);
    let _ = cofferdam_postgres::sql::setting(data);
    let _ = cofferdam_postgres::sql::begins_read_only(data);
    let _ = cofferdam_postgres::sql::database_commands(data);
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = cofferdam_http::route(text);
    }
}
