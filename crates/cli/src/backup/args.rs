//! The command lines of `backup`, `restore` and `drill`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// The configuration of backups.
    #[arg(short, long, env = "COFFERDAM_BACKUP_CONFIG", default_value = "backup.yaml", global = true)]
    pub(crate) config: PathBuf,
    /// Print the result as JSON on standard output.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Draw no progress.
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

/// Save tenants, and look after what was saved.
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: BackupCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BackupCommand {
    /// Save tenants now.
    Now {
        /// Which; all when none is named.
        tenants: Vec<String>,
    },
    /// Save all tenants by their schedules until SIGTERM or Ctrl-C, and forget and free by their policies.
    Run {
        /// Only those that are due now, then end.
        #[arg(long)]
        once: bool,
        /// A file for Prometheus' textfile collector, written anew every few seconds.
        #[arg(long, value_name = "PATH")]
        textfile: Option<PathBuf>,
    },
    /// Every backup of a tenant, or the newest of all tenants.
    List {
        /// Whose.
        tenant: Option<String>,
    },
    /// Everything that is known of a backup.
    Show {
        /// Whose.
        tenant: String,
        /// Its id or the beginning of it; the newest complete one if left out.
        set: Option<String>,
    },
    /// Look whether everything is there that backups refer to.
    Verify {
        /// Whose; all when none is named.
        tenants: Vec<String>,
        /// Read every object and compare its content with its name.
        #[arg(long)]
        read_data: bool,
    },
    /// Forget backups: those that the policy lets go, or those that are named.
    Forget {
        /// Whose.
        tenant: String,
        /// Ids, in full or their beginnings.
        sets: Vec<String>,
        /// Do it; otherwise only say what would be done.
        #[arg(long)]
        yes: bool,
    },
    /// Free the room of what was forgotten.
    ///
    /// What is freed is first marked, and removed by a prune at least 23 hours later: a backup that runs meanwhile may
    /// still use it.
    Prune {
        /// Whose; all when none is named.
        tenants: Vec<String>,
    },
    /// Put a backup under a legal hold: nothing deletes it until it is released.
    Hold {
        /// Whose.
        tenant: String,
        /// Its id or the beginning of it.
        set: String,
        /// Why: a case number, say.
        #[arg(long)]
        reason: String,
        /// Who has asked for it.
        #[arg(long)]
        by: String,
    },
    /// Lift a legal hold.
    Release {
        /// Whose.
        tenant: String,
        /// Its id or the beginning of it.
        set: String,
    },
    /// Write a backup in Odoo's own zip format, for leaving.
    Export {
        /// Whose.
        tenant: String,
        /// The file to write.
        file: PathBuf,
        #[command(flatten)]
        point: Point,
    },
    /// Check the configuration and print every error in it.
    Check,
}

/// Bring a tenant's state back: beside, as a new tenant, or in place.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: RestoreCommand,
}

/// Which state.
#[derive(Debug, Args)]
pub(crate) struct Point {
    /// A backup's id or the beginning of it. Without this and --at: the newest complete one.
    #[arg(long, conflicts_with = "at")]
    pub(crate) set: Option<String>,
    /// The newest complete backup not after this time: RFC 3339 with an offset, such as 2026-11-27T08:00:00+01:00.
    #[arg(long, value_name = "TIME")]
    pub(crate) at: Option<jiff::Timestamp>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum RestoreCommand {
    /// Say what an in-place restore would do. Changes nothing.
    Plan {
        /// Whose.
        tenant: String,
        #[command(flatten)]
        point: Point,
    },
    /// Restore beside everything, neutralized, for looking at.
    Scratch {
        /// Whose.
        tenant: String,
        #[command(flatten)]
        point: Point,
    },
    /// Restore as a new tenant with a new identity, neutralized before anything can connect.
    New {
        /// Whose state.
        tenant: String,
        /// The new database, which is also the name of its filestore.
        database: String,
        /// `web.base.url` of the new tenant.
        #[arg(long)]
        base_url: Option<String>,
        /// Leave mail servers, jobs and integrations on.
        #[arg(long)]
        keep_integrations: bool,
        #[command(flatten)]
        point: Point,
    },
    /// Put a backup in the place of what is there, which is kept for `revert`.
    Swap {
        /// Whose.
        tenant: String,
        #[command(flatten)]
        point: Point,
        /// Do it without asking.
        #[arg(long)]
        yes: bool,
    },
    /// Bring the database back as it was at an instant, out of the shared server's physical backup and log.
    ///
    /// Neighbours are not touched: the server's files are restored beside everything, with this tenant's database alone,
    /// the log is replayed to the instant, and the database is looked through before it is loaded.
    Pitr {
        /// Whose.
        tenant: String,
        /// The instant: RFC 3339 with an offset. What was committed later is not in the result.
        #[arg(long, value_name = "TIME")]
        at: jiff::Timestamp,
        /// Put it in the place of what is there, which is kept for `revert`. Otherwise it comes beside, neutralized.
        #[arg(long)]
        swap: bool,
        /// Do it without asking.
        #[arg(long)]
        yes: bool,
    },
    /// Make a backup in Odoo's own zip format, from anywhere, the tenant's database and filestore.
    Import {
        /// Whose it becomes: a tenant in the configuration, with an `owner`, whose database is not there yet.
        tenant: String,
        /// The file.
        file: PathBuf,
        /// It is a copy: a new identity, neutralized. Otherwise it has moved here, and everything goes on.
        #[arg(long)]
        copy: bool,
        /// `web.base.url` of the copy.
        #[arg(long, requires = "copy")]
        base_url: Option<String>,
        /// Leave the copy's mail servers, jobs and integrations on.
        #[arg(long, requires = "copy")]
        keep_integrations: bool,
    },
    /// Put back what a swap has replaced.
    Revert {
        /// Whose.
        tenant: String,
        /// The database that the swap has left; the newest if left out.
        previous: Option<String>,
        /// Do it without asking.
        #[arg(long)]
        yes: bool,
    },
}

/// Try whether backups can be restored.
#[derive(Debug, Args)]
pub(crate) struct DrillArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: DrillCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DrillCommand {
    /// Restore into a private server, compare, measure, and write a signed report. Exit code 1 when a check fails.
    Run {
        /// Whose; all when none is named.
        tenants: Vec<String>,
    },
    /// Check the signature of a report and print it.
    Report {
        /// The report's JSON.
        file: PathBuf,
        /// The public key that must have signed it, in hexadecimal.
        #[arg(long)]
        public_key: Option<String>,
    },
}
