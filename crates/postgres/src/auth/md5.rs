//! MD5 passwords, for old drivers.

use subtle::ConstantTimeEq;

/// What a client answers to AuthenticationMD5Password.
pub fn md5_response(user: &str, password: &str, salt: [u8; 4]) -> String {
    postgres_protocol::authentication::md5_hash(user.as_bytes(), password.as_bytes(), salt)
}

/// Whether a client's answer is right. Compared in constant time.
pub fn md5_matches(answer: &[u8], user: &str, password: &str, salt: [u8; 4]) -> bool {
    md5_response(user, password, salt).as_bytes().ct_eq(answer).into()
}
