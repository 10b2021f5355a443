//! MD5 passwords, for old drivers.

use md5::{Digest, Md5};
use subtle::ConstantTimeEq;

/// What PostgreSQL stores of an MD5 password.
pub fn md5_stored(role: &str, password: &str) -> String {
    hex(&Md5::new().chain_update(password).chain_update(role).finalize())
}

/// What a client answers to AuthenticationMD5Password, from what PostgreSQL stores.
pub fn md5_response(stored: &str, salt: [u8; 4]) -> String {
    let hash = stored.strip_prefix("md5").unwrap_or(stored);
    hex(&Md5::new().chain_update(hash).chain_update(salt).finalize())
}

/// Whether a client's answer is right. Compared in constant time.
pub fn md5_matches(answer: &[u8], expected: &str) -> bool {
    expected.as_bytes().ct_eq(answer).into()
}

fn hex(digest: &[u8]) -> String {
    digest.iter().fold(String::from("md5"), |mut text, byte| {
        let _ = std::fmt::Write::write_fmt(&mut text, format_args!("{byte:02x}"));
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_independent_implementation_answers_the_same() {
        let theirs = postgres_protocol::authentication::md5_hash(b"odoo", b"geheim", [1, 2, 3, 4]);
        assert_eq!(md5_response(&md5_stored("odoo", "geheim"), [1, 2, 3, 4]), theirs);
    }
}
