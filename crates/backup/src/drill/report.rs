//! Reports of drills that can be shown to somebody who does not trust their author: signed, and readable.

use ed25519_dalek::{Signature, Signer, SigningKey, Verifier, VerifyingKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::Error;
use crate::model::{CheckState, DrillReport};

/// The key that signs reports.
pub struct ReportKey(SigningKey);

impl std::fmt::Debug for ReportKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReportKey({})", self.public())
    }
}

/// A report and who vouches for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedReport {
    /// The report.
    pub report: DrillReport,
    /// Who has signed it, if anybody.
    pub signature: Option<ReportSignature>,
}

/// An Ed25519 signature of the report's JSON, written without spaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportSignature {
    /// The public key, in hexadecimal.
    pub public_key: String,
    /// The signature, in hexadecimal.
    pub ed25519: String,
}

impl ReportKey {
    /// A key from 32 bytes in hexadecimal.
    pub fn from_hex(text: &str) -> Result<Self, Error> {
        let mut bytes = Zeroizing::new([0_u8; 32]);
        hex::decode_to_slice(text.trim(), bytes.as_mut_slice())
            .map_err(|_| Error::Refused("the signing key is not 64 hexadecimal digits".to_owned()))?;
        Ok(Self(SigningKey::from_bytes(&bytes)))
    }

    /// The public key, in hexadecimal: what whoever checks reports must know.
    pub fn public(&self) -> String {
        hex::encode(self.0.verifying_key().to_bytes())
    }
}

impl SignedReport {
    /// Signs a report, where there is a key.
    pub fn new(report: DrillReport, key: Option<&ReportKey>) -> Self {
        let signature = key.map(|key| ReportSignature {
            public_key: key.public(),
            ed25519: hex::encode(key.0.sign(&signed_bytes(&report)).to_bytes()),
        });
        Self { report, signature }
    }

    /// Whether the report is as the owner of a public key has signed it.
    pub fn is_signed_by(&self, public_key: &str) -> bool {
        let Some(signature) = self.signature.as_ref().filter(|s| s.public_key == public_key) else { return false };
        let (mut key, mut bytes) = ([0; 32], [0; 64]);
        hex::decode_to_slice(public_key, &mut key).is_ok()
            && hex::decode_to_slice(&signature.ed25519, &mut bytes).is_ok()
            && VerifyingKey::from_bytes(&key)
                .is_ok_and(|key| key.verify(&signed_bytes(&self.report), &Signature::from_bytes(&bytes)).is_ok())
    }

    /// A page that needs nothing else.
    pub fn html(&self) -> String {
        let report = &self.report;
        let verdict = if report.passed { "passed" } else { "FAILED" };
        let mut rows = String::new();
        for check in &report.checks {
            let (class, word) = match check.state {
                CheckState::Pass => ("pass", "✓ pass"),
                CheckState::Fail => ("fail", "✗ fail"),
                CheckState::Skipped => ("skip", "– skipped"),
            };
            rows.push_str(&format!(
                "<tr class={class}><td>{word}</td><td>{}</td><td>{}</td></tr>\n",
                escaped(&check.name),
                escaped(&check.detail)
            ));
        }
        let signature = self.signature.as_ref().map_or_else(
            || "This report is not signed.".to_owned(),
            |s| format!("Signed with Ed25519 by <code>{}</code>: <code>{}</code>", s.public_key, s.ed25519),
        );
        format!(
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
             <title>Drill of {tenant}: {verdict}</title><style>{STYLE}</style>\
             <h1>Restore drill of {tenant}: <span class={class}>{verdict}</span></h1>\
             <dl><dt>Begun</dt><dd>{started}</dd><dt>Backup</dt><dd><code>{set}</code></dd>\
             <dt>Recovery time</dt><dd>{rto} (objective {rto_wanted})</dd>\
             <dt>Recovery point</dt><dd>{rpo} (objective {rpo_wanted})</dd></dl>\
             <table><thead><tr><th>Result</th><th>Check</th><th>Evidence</th></tr></thead><tbody>{rows}</tbody></table>\
             <p class=signature>{signature}</p></html>\n",
            tenant = escaped(report.tenant.as_str()),
            class = if report.passed { "pass" } else { "fail" },
            started = report.started_at,
            set = escaped(&report.set.0),
            rto = seconds(report.rto_ms),
            rto_wanted = report.objective.rto,
            rpo = seconds(report.rpo_ms),
            rpo_wanted = report.objective.rpo,
        )
    }
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}\
h1{font-size:1.5rem}dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1rem}dt{color:#57606a}dd{margin:0;\
overflow-wrap:anywhere}table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.4rem .8rem .4rem 0;\
border-bottom:1px solid #d0d7de;vertical-align:top;overflow-wrap:anywhere}td:first-child{white-space:nowrap}\
.pass td:first-child,span.pass{color:#116329}.fail td:first-child,span.fail{color:#a40e26;font-weight:700}\
.skip td:first-child{color:#57606a}.signature{color:#57606a;font-size:.8rem;overflow-wrap:anywhere}";

fn signed_bytes(report: &DrillReport) -> Vec<u8> {
    // A struct of texts and numbers always serializes.
    serde_json::to_vec(report).unwrap_or_default()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn seconds(milliseconds: u64) -> String {
    match milliseconds / 1_000 {
        0..=119 => format!("{:.1} s", milliseconds as f64 / 1_000.0),
        s @ 120..=7_199 => format!("{} min {} s", s / 60, s % 60),
        s => format!("{} h {} min", s / 3_600, s % 3_600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{CheckOutcome, RecoveryObjective, SetId};

    fn report() -> DrillReport {
        DrillReport {
            tenant: cofferdam_tenant::Slug::parse("acme").unwrap(),
            set: SetId("ab".repeat(32)),
            started_at: "2026-11-27T08:00:00Z".parse().unwrap(),
            passed: true,
            objective: RecoveryObjective::default(),
            rto_ms: 95_300,
            rpo_ms: 7_260_000,
            checks: vec![CheckOutcome {
                name: "rows".into(),
                state: CheckState::Pass,
                detail: "<script>alert(1)</script>".into(),
            }],
        }
    }

    #[test]
    fn a_changed_report_is_not_signed_any_more() {
        let key = ReportKey::from_hex(&"07".repeat(32)).unwrap();
        let mut signed = SignedReport::new(report(), Some(&key));
        let again: SignedReport = serde_json::from_str(&serde_json::to_string_pretty(&signed).unwrap()).unwrap();
        assert!(again.is_signed_by(&key.public()));
        assert!(!again.is_signed_by(&ReportKey::from_hex(&"08".repeat(32)).unwrap().public()));
        signed.report.rto_ms = 1;
        assert!(!signed.is_signed_by(&key.public()));
        assert!(!SignedReport::new(report(), None).is_signed_by(&key.public()));
        assert!(ReportKey::from_hex("07").is_err());
    }

    #[test]
    fn the_page_shows_evidence_and_runs_none_of_it() {
        let page = SignedReport::new(report(), None).html();
        assert!(page.contains("&lt;script&gt;") && !page.contains("<script>"));
        assert!(page.contains("95.3 s") && page.contains("2 h 1 min") && page.contains("✓ pass"));
    }
}
