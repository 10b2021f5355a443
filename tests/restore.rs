//! Restores against a real PostgreSQL: as a copy, in place, to a point in time, from elsewhere; and what a tenant may try.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cofferdam_backup::interchange::{Identity, Import, export};
use cofferdam_backup::logical::Backup;
use cofferdam_backup::model::{BackupPolicy, Consistency, DumpFormat, Parallel, RestoreMode, RestorePoint, SetId};
use cofferdam_backup::physical::{BackupKind, PgBackRest, PhysicalEngine, Recovery};
use cofferdam_backup::repository::{Directory, RepositoryKey};
use cofferdam_backup::restore::{GatewayConsole, Restore};
use cofferdam_backup::{Control, Error, Event, Server};
use cofferdam_tenant::{ByteSize, Secret, Slug};
use cofferdam_testkit::odoo::Estate;
use cofferdam_testkit::postgres::{Cluster, ClusterOptions, SUPERUSER, binaries};
use cofferdam_tests::house::{House, KEY, blocking, runtime};
use cofferdam_tests::{Site, SiteOptions};

#[test]
fn a_new_tenant_has_its_own_name_and_address_and_is_refused_where_one_is() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(3, 0).await;
        house.save().await;
        let mode = |database: &str| RestoreMode::NewTenant {
            database: database.into(),
            base_url: Some("https://beta.example.com".into()),
            keep_integrations: false,
        };
        house.cluster.create_role("beta_owner", "secret").await.unwrap();
        let restore = Restore { owner: Some("beta_owner".into()), ..house.restore() };
        let restored = restore.run(&RestorePoint::Latest, &mode("beta"), &Control::default()).await.unwrap();
        assert_eq!(restored.database, "beta");
        let admin = house.cluster.admin("beta").await.unwrap();
        let url: String = admin
            .query_one("SELECT value FROM ir_config_parameter WHERE key = 'web.base.url'", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(url, "https://beta.example.com");
        // Everything is its owner's, who can use it.
        let owner = house.cluster.connect("beta_owner", "secret", "beta").await.unwrap();
        owner.batch_execute("UPDATE res_partner SET name = name; CREATE TABLE more (id int)").await.unwrap();

        let error = restore.run(&RestorePoint::Latest, &mode("beta"), &Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("database beta is there already; nothing was changed"), "{error}");
        let error = restore.run(&RestorePoint::Latest, &mode("../beta"), &Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("cannot be the name of a database"), "{error}");
        let missing = RestorePoint::Set { id: SetId("ffff".into()) };
        let error = restore.run(&missing, &mode("gamma"), &Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("acme has no backup `ffff`"), "{error}");
    });
}

#[test]
fn a_swap_brings_the_old_state_back_and_a_revert_the_new_one() {
    runtime().block_on(async {
        let house = House::new(10).await;
        // As careful people do.
        house.owner().await.batch_execute("REVOKE ALL ON SCHEMA public FROM PUBLIC").await.unwrap();
        house.attach(5, 0).await;
        house.save().await;
        let client = house.estate.connect().await.unwrap();
        client.batch_execute("UPDATE res_partner SET name = 'broken'").await.unwrap();
        let late = house.estate.attach(&client, b"made after the backup").await.unwrap();
        let seen: i64 = client.query_one("SELECT last_value FROM base_registry_signaling", &[]).await.unwrap().get(0);
        drop(client);

        let restore = house.restore();
        let swapped = restore.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap();
        let name = "SELECT name FROM res_partner ORDER BY id LIMIT 1";
        let client = house.estate.connect().await.unwrap();
        assert_eq!(client.query_one(name, &[]).await.unwrap().get::<_, String>(0), "Partner 1");
        let now: i64 = client.query_one("SELECT last_value FROM base_registry_signaling", &[]).await.unwrap().get(0);
        assert!(now > seen, "workers notice that what they have cached is not true any more: {seen} {now}");
        drop(client);
        assert_eq!(house.estate.missing(&house.estate.filestore).await.unwrap(), Vec::<String>::new());
        let previous = swapped.previous.unwrap();
        // Nobody connects to what was replaced, not even cron workers that visit every database.
        house.cluster.admin(&previous).await.unwrap_err();

        // The collector takes what only the old state refers to.
        std::fs::remove_file(house.estate.filestore.join(&late)).unwrap();
        let error = restore.revert("acme__before_19700101t000000", &Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("is not a database that a swap of acme has left"), "{error}");
        restore.revert(&previous, &Control::default()).await.unwrap();
        let client = house.estate.connect().await.unwrap();
        assert_eq!(client.query_one(name, &[]).await.unwrap().get::<_, String>(0), "broken");
        assert_eq!(house.estate.missing(&house.estate.filestore).await.unwrap(), Vec::<String>::new());

        let left = restore.previous().await.unwrap();
        assert_eq!(left.len(), 1);
        let later = left[0].since + jiff::SignedDuration::from_hours(24 * 8);
        let week = Duration::from_secs(7 * 86_400);
        assert_eq!(restore.drop_previous(week, left[0].since).await.unwrap(), []);
        assert_eq!(restore.drop_previous(week, later).await.unwrap(), left);
        assert_eq!(house.databases().await, ["acme"]);
    });
}

/// What a tenant has put into its database comes along with it: triggers, checks, indexed expressions. Whoever loads
/// them must be nobody.
#[test]
fn what_a_tenant_has_written_runs_as_nobody_but_its_owner() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(2, 0).await;
        let owner = house.cluster.connect("acme_owner", "odoo", "acme").await.unwrap();
        owner
            .batch_execute(
                r"CREATE SEQUENCE ran; CREATE SEQUENCE ran_as_superuser;
                CREATE FUNCTION intrude() RETURNS boolean LANGUAGE plpgsql AS $$
                DECLARE attempt text;
                BEGIN
                  PERFORM nextval('public.ran');
                  FOREACH attempt IN ARRAY ARRAY['RESET ROLE', 'RESET SESSION AUTHORIZATION', 'SET ROLE postgres',
                      'CREATE ROLE intruder SUPERUSER LOGIN', 'ALTER ROLE acme_owner SUPERUSER'] LOOP
                    BEGIN EXECUTE attempt; EXCEPTION WHEN OTHERS THEN NULL; END;
                  END LOOP;
                  IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
                    PERFORM nextval('public.ran_as_superuser');
                  END IF;
                  RETURN true;
                END $$;
                CREATE FUNCTION intrude_too() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN PERFORM public.intrude(); RETURN coalesce(NEW, OLD); END $$;
                CREATE FUNCTION harmless(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
                BEGIN PERFORM public.intrude(); RETURN $1; END $$;
                CREATE SEQUENCE has_tried; CREATE SEQUENCE has_a_password;
                CREATE FUNCTION give_a_password() RETURNS boolean LANGUAGE plpgsql AS $$
                DECLARE was text := current_user;
                BEGIN
                  IF session_user LIKE 'cofferdam%' THEN
                    PERFORM nextval('public.has_tried'), set_config('lock_timeout', '300ms', true);
                    BEGIN
                      SET ROLE NONE;
                      EXECUTE format('ALTER ROLE %I PASSWORD ''known''', session_user);
                      PERFORM nextval('public.has_a_password');
                    EXCEPTION WHEN OTHERS THEN NULL; END;
                    EXECUTE format('SET ROLE %I', was);
                  END IF;
                  RETURN true;
                END $$;
                CREATE TABLE trap (id int CHECK (public.intrude()), CHECK (public.give_a_password()));
                INSERT INTO trap VALUES (1);
                CREATE INDEX ON trap (harmless(id));
                CREATE TRIGGER trap BEFORE INSERT OR UPDATE OR DELETE ON ir_config_parameter
                    FOR EACH ROW EXECUTE FUNCTION intrude_too();
                ALTER TABLE ir_config_parameter ENABLE ALWAYS TRIGGER trap",
            )
            .await
            .unwrap();
        let set = house.save().await;
        let swapped =
            house.restore().run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap();
        let scratch = house.scratch(&set).await;
        for database in [&swapped.database, &scratch.database] {
            let client = house.cluster.admin(database).await.unwrap();
            let query = "SELECT (SELECT is_called FROM ran), (SELECT is_called FROM ran_as_superuser)";
            let row = client.query_one(query, &[]).await.unwrap();
            assert!(row.get::<_, bool>(0), "it did run in {database}");
            assert!(!row.get::<_, bool>(1), "and found a superuser to be in {database}");
            let query = "SELECT (SELECT is_called FROM has_tried), (SELECT is_called FROM has_a_password)";
            let row = client.query_one(query, &[]).await.unwrap();
            assert_eq!(
                (row.get(0), row.get(1)),
                (true, false),
                "whoever loads has a password that nobody knows: {database}"
            );
        }
        assert!(house.intruders().await.is_empty(), "nobody has become anything");

        // Whoever would own what is restored must be a role of the tenant's.
        let admin = house.cluster.admin("postgres").await.unwrap();
        let roles = "CREATE ROLE boss SUPERUSER; CREATE ROLE of_boss; GRANT boss TO of_boss; \
                     CREATE ROLE ends_others; GRANT pg_signal_backend TO ends_others";
        admin.batch_execute(roles).await.unwrap();
        for (owner, expected) in [
            (SUPERUSER.0, "who may do more than own databases"),
            ("of_boss", "who may do more than own databases"),
            ("ends_others", "who may do more than own databases"),
            ("nobody_here", "there is no role"),
        ] {
            let restore = Restore { owner: Some(owner.into()), ..house.restore() };
            let error =
                restore.run(&RestorePoint::Latest, &RestoreMode::Scratch, &Control::default()).await.unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        // Reading a table must not run anything either: what only looks like one is refused.
        owner
            .batch_execute(
                "DROP TABLE trap; ALTER TABLE ir_attachment RENAME TO hidden;
                 CREATE VIEW ir_attachment AS SELECT h.* FROM hidden h WHERE intrude()",
            )
            .await
            .unwrap_err();
        let owner = house.cluster.connect("acme_owner", "odoo", "acme").await.unwrap();
        owner
            .batch_execute(
                "ALTER TABLE ir_attachment RENAME TO hidden;
                 CREATE VIEW ir_attachment AS SELECT h.* FROM hidden h WHERE intrude();
                 SELECT setval('ran_as_superuser', 1, false)",
            )
            .await
            .unwrap();
        let error = house.backup().run(&Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("ir_attachment is not Odoo's table"), "{error}");
        let query = "SELECT is_called FROM ran_as_superuser";
        assert!(!owner.query_one(query, &[]).await.unwrap().get::<_, bool>(0), "the view was not looked into");
    });
}

/// Planning a statement evaluates what stands in a table's indexes: tables are read without planning anything.
#[test]
fn saving_and_restoring_evaluate_nothing_that_stands_in_indexes_or_statistics() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.attach(3, 0).await;
        house
            .owner()
            .await
            .batch_execute(
                r"CREATE FUNCTION evil(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
                    IF current_user <> 'acme_owner' THEN RAISE EXCEPTION 'evaluated as %', current_user; END IF;
                    RETURN true;
                  END $$;
                  CREATE INDEX ON ir_attachment (id) WHERE evil(1);
                  CREATE INDEX ON res_partner ((evil(2)));
                  CREATE INDEX ON ir_config_parameter ((evil(3) AND id > 0));
                  CREATE STATISTICS odd ON (evil(4)), (id > 3) FROM res_partner;
                  CREATE TABLE spatial (srid int); INSERT INTO spatial VALUES (7)",
            )
            .await
            .unwrap();
        // As PostGIS does: a table of an extension's of which some rows are to be saved, which `pg_dump` selects. It is the
        // tenant's, and has an index like the others.
        house.cluster.admin("acme").await.unwrap().batch_execute(
            "CREATE EXTENSION pg_trgm; ALTER EXTENSION pg_trgm ADD TABLE spatial;
             UPDATE pg_extension SET extconfig = ARRAY['spatial'::regclass::oid], extcondition = ARRAY['WHERE srid > 5'] \
             WHERE extname = 'pg_trgm'").await.unwrap();
        house.owner().await.batch_execute("CREATE INDEX ON spatial ((evil(5)))").await.unwrap();
        let set = house.save().await;
        assert_eq!((set.consistency, set.filestore.files), (Consistency::Fenced, 3));
        assert!(set.note.as_ref().is_some_and(|note| note.contains("rows of 1 tables") && note.contains("public.spatial")), "{:?}", set.note);
        assert!(set.artifact.rows > 10 && set.artifact.uuid.is_some());
        // It would have been evaluated: a plan is made, and the reader is somebody else.
        let admin = house.cluster.admin("acme").await.unwrap();
        let error = admin.query("SELECT count(*) FROM ir_attachment WHERE id = 1", &[]).await.unwrap_err();
        assert!(error.as_db_error().unwrap().message().contains("evaluated as"), "{error}");
        let (point, control) = (RestorePoint::Latest, Control::default());
        let swapped = house.restore().run(&point, &RestoreMode::InPlaceSwap, &control).await.unwrap();
        house.restore().revert(&swapped.previous.unwrap(), &control).await.unwrap();
        assert!(house.intruders().await.is_empty());
    });
}

#[test]
fn a_way_back_leads_neither_to_other_rights_nor_to_other_files() {
    runtime().block_on(async {
        let house = House::new(3).await;
        house.attach(2, 0).await;
        house.save().await;
        // A search path that makes an operator of the tenant's out of `=`, for whoever connects.
        let evil = r"CREATE SCHEMA evil;
            CREATE FUNCTION evil.eq(name, name) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN
              EXECUTE 'ALTER ROLE acme_owner SUPERUSER'; RETURN false; EXCEPTION WHEN OTHERS THEN RETURN false; END $$;
            CREATE OPERATOR evil.= (LEFTARG = name, RIGHTARG = name, FUNCTION = evil.eq);
            ALTER DATABASE acme SET search_path = evil, pg_catalog, public";
        house.owner().await.batch_execute(evil).await.unwrap();
        // And a link to a neighbour's files, where restored ones go.
        let neighbour = house.directory.path().join("filestore/neighbour");
        std::fs::create_dir_all(&neighbour).unwrap();
        let mine = &house.estate.filestore;
        std::fs::create_dir_all(mine.join("zz")).unwrap();
        std::fs::write(mine.join("zz/evil"), b"evil").unwrap();
        let (restore, control) = (house.restore(), Control::default());
        let swapped = restore.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &control).await.unwrap();
        let previous = swapped.previous.unwrap();
        std::fs::remove_dir_all(mine.join("zz")).unwrap();
        std::os::unix::fs::symlink(&neighbour, mine.join("zz")).unwrap();
        let error = restore.revert(&previous, &control).await.unwrap_err().to_string();
        assert!(error.contains("nothing is reached through one"), "{error}");
        assert_eq!(std::fs::read_dir(&neighbour).unwrap().count(), 0);
        std::fs::remove_file(mine.join("zz")).unwrap();
        restore.revert(&previous, &control).await.unwrap();
        assert!(house.intruders().await.is_empty());
        assert_eq!(std::fs::read(mine.join("zz/evil")).unwrap(), b"evil");
    });
}

#[test]
fn a_way_back_that_was_interrupted_is_gone_again_by_nobody_who_may_more() {
    runtime().block_on(async {
        let house = House::new(3).await;
        house.save().await;
        let evil = r"CREATE TABLE public.orm_signaling_registry (id serial PRIMARY KEY, d timestamp DEFAULT now());
            CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
              BEGIN EXECUTE 'ALTER ROLE acme_owner SUPERUSER'; EXCEPTION WHEN OTHERS THEN NULL; END;
              PERFORM pg_sleep(600) WHERE (SELECT count(*) FROM public.orm_signaling_registry) = 0;
              RETURN NEW; END $$;
            CREATE TRIGGER t BEFORE INSERT ON public.orm_signaling_registry FOR EACH ROW EXECUTE FUNCTION public.f()";
        house.owner().await.batch_execute(evil).await.unwrap();
        let (restore, control) = (house.restore(), Control::default());
        let swapped = restore.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &control).await.unwrap();
        let previous = swapped.previous.unwrap();
        // As if the process died: nothing of it is undone.
        tokio::time::timeout(Duration::from_secs(5), restore.revert(&previous, &control)).await.unwrap_err();
        let admin = house.cluster.admin("postgres").await.unwrap();
        let query = "SELECT pg_get_userbyid(datdba)::text FROM pg_database WHERE datname = $1";
        assert_eq!(admin.query_one(query, &[&previous]).await.unwrap().get::<_, String>(0), SUPERUSER.0);
        assert_eq!(house.intruders().await.len(), 1);
        let left = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
        admin.query(left, &[&previous]).await.unwrap();
        // Its time is over.
        let role = house.intruders().await.remove(0);
        admin.batch_execute(&format!("ALTER ROLE {role} VALID UNTIL '2020-01-01'")).await.unwrap();

        // Somebody who asks to stop is heard, however long the tenant's code takes.
        let stopping = Control::default();
        let stop = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            stopping.cancel();
        };
        let (reverted, ()) = tokio::join!(restore.revert(&previous, &stopping), stop);
        assert!(matches!(reverted, Err(Error::Cancelled)), "{reverted:?}");
        let row =
            admin.query_one("SELECT datallowconn FROM pg_database WHERE datname = $1", &[&previous]).await.unwrap();
        assert!(!row.get::<_, bool>(0), "closed again");
        assert_eq!(admin.query_one(query, &[&previous]).await.unwrap().get::<_, String>(0), "acme_owner");
        assert!(house.intruders().await.is_empty(), "neither the role of the first nor that of the second is left");
    });
}

#[test]
fn nobody_joins_a_database_that_is_being_restored() {
    runtime().block_on(async {
        let house = House::new(2_000).await;
        house.save().await;
        let (restore, control) = (house.restore(), Control::default());
        let admin = house.cluster.admin("postgres").await.unwrap();
        house.cluster.create_role("stranger", "secret").await.unwrap();
        let restored = AtomicBool::new(false);
        let join = async {
            let (mut tried, mut inside) = (0, Vec::new());
            while !restored.load(Ordering::Relaxed) {
                let query = "SELECT datname::text FROM pg_database WHERE datname LIKE '%\\_\\_restore\\_%'";
                if let Some(row) = admin.query_opt(query, &[]).await.unwrap() {
                    tried += 1;
                    inside.extend(house.cluster.connect("acme_owner", "odoo", row.get(0)).await.ok());
                    inside.extend(house.cluster.connect("stranger", "secret", row.get(0)).await.ok());
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            (tried, inside.len())
        };
        let run = async {
            let outcome = restore.run(&RestorePoint::Latest, &RestoreMode::Scratch, &control).await;
            restored.store(true, Ordering::Relaxed);
            outcome
        };
        let (outcome, (tried, inside)) = tokio::join!(run, join);
        outcome.unwrap();
        assert!(tried > 2, "{tried}");
        // At the very end it is the owner's, for an instant, under its old name: whoever comes then is sent away.
        assert!(inside <= 1, "{inside}");
    });
}

/// `pg_dump` selects from sequences by name, and a name can come to mean a table with an index meanwhile.
#[test]
fn a_sequence_that_becomes_a_table_while_it_is_saved_runs_nothing() {
    runtime().block_on(async {
        let house = House::new(10).await;
        let proof = house.directory.path().join("proof");
        std::fs::set_permissions(house.directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let owner = house.owner().await;
        owner
            .batch_execute(&format!(
                r"CREATE SEQUENCE zz_seq;
                CREATE FUNCTION act() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
                  IF current_user <> 'acme_owner' THEN EXECUTE 'COPY (SELECT current_user) TO ''{}'''; END IF; RETURN 1;
                END $$;
                CREATE FUNCTION evil(int) RETURNS bigint IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
                  PERFORM public.act(); RETURN 1; END $$;
                CREATE TABLE bulk AS SELECT i, repeat(md5(i::text), 30) t FROM generate_series(1, 60000) i",
                proof.display()
            ))
            .await
            .unwrap();
        let attack = async {
            let busy = "SELECT count(*) FROM pg_locks l WHERE l.relation = 'bulk'::regclass \
                        AND l.mode = 'AccessShareLock' AND l.pid <> pg_backend_pid()";
            while owner.query_one(busy, &[]).await.unwrap().get::<_, i64>(0) == 0 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let change = "BEGIN; DROP SEQUENCE zz_seq; CREATE TABLE zz_seq (last_value bigint, is_called bool);
                          CREATE INDEX ON zz_seq ((last_value + evil(1))); COMMIT";
            owner.batch_execute(change).await.unwrap();
        };
        let (backup, control) = (house.backup(), Control::default());
        let (saved, ()) = tokio::join!(backup.run(&control), attack);
        assert!(!proof.exists(), "{:?} ran it, {saved:?}", std::fs::read_to_string(&proof));
    });
}

/// What is read beside `pg_dump` comes back all the same.
#[test]
fn sequences_and_odoos_unaccent_come_back_and_exports_have_them() {
    runtime().block_on(async {
        let house = House::new(5).await;
        let admin = house.cluster.admin("acme").await.unwrap();
        let objects = "CREATE SEQUENCE \"odd.\"\"seq\"; SELECT setval('\"odd.\"\"seq\"', 41); ALTER SEQUENCE \"odd.\"\"seq\" OWNER TO acme_owner;
            CREATE TABLE loaded (id serial PRIMARY KEY); INSERT INTO loaded VALUES (7), (9); ALTER TABLE loaded OWNER TO acme_owner;
            CREATE SEQUENCE number; ALTER SEQUENCE number RESTART WITH 20270001; ALTER SEQUENCE number OWNER TO acme_owner;
            CREATE SEQUENCE back START 5; SELECT setval('back', 3, false); ALTER SEQUENCE back OWNER TO acme_owner;
            CREATE SEQUENCE spelling; CREATE TABLE texts (id text DEFAULT 'P' || nextval('spelling')); INSERT INTO texts VALUES ('x');
            ALTER SEQUENCE spelling OWNED BY texts.id; ALTER TABLE texts OWNER TO acme_owner;
            CREATE TABLE filled (id serial PRIMARY KEY); INSERT INTO filled VALUES (2147483647); ALTER TABLE filled OWNER TO acme_owner;
            CREATE TABLE called (id int GENERATED ALWAYS AS IDENTITY); INSERT INTO called DEFAULT VALUES; ALTER TABLE called OWNER TO acme_owner;
            CREATE EXTENSION unaccent; ALTER FUNCTION unaccent(text) IMMUTABLE;
            CREATE TABLE spelt (name text); CREATE INDEX ON spelt (unaccent(name)); ALTER TABLE spelt OWNER TO acme_owner";
        admin.batch_execute(objects).await.unwrap();
        let set = house.save().await;
        let restored = house.scratch(&set).await;
        let copy = house.cluster.admin(&restored.database).await.unwrap();
        let next = async |client: &tokio_postgres::Client| {
            let query = "SELECT nextval('\"odd.\"\"seq\"'), nextval('loaded_id_seq'), nextval('called_id_seq'), nextval('number'), \
                         nextval('back'), nextval('spelling'), nextval('filled_id_seq')";
            let row = client.query_one(query, &[]).await.unwrap();
            (0..7).map(|n| row.get::<_, i64>(n)).collect::<Vec<_>>()
        };
        // As they would go on in the original, also those from which nothing was taken.
        let expected = [42, 1, 2, 20_270_001, 3, 1, 1];
        assert_eq!(next(&copy).await, expected);
        let file = house.directory.path().join("out.zip");
        let repository = Arc::new(house.repository());
        export(&repository, &RestorePoint::Latest, &house.server(), &file, &Control::default()).await.unwrap();
        let restore = Restore { database: "imported".into(), owner: Some("acme_owner".into()), ..house.restore() };
        Import { restore, file, identity: Identity::Moved }.run(&Control::default()).await.unwrap();
        assert_eq!(next(&house.cluster.admin("imported").await.unwrap()).await, expected);
        assert_eq!(next(&admin).await, expected);
    });
}

/// Who backs up and restores need not be a superuser: what cannot be known or done then is said, or done another way.
#[test]
fn a_role_that_may_only_make_databases_and_roles_saves_imports_and_says_what_it_does_not_know() {
    runtime().block_on(async {
        let house = House::new(5).await;
        let admin = house.cluster.admin("postgres").await.unwrap();
        admin
            .batch_execute("CREATE ROLE adm LOGIN CREATEDB CREATEROLE PASSWORD 'secret' IN ROLE acme_owner")
            .await
            .unwrap();
        let adm = Server { user: "adm".into(), password: Some(Secret::new("secret")), ..house.server() };
        let owner = house.owner().await;
        owner
            .batch_execute(
                "CREATE TABLE partner (id serial PRIMARY KEY); INSERT INTO partner VALUES (1), (2), (3);
                 CREATE SEQUENCE free; ALTER SEQUENCE free RESTART WITH 777",
            )
            .await
            .unwrap();
        let next = async |database: &str| {
            let query = "SELECT nextval('partner_id_seq'), nextval('free')";
            let row = house.cluster.admin(database).await.unwrap().query_one(query, &[]).await.unwrap();
            (row.get::<_, i64>(0), row.get::<_, i64>(1))
        };
        let set = Backup { server: adm.clone(), ..house.backup() }.run(&Control::default()).await.unwrap();
        assert!(
            set.note.as_ref().unwrap().contains("sequences begin that were not used yet is not saved"),
            "{:?}",
            set.note
        );
        let restored = house.scratch(&set).await;
        assert_eq!(next(&restored.database).await, (4, 1), "after what is there, and not into it");
        house.drop(&restored).await;
        // A schema that somebody holds is not waited for.
        let holds = house.cluster.admin("acme").await.unwrap();
        holds.batch_execute("BEGIN; GRANT USAGE ON SCHEMA public TO adm").await.unwrap();
        let set = house.save().await;
        assert!(set.note.as_ref().unwrap().contains("sequences begin"), "{:?}", set.note);
        holds.batch_execute("ROLLBACK").await.unwrap();
        let set = house.save().await;
        assert_eq!(set.note, None);
        let restored = house.scratch(&set).await;
        assert_eq!(next(&restored.database).await, (1, 777), "as in the original");
        house.drop(&restored).await;

        let file = house.directory.path().join("foreign.zip");
        let dump = "CREATE SCHEMA extensions;\nCREATE EXTENSION IF NOT EXISTS pg_trgm WITH SCHEMA extensions;\n\
            CREATE SCHEMA own;\nCREATE FUNCTION own.one() RETURNS int LANGUAGE sql AS 'SELECT 1';\n\
            CREATE TABLE own.t (id serial, name text);\nCREATE MATERIALIZED VIEW own.v AS SELECT own.one() AS one;\n\
            CREATE INDEX ON own.t USING gin (name extensions.gin_trgm_ops);\nCREATE PUBLICATION p FOR TABLE own.t;\n\
            INSERT INTO own.t (name) VALUES ('x');\n";
        let program =
            "import sys,zipfile; z=zipfile.ZipFile(sys.argv[1],'w'); z.writestr('dump.sql', sys.argv[2]); z.close()";
        assert!(Command::new("python3").args(["-c", program]).arg(&file).arg(dump).status().unwrap().success());
        let restore =
            Restore { database: "foreign".into(), owner: Some("acme_owner".into()), server: adm, ..house.restore() };
        Import { restore, file, identity: Identity::Moved }.run(&Control::default()).await.unwrap();
        let client = house.cluster.connect("acme_owner", "odoo", "foreign").await.unwrap();
        client
            .batch_execute("INSERT INTO own.t (name) VALUES ('y'); DROP FUNCTION own.one() CASCADE; DROP PUBLICATION p")
            .await
            .unwrap();
        assert_eq!(house.intruders().await, Vec::<String>::new());
    });
}

#[test]
fn a_database_that_only_bears_the_name_is_no_way_back_and_a_way_back_loses_no_file() {
    runtime().block_on(async {
        let house = House::new(5).await;
        house.attach(2, 0).await;
        house.save().await;
        house.cluster.create_role("evil", "secret").await.unwrap();
        let admin = house.cluster.admin("postgres").await.unwrap();
        admin.batch_execute("ALTER ROLE evil CREATEDB").await.unwrap();
        let evil = house.cluster.connect("evil", "secret", "postgres").await.unwrap();
        for name in ["acme__before_20991231t235959", "acme__before_20200101t000000"] {
            evil.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
            let error = house.restore().revert(name, &Control::default()).await.unwrap_err().to_string();
            assert!(error.contains("is not a database that a swap of acme has left"), "{error}");
        }
        let client = house.estate.connect().await.unwrap();
        let late = house.estate.attach(&client, b"made after the backup").await.unwrap();
        drop(client);
        let (restore, control) = (house.restore(), Control::default());
        let swapped = restore.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &control).await.unwrap();
        let previous = swapped.previous.unwrap();
        // Its owner can make it a template, which cannot be dropped.
        admin.batch_execute(&format!("ALTER DATABASE {previous} WITH IS_TEMPLATE true")).await.unwrap();
        // A collector of what is there now takes what only the old state refers to, as often as it comes back.
        let path = house.estate.filestore.join(&late);
        let _ = std::fs::remove_file(&path);
        let renamed = AtomicBool::new(false);
        let collector = async {
            while !renamed.load(Ordering::Relaxed) {
                let query = "SELECT count(*) FROM pg_database WHERE datname = $1";
                if admin.query_one(query, &[&previous]).await.unwrap().get::<_, i64>(0) == 0 {
                    return;
                }
                let _ = std::fs::remove_file(&path);
            }
        };
        let revert = async {
            let reverted = restore.revert(&previous, &control).await;
            renamed.store(true, Ordering::Relaxed);
            reverted
        };
        let (reverted, ()) = tokio::join!(revert, collector);
        reverted.unwrap();
        assert_eq!(house.estate.missing(&house.estate.filestore).await.unwrap(), Vec::<String>::new());
        let left = restore.previous().await.unwrap();
        admin.batch_execute(&format!("ALTER DATABASE {} WITH IS_TEMPLATE true", left[0].database)).await.unwrap();
        let later = left[0].since + jiff::SignedDuration::from_hours(24);
        assert_eq!(restore.drop_previous(Duration::from_secs(3_600), later).await.unwrap(), left);
    });
}

#[test]
fn a_copy_that_undoes_its_own_neutralization_is_not_made() {
    runtime().block_on(async {
        for trap in [
            "CREATE TRIGGER keep BEFORE UPDATE ON ir_cron FOR EACH ROW EXECUTE FUNCTION keep()",
            "CREATE TRIGGER keep BEFORE INSERT ON ir_config_parameter FOR EACH ROW EXECUTE FUNCTION keep()",
            "CREATE RULE keep AS ON UPDATE TO ir_mail_server DO INSTEAD NOTHING",
            "ALTER TABLE ir_mail_server ENABLE ROW LEVEL SECURITY; ALTER TABLE ir_mail_server FORCE ROW LEVEL SECURITY;
             CREATE POLICY p ON ir_mail_server FOR SELECT USING (false)",
        ] {
            let house = House::new(5).await;
            let admin = house.cluster.admin("acme").await.unwrap();
            let function = "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
                INSERT INTO ir_cron (name) VALUES ('a'), ('b');
                INSERT INTO ir_mail_server (name, smtp_host, active) VALUES ('real', 'smtp.example.com', true);";
            admin.batch_execute(&format!("{function} {trap}")).await.unwrap();
            house.save().await;
            let made = house.restore().run(&RestorePoint::Latest, &RestoreMode::Scratch, &Control::default()).await;
            let error = made.unwrap_err().to_string();
            assert!(error.contains("undone") || error.contains("row-level security"), "{trap}: {error}");
            assert_eq!(house.databases().await, ["acme"]);
        }
    });
}

/// What a database's owner sets for it holds for its own sessions.
#[test]
fn settings_of_a_tenants_database_do_not_hold_for_whoever_saves_and_restores() {
    runtime().block_on(async {
        let house = House::new(200).await;
        house.attach(2, 0).await;
        let all = "ALTER DATABASE acme SET default_transaction_read_only = on; ALTER DATABASE acme SET role = acme_owner;
            ALTER DATABASE acme SET idle_in_transaction_session_timeout = '1ms'; ALTER DATABASE acme SET statement_timeout = '1ms';
            ALTER DATABASE acme SET search_path = 'nowhere'; ALTER DATABASE acme SET quote_all_identifiers = on";
        let admin = house.cluster.admin("postgres").await.unwrap();
        admin.batch_execute(all).await.unwrap();
        let set = house.save().await;
        assert_eq!(set.consistency, Consistency::Fenced);
        let (restore, control) = (house.restore(), Control::default());
        let swapped = restore.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &control).await.unwrap();
        restore.revert(&swapped.previous.unwrap(), &control).await.unwrap();
        assert!(house.intruders().await.is_empty());
        // A database without an encoding can hold names that are no text.
        let create = "CREATE DATABASE acme_ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C' OWNER acme_owner";
        admin.batch_execute(create).await.unwrap();
        let ascii = house.cluster.admin("acme_ascii").await.unwrap();
        ascii.batch_execute("CREATE TABLE t (a text); INSERT INTO t VALUES (convert_from('\\xfc'::bytea, 'SQL_ASCII'))").await.unwrap();
        let backup = Backup { database: "acme_ascii".into(), ..house.backup() };
        assert_eq!(backup.run(&control).await.unwrap().artifact.rows, 1);
    });
}

#[test]
fn a_swap_that_fails_leaves_no_files_and_a_table_that_is_held_no_backup_waiting() {
    runtime().block_on(async {
        let house = House::new(3).await;
        house.attach(2, 0).await;
        house.save().await;
        let nobody = Some(GatewayConsole::new(house.server(), "postgres"));
        let without = Restore { gateway: nobody, ..house.restore() };
        without.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap_err();
        assert_eq!((house.filestores(), house.databases().await), (vec!["acme".to_owned()], vec!["acme".to_owned()]));
        // What a process has left that died is removed with what is too old; what is another's is not.
        let (left, others) = ("acme__before_20200101t000000", "acme_eu__before_20200101t000000");
        for name in [left, others] {
            std::fs::create_dir_all(house.directory.path().join("filestore").join(name).join("ab")).unwrap();
        }
        house.restore().drop_previous(Duration::ZERO, jiff::Timestamp::now()).await.unwrap();
        assert_eq!(house.filestores(), ["acme", others]);

        let owner = house.owner().await;
        owner.batch_execute("BEGIN; LOCK TABLE ir_config_parameter IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let error = house.backup().run(&Control::default()).await.unwrap_err().to_string();
        assert!(error.contains("lock timeout"), "{error}");
    });
}

/// Publications, event triggers and grants in other names need more rights than what loads has.
#[test]
fn what_only_an_administrator_may_create_is_left_out_and_told_and_grants_come_back() {
    runtime().block_on(async {
        let house = House::new(5).await;
        house.cluster.create_role("reporting", "secret").await.unwrap();
        house.cluster.create_role("auditing", "secret").await.unwrap();
        let admin = house.cluster.admin("acme").await.unwrap();
        for statement in ["SET allow_in_place_tablespaces = on", "CREATE TABLESPACE fast LOCATION ''"] {
            admin.batch_execute(statement).await.unwrap();
        }
        let objects = r"CREATE PUBLICATION everything FOR ALL TABLES;
            CREATE EXTENSION postgres_fdw; CREATE SERVER elsewhere FOREIGN DATA WRAPPER postgres_fdw;
            CREATE USER MAPPING FOR acme_owner SERVER elsewhere; CREATE FOREIGN TABLE far (id int DEFAULT 7) SERVER elsewhere;
            COMMENT ON FOREIGN TABLE far IS 'x'; COMMENT ON COLUMN far.id IS 'y';
            CREATE TABLE apart (id int) TABLESPACE fast; ALTER TABLE apart OWNER TO acme_owner;
            CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN END $$;
            CREATE EVENT TRIGGER noted ON ddl_command_end EXECUTE FUNCTION note();
            ALTER DEFAULT PRIVILEGES FOR ROLE reporting GRANT SELECT ON TABLES TO auditing;
            GRANT SELECT ON res_partner TO reporting WITH GRANT OPTION;
            SET ROLE reporting; GRANT SELECT ON res_partner TO auditing; RESET ROLE";
        admin.batch_execute(objects).await.unwrap();
        house.save().await;
        let warnings = Arc::new(std::sync::Mutex::new(Vec::new()));
        let control = {
            let warnings = Arc::clone(&warnings);
            Control::new(move |event| {
                if let Event::Warning { text } = event {
                    warnings.lock().unwrap().push(text.clone());
                }
            })
        };
        house.restore().run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &control).await.unwrap();
        let told = warnings.lock().unwrap().join("\n");
        for expected in
            ["PUBLICATION everything", "EVENT TRIGGER noted", "SERVER elsewhere", "FOREIGN TABLE public far", "a grant"]
        {
            assert!(told.contains(expected), "{expected}: {told}");
        }
        let admin = house.cluster.admin("acme").await.unwrap();
        let query = "SELECT has_table_privilege('reporting', 'res_partner', 'SELECT WITH GRANT OPTION'), \
                     (SELECT count(*) FROM pg_publication), (SELECT reltablespace = 0 FROM pg_class WHERE relname = 'apart')";
        let row = admin.query_one(query, &[]).await.unwrap();
        assert_eq!((row.get::<_, bool>(0), row.get::<_, i64>(1), row.get::<_, bool>(2)), (true, 0, true));
        // What cannot be left out is told when it is saved.
        admin
            .batch_execute(
                "CREATE FUNCTION sure(int) RETURNS int LANGUAGE sql IMMUTABLE LEAKPROOF AS 'SELECT $1';
                 CREATE CAST (bytea AS text) WITHOUT FUNCTION",
            )
            .await
            .unwrap();
        let set = house.save().await;
        let expected = "a restore will fail at cast from bytea to text, public.sure(integer)";
        assert!(set.note.as_ref().unwrap().contains(expected), "{:?}", set.note);
    });
}

#[test]
fn a_foreign_file_is_taken_whole_or_not_at_all() {
    runtime().block_on(async {
        let prepares = ClusterOptions { settings: vec!["max_prepared_transactions = 5".into()], ..ClusterOptions::default() };
        let house = House::on(Cluster::start_with(&prepares).unwrap(), 3).await;
        let write = |name: &str, script: &str| {
            let file = house.directory.path().join(name);
            let program = format!("import sys,zipfile; p=sys.argv[1]; z=zipfile.ZipFile(p,'w'); {script}");
            assert!(Command::new("python3").args(["-c", &program]).arg(&file).status().unwrap().success());
            file
        };
        let import = async |file, database: &str| {
            let restore = Restore { database: database.into(), owner: Some("acme_owner".into()), ..house.restore() };
            Import { restore, file, identity: Identity::Moved }.run(&Control::default()).await
        };
        // A byte of a row has changed since the file was written.
        let flipped = write(
            "flipped.zip",
            "z.writestr('dump.sql', 'CREATE TABLE public.t (a text);\\nCOPY public.t (a) FROM stdin;\\nAMOUNT1000\\n\\\\.\\n'); z.close(); \
             b=open(p,'rb').read(); assert b.count(b'AMOUNT1000') == 1; open(p,'wb').write(b.replace(b'AMOUNT1000',b'AMOUNT9000'))",
        );
        let error = import(flipped, "flipped").await.unwrap_err().to_string();
        assert!(error.to_lowercase().contains("checksum"), "{error}");
        house.cluster.admin("flipped").await.unwrap_err();
        // A transaction that is left open, and a text that only looks like a change of owner.
        let open = write(
            "open.zip",
            "z.writestr('dump.sql', 'CREATE TABLE public.t (a text);\\nALTER TABLE public.t ADD CONSTRAINT c \
             CHECK (a <> $$change owner to me$$);\\nBEGIN;\\nINSERT INTO public.t VALUES (1);\\n'); z.close()",
        );
        import(open, "open").await.unwrap();
        let client = house.cluster.admin("open").await.unwrap();
        let query = "SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM pg_constraint WHERE conname = 'c')";
        let row = client.query_one(query, &[]).await.unwrap();
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1, 1));
        // Who owns what was loaded, and that whoever has written it is nobody meanwhile: not the owner, who has other databases.
        let query = "SELECT count(*) FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner WHERE c.relname = 't' AND r.rolname = 'acme_owner'";
        assert_eq!(client.query_one(query, &[]).await.unwrap().get::<_, i64>(0), 1);
        for (name, statement) in [
            ("drops", "DROP DATABASE acme"),
            ("alters", "ALTER ROLE acme_owner PASSWORD \\'known\\'"),
            ("renames", "ALTER DATABASE acme RENAME TO mine"),
            // What is left out must not take others with it.
            ("hides", "GRANT ALL ON SCHEMA public TO nobody; CREATE TABLE public.t (a text)"),
            // The end of a transaction that has failed is no end.
            ("fails", "BEGIN; CREATE TABLE public.t (a text);\\nSET nonsense = 1"),
            ("knows", "SET lock_timeout = 100;\\nALTER ROLE CURRENT_USER PASSWORD \\'known\\'"),
        ] {
            let file = write(&format!("{name}.zip"), &format!("z.writestr('dump.sql', '{statement};\\n'); z.close()"));
            let error = import(file, name).await.unwrap_err().to_string();
            let expected = match name {
                "hides" => "is followed by others on its line",
                "fails" => "25P02",
                "knows" => "55P03",
                _ => "42501",
            };
            assert!(error.contains(expected), "{statement}: {error}");
            house.cluster.admin(name).await.unwrap_err();
        }
        // Whoever prepares something and leaves holds it for ever.
        let prepares = "z.writestr('dump.sql', 'CREATE TABLE public.t (a text);\\nBEGIN;\\nALTER TABLE public.t ADD b text;\\n\
                        PREPARE TRANSACTION $$it is$$;\\n'); z.close()";
        import(write("prepares.zip", prepares), "prepares").await.unwrap();
        let left = house.cluster.admin("prepares").await.unwrap();
        assert!(left.query("SELECT FROM pg_prepared_xacts", &[]).await.unwrap().is_empty());
        house.owner().await;
        assert!(house.intruders().await.is_empty());
    });
}

#[test]
fn a_swap_takes_over_who_may_connect_and_with_which_settings() {
    runtime().block_on(async {
        let house = House::new(10).await;
        house.cluster.create_role("reporting", "secret").await.unwrap();
        let admin = house.cluster.admin("postgres").await.unwrap();
        admin
            .batch_execute(
                "REVOKE ALL ON DATABASE acme FROM PUBLIC; GRANT CONNECT ON DATABASE acme TO reporting;
                 ALTER DATABASE acme CONNECTION LIMIT 20; ALTER DATABASE acme SET statement_timeout = '7min';
                 ALTER DATABASE acme SET search_path = \"$user\", public, \"a, b\";
                 ALTER ROLE reporting IN DATABASE acme SET work_mem = '9MB'",
            )
            .await
            .unwrap();
        let about = async || {
            let query = "SELECT array(SELECT unnest(datacl)::text ORDER BY 1), datconnlimit, datallowconn, \
                         pg_get_userbyid(datdba)::text, (SELECT array_agg(setrole::regrole::text || setconfig::text ORDER BY setrole) \
                         FROM pg_db_role_setting s WHERE s.setdatabase = d.oid) FROM pg_database d WHERE datname = 'acme'";
            let row = admin.query_one(query, &[]).await.unwrap();
            let rights: Vec<String> = row.get(0);
            let settings: Vec<String> = row.get(4);
            (rights, row.get::<_, i32>(1), row.get::<_, bool>(2), row.get::<_, String>(3), settings)
        };
        let before = about().await;
        house.save().await;
        let restore = house.restore();
        let swapped = restore.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap();
        assert_eq!(about().await, before);
        house.cluster.connect("reporting", "secret", "acme").await.unwrap();

        // A way back that cannot be gone leaves everything as it was: here nobody can let transactions wait.
        let previous = swapped.previous.unwrap();
        let nobody = Some(GatewayConsole::new(house.server(), "postgres"));
        let without = Restore { gateway: nobody, ..house.restore() };
        without.revert(&previous, &Control::default()).await.unwrap_err();
        let query = "SELECT datallowconn, pg_get_userbyid(datdba)::text FROM pg_database WHERE datname = $1";
        let row = admin.query_one(query, &[&previous]).await.unwrap();
        assert_eq!((row.get::<_, bool>(0), row.get::<_, String>(1)), (false, "acme_owner".to_owned()));
        assert_eq!(about().await, before);
        restore.revert(&previous, &Control::default()).await.unwrap();
        assert_eq!(about().await, before);
        let scratch = restore.run(&RestorePoint::Latest, &RestoreMode::Scratch, &Control::default()).await.unwrap();
        let copy = house.cluster.connect("acme_owner", "odoo", &scratch.database).await.unwrap();
        copy.batch_execute("SELECT 1").await.unwrap();
    });
}

/// A large database is dumped by several programs on one snapshot, and loaded by several: whatever its tables are called, and
/// while others write, it comes back whole, from every way out.
#[test]
fn a_large_database_is_dumped_and_loaded_by_several_programs() {
    runtime().block_on(async {
        let house = House::new(3_000).await;
        house.attach(5, 0).await;
        let owner = house.owner().await;
        owner
            .batch_execute(
                r#"CREATE SCHEMA "Zweit";
                CREATE TABLE "Zweit"."a.b*""c|d" (id int PRIMARY KEY, text text);
                INSERT INTO "Zweit"."a.b*""c|d" SELECT n, repeat(md5(n::text), 20) FROM generate_series(1, 20000) n;
                CREATE TABLE parted (id int, text text) PARTITION BY RANGE (id);
                CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (15000);
                CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (15000) TO (MAXVALUE);
                INSERT INTO parted SELECT n, repeat(md5(n::text), 20) FROM generate_series(1, 20000) n;
                CREATE INDEX ON parted (text);
                CREATE TABLE child (id int GENERATED ALWAYS AS IDENTITY, of int REFERENCES "Zweit"."a.b*""c|d", g int GENERATED ALWAYS AS (id * 2) STORED);
                INSERT INTO child (of) SELECT n FROM generate_series(1, 20000) n;
                CREATE TABLE seen (n int);
                CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO seen VALUES (NEW.of); RETURN NEW; END';
                CREATE TRIGGER see AFTER INSERT ON child FOR EACH ROW EXECUTE FUNCTION see();
                CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM child; ANALYZE"#,
            )
            .await
            .unwrap();
        let parallel = Parallel { above: ByteSize(0), jobs: 3 };
        let backup = Backup { policy: BackupPolicy { parallel, ..BackupPolicy::default() }, ..house.backup() };
        let stop = AtomicBool::new(false);
        // Rows that come after the snapshot are in none of the streams.
        let write = async {
            while !stop.load(Ordering::Relaxed) {
                let more = r#"INSERT INTO "Zweit"."a.b*""c|d" SELECT max(id) + 1, 'late' FROM "Zweit"."a.b*""c|d";
                              INSERT INTO child (of) SELECT max(id) FROM "Zweit"."a.b*""c|d""#;
                owner.batch_execute(more).await.unwrap();
            }
        };
        let save = async {
            let set = backup.run(&Control::default()).await.unwrap();
            stop.store(true, Ordering::Relaxed);
            set
        };
        let (set, ()) = tokio::join!(save, write);
        assert_eq!((set.artifact.format, set.consistency), (DumpFormat::Streams, Consistency::Fenced));

        // By restic, and by hand.
        let target = house.directory.path().join("by-restic");
        let (good, text) = house.restic(&["restore", &set.id.0, "--verify", "--target", target.to_str().unwrap()]);
        assert!(good, "{text}");
        let streams: serde_json::Value =
            serde_json::from_slice(&std::fs::read(target.join("acme/streams.json")).unwrap()).unwrap();
        let streams = streams.as_array().unwrap();
        let of = |stream: &serde_json::Value| -> Vec<String> { serde_json::from_value(stream["tables"].clone()).unwrap() };
        assert_eq!((streams.len(), of(&streams[0])), (3, Vec::new()));
        let tables: BTreeSet<_> = streams.iter().flat_map(of).collect();
        assert_eq!(tables, ["Zweit.a.b*\"c|d", "public.account_move_line", "public.parted_1", "public.parted_2"].map(str::to_owned).into());
        let number = streams.iter().position(|s| of(s).contains(&"public.parted_1".to_owned())).unwrap();
        let list = format!(
            "set -e; cd {}; cat *.0000 | {1}/pg_restore --list; cat *.{number:04} | {1}/pg_restore --list",
            target.join("acme/odoo.dump").display(),
            binaries().unwrap().display()
        );
        let out = Command::new("bash").args(["-c", &list]).output().unwrap();
        let list = String::from_utf8_lossy(&out.stdout);
        assert_eq!(list.matches("TABLE DATA public parted_1 ").count(), 1, "{list}");
        assert_eq!(list.matches("INDEX public parted_1_text_idx ").count(), 1, "{list}");
        assert!(!list.contains("SEQUENCE SET"), "values of sequences are read by their ids: {list}");

        // By one program at a time, by several, and through Odoo's file.
        let whole = async |database: &str| {
            let client = house.cluster.admin(database).await.unwrap();
            let query = r#"SELECT (SELECT count(*) FROM "Zweit"."a.b*""c|d"), (SELECT count(*) FROM child), (SELECT count(*) FROM parted),
                  (SELECT count(*) FROM counted), (SELECT count(*) FROM seen),
                  (SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND conrelid = 'child'::regclass AND convalidated),
                  (SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE c.relname LIKE 'parted%' AND indisvalid),
                  (SELECT sum(g - 2 * id) FROM child), nextval('child_id_seq') > (SELECT max(id) FROM child)"#;
            let row = client.query_one(query, &[]).await.unwrap();
            let numbers: Vec<i64> = (0..8).map(|n| row.get(n)).collect();
            assert!(row.get::<_, bool>(8));
            numbers
        };
        let point = RestorePoint::Set { id: set.id.clone() };
        let mut first = None;
        for jobs in [1, 3] {
            let restore = Restore { parallel: Parallel { above: ByteSize(0), jobs }, ..house.restore() };
            let restored = restore.run(&point, &RestoreMode::Scratch, &Control::default()).await.unwrap();
            let numbers = whole(&restored.database).await;
            assert_eq!(numbers[2..], [20_000, 1, numbers[4], 1, 3, 0], "{numbers:?}");
            // Rows of the trigger's are those that were saved, and loading has not set it off.
            assert_eq!(numbers[1], 20_000 + numbers[4]);
            assert_eq!(*first.get_or_insert(numbers.clone()), numbers);
            house.drop(&restored).await;
        }
        let (repository, file) = (Arc::new(house.repository()), house.directory.path().join("out.zip"));
        export(&repository, &RestorePoint::Latest, &house.server(), &file, &Control::default()).await.unwrap();
        let restore = Restore { database: "imported".into(), owner: Some("acme_owner".into()), ..house.restore() };
        Import { restore, file, identity: Identity::Moved }.run(&Control::default()).await.unwrap();
        assert_eq!(Some(whole("imported").await), first);

        // One program that fails is a backup that fails, and names the table.
        let admin = house.cluster.admin("acme").await.unwrap();
        admin.batch_execute("ALTER TABLE parted_2 ENABLE ROW LEVEL SECURITY; ALTER TABLE parted_2 FORCE ROW LEVEL SECURITY").await.unwrap();
        let server = Server { user: "acme_owner".into(), password: Some(Secret::new("odoo")), ..house.server() };
        let error = Backup { server, ..backup }.run(&Control::default()).await.unwrap_err().to_string();
        assert!(error.contains("parted_2") && error.contains("row-level security"), "{error}");
        assert_eq!(house.repository().sets().unwrap().len(), 1);
    });
}

/// Between the snapshot and the locks of those who read on it there is an instant, and a tenant may use it.
#[test]
fn what_a_tenant_does_between_snapshot_and_dump_neither_runs_nor_loses_anything() {
    runtime().block_on(async {
        let house = House::new(500).await;
        let owner = house.owner().await;
        owner
            .batch_execute(
                "CREATE TABLE big (id serial, text text); INSERT INTO big (text) SELECT repeat(md5(n::text), 20) FROM generate_series(1, 9000) n;
                 CREATE TABLE other (id serial, text text); INSERT INTO other (text) SELECT repeat(md5(n::text), 20) FROM generate_series(1, 9000) n;
                 CREATE FUNCTION evil(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN true; END'; ANALYZE",
            )
            .await
            .unwrap();
        // Programs that wait until they are let go.
        let programs = house.directory.path().join("programs");
        std::fs::create_dir(&programs).unwrap();
        let (started, go) = (house.directory.path().join("started"), house.directory.path().join("go"));
        for name in ["pg_dump", "pg_restore"] {
            let real = binaries().unwrap().join(name);
            let wait = format!(
                "case \"$*\" in *--snapshot*) touch {}; while ! [ -e {} ]; do sleep 0.02; done;; esac",
                started.display(),
                go.display()
            );
            let script = format!("#!/bin/sh\n{wait}\nexec {} \"$@\"\n", real.display());
            std::fs::write(programs.join(name), script).unwrap();
            std::fs::set_permissions(programs.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let told = Arc::new(std::sync::Mutex::new(String::new()));
        let save = async |jobs: u32, meanwhile: &str| {
            let _ = (std::fs::remove_file(&started), std::fs::remove_file(&go));
            let parallel = Parallel { above: ByteSize(0), jobs };
            let policy = BackupPolicy { parallel, ..BackupPolicy::default() };
            let server = Server { programs: Some(programs.clone()), ..house.server() };
            let backup = Backup { policy, server, ..house.backup() };
            let meddle = async {
                cofferdam_tests::eventually(async || started.exists()).await;
                // Not before the rows of these have been counted: that takes locks too.
                tokio::time::sleep(Duration::from_millis(500)).await;
                owner.batch_execute(meanwhile).await.unwrap();
                std::fs::write(&go, "").unwrap();
            };
            let events = Arc::clone(&told);
            let control = Control::new(move |event| events.lock().unwrap().push_str(&format!("{event:?}")));
            tokio::join!(backup.run(&control), meddle).0
        };
        let trap = "ALTER SEQUENCE big_id_seq RENAME TO away; CREATE TABLE big_id_seq (last_value bigint, is_called bool);
                    CREATE INDEX ON big_id_seq (last_value) WHERE evil(1);
                    CREATE OR REPLACE FUNCTION evil(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'it ran'; END $$";
        save(3, trap).await.unwrap();
        let said = std::mem::take(&mut *told.lock().unwrap());
        assert!(said.contains("public.big_id_seq was emptied, rewritten, replaced") && !said.contains("it ran"), "{said}");
        owner.batch_execute("DROP TABLE big_id_seq; ALTER SEQUENCE away RENAME TO big_id_seq").await.unwrap();
        let mood = "CREATE TYPE mood AS ENUM ('draft', 'posted'); ALTER TABLE other ADD mood mood DEFAULT 'draft'; \
                    CREATE TYPE pair AS (a int, b text); ALTER TABLE other ADD pair pair DEFAULT ROW (1, 'x')";
        owner.batch_execute(mood).await.unwrap();
        // Each is seen, and the second time nobody changes anything: what is saved is what there is then.
        for (jobs, change, what) in [
            // Another column under the name, the same rows in the same file.
            (1, "ALTER TABLE other RENAME id TO was; ALTER TABLE other ADD id int; UPDATE other SET id = 7", "public.other was"),
            (3, "ALTER TABLE other DROP id; ALTER TABLE other RENAME was TO id", "public.other was"),
            // Nobody's lock keeps what labels and functions are called.
            (
                3,
                "ALTER TYPE mood RENAME VALUE 'draft' TO 'x'; ALTER TYPE mood RENAME VALUE 'posted' TO 'draft'; \
                 ALTER TYPE mood RENAME VALUE 'x' TO 'posted'",
                "the enumeration public.mood",
            ),
            (3, "ALTER TYPE pair DROP ATTRIBUTE b; ALTER TYPE pair ADD ATTRIBUTE c text", "the type public.pair"),
            (1, "ALTER FUNCTION evil(int) RENAME TO worse", "public.evil was"),
            (1, "ALTER TABLE other ALTER id TYPE bigint USING id + 0", "public.other was"),
            // No lock on a table keeps its schema's name, and afterwards everything is called what it was.
            (3, "ALTER SCHEMA public RENAME TO away; ALTER SCHEMA away RENAME TO public", "the schema public was"),
            (3, "TRUNCATE other", "public.other was"),
            (1, "ALTER TABLE other RENAME TO old; CREATE TABLE other (id int, text varchar, mood mood)", "public.other was"),
        ] {
            let set = save(jobs, change).await.unwrap();
            let said = std::mem::take(&mut *told.lock().unwrap());
            assert!(said.contains(what) && said.contains("once more"), "{jobs}, {change}: {said}");
            let scratch = house.scratch(&set).await;
            let client = house.cluster.admin(&scratch.database).await.unwrap();
            let all = "SELECT count(*), coalesce(sum(id), 0)::bigint, min(mood::text) FROM other";
            let (there, here) = (client.query_one(all, &[]).await.unwrap(), owner.query_one(all, &[]).await.unwrap());
            let both =
                [there, here].map(|row| (row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, Option<String>>(2)));
            assert_eq!(both[0], both[1], "{jobs}, {change}");
            drop(client);
            house.drop(&scratch).await;
        }
        let set = save(3, "SELECT 1").await.unwrap();
        assert_eq!(set.artifact.format, DumpFormat::Streams);
        house.drop(&house.scratch(&set).await).await;
    });
}

/// What is loaded waits for the connection to go that keeps it from becoming somebody else, and gives itself a password then.
#[test]
fn a_restore_whose_guard_is_lost_fails_and_leaves_nobody_in() {
    runtime().block_on(async {
        let house = House::new(10).await;
        let owner = house.owner().await;
        let trap = "CREATE FUNCTION let_in() RETURNS boolean LANGUAGE plpgsql AS $$
            BEGIN
              IF session_user LIKE 'cofferdam%' THEN
                SET ROLE NONE;
                PERFORM set_config('lock_timeout', '0', true);
                EXECUTE format('ALTER ROLE %I PASSWORD ''known''', session_user);
                PERFORM pg_sleep(50);
              END IF;
              RETURN true;
            END $$;
            CREATE TABLE trap (id int CHECK (public.let_in())); INSERT INTO trap VALUES (1)";
        owner.batch_execute(trap).await.unwrap();
        house.save().await;
        let admin = house.cluster.admin("postgres").await.unwrap();
        let cut = async {
            let guard = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cofferdam-backup' \
                         AND state = 'idle in transaction' AND EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
                           AND usename LIKE 'cofferdam%')";
            cofferdam_tests::eventually(async || !admin.query(guard, &[]).await.unwrap().is_empty()).await;
            let open = "SELECT FROM pg_roles WHERE rolname LIKE 'cofferdam%' AND rolcanlogin";
            cofferdam_tests::eventually(async || admin.query(open, &[]).await.unwrap().is_empty()).await;
        };
        let (restore, control) = (house.restore(), Control::default());
        let restored = restore.run(&RestorePoint::Latest, &RestoreMode::Scratch, &control);
        let (restored, ()) = tokio::join!(restored, cut);
        let error = restored.unwrap_err().to_string();
        let left = "SELECT (SELECT count(*) FROM pg_roles WHERE rolname LIKE 'cofferdam%'), \
                      (SELECT count(*) FROM pg_stat_activity WHERE usename LIKE 'cofferdam%'), \
                      (SELECT count(*) FROM pg_database WHERE datname LIKE 'acme\\_\\_%')";
        let left = admin.query_one(left, &[]).await.unwrap();
        let left: (i64, i64, i64) = (left.get(0), left.get(1), left.get(2));
        assert_eq!(left, (0, 0, 0), "roles, sessions, databases: {error}");
    });
}

/// Whoever waits for a table waits for its name, and gets whatever has it then.
#[test]
fn what_takes_a_name_or_is_changed_after_the_snapshot_is_not_saved_for_what_was_there() {
    runtime().block_on(async {
        let house = House::new(20).await;
        house.attach(3, 0).await;
        let owner = house.owner().await;
        let other = house.owner().await;
        let make = "CREATE TABLE decoy (LIKE ir_attachment INCLUDING ALL); CREATE SEQUENCE number MAXVALUE 100; \
                    SELECT nextval('number'); CREATE TABLE held (id int)";
        owner.batch_execute(make).await.unwrap();
        let mut backup = house.backup();
        backup.policy.fence.enabled = false;
        let save = async |held: &str, meanwhile: &str| {
            owner.batch_execute(&format!("BEGIN; LOCK TABLE {held} IN ACCESS EXCLUSIVE MODE")).await.unwrap();
            let meddle = async {
                let waits = format!("SELECT FROM pg_locks WHERE relation = '{held}'::regclass AND NOT granted");
                cofferdam_tests::eventually(async || !other.query(&waits, &[]).await.unwrap().is_empty()).await;
                owner.batch_execute(meanwhile).await.unwrap();
                owner.batch_execute("COMMIT").await.unwrap();
            };
            let control = Control::default();
            tokio::join!(backup.run(&control), meddle).0
        };
        // Before the files are read.
        let swap = "ALTER TABLE ir_attachment RENAME TO away; ALTER TABLE decoy RENAME TO ir_attachment";
        let error = save("ir_config_parameter", swap).await.unwrap_err().to_string();
        assert!(error.contains("ir_attachment is not Odoo's table"), "{error}");
        let back = "ALTER TABLE ir_attachment RENAME TO decoy; ALTER TABLE away RENAME TO ir_attachment";
        owner.batch_execute(back).await.unwrap();
        // Before it is read where sequences are.
        let further = "ALTER SEQUENCE number MAXVALUE 100000; SELECT setval('number', 500)";
        let error = save("ir_config_parameter", further).await.unwrap_err().to_string();
        assert!(error.contains("\"number\" was changed after the snapshot"), "{error}");
        // While rows are counted: those of `pg_dump` are right, and others would be expected.
        let reader = house.cluster.admin("acme").await.unwrap();
        reader.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").await.unwrap();
        assert_eq!(cofferdam_rows::count(&reader, "public.held").await.unwrap(), cofferdam_rows::Read::Rows(0));
        reader.batch_execute("ROLLBACK; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").await.unwrap();
        owner.batch_execute("ALTER TABLE held RENAME TO away; ALTER TABLE decoy RENAME TO held").await.unwrap();
        assert_eq!(cofferdam_rows::count(&reader, "public.held").await.unwrap(), cofferdam_rows::Read::Odd);
        reader.batch_execute("ROLLBACK").await.unwrap();
        assert!(house.repository().sets().unwrap().is_empty());
        let set = backup.run(&Control::default()).await.unwrap();
        house.drop(&house.scratch(&set).await).await;
    });
}

/// Hundreds are read at a time, and those of them that somebody holds are read on their own.
#[test]
fn a_thousand_sequences_come_back_where_they_were() {
    runtime().block_on(async {
        let house = House::new(5).await;
        let owner = house.owner().await;
        let make = "DO $$ BEGIN FOR n IN 1..1000 LOOP EXECUTE format('CREATE SEQUENCE \"Number %s\"', n); \
                      IF n % 3 = 0 THEN PERFORM setval(format('\"Number %s\"', n), n, n % 2 = 0); END IF; END LOOP; END $$";
        owner.batch_execute(make).await.unwrap();
        let all = (1..=1000).map(|n| format!("SELECT {n} AS n, last_value, is_called FROM public.\"Number {n}\""));
        let all = all.collect::<Vec<_>>().join(" UNION ALL ");
        let read = async |client: &tokio_postgres::Client| {
            let rows = client.query(&format!("{all} ORDER BY 1"), &[]).await.unwrap();
            rows.iter().map(|row| (row.get::<_, i32>(0), row.get::<_, i64>(1), row.get::<_, bool>(2))).collect::<Vec<_>>()
        };
        let before = read(&owner).await;
        // Somebody is at one of them for a while.
        let holder = house.owner().await;
        holder.batch_execute("BEGIN; ALTER SEQUENCE \"Number 500\" CACHE 2").await.unwrap();
        let let_go = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            holder.batch_execute("ROLLBACK").await.unwrap();
        };
        let (set, ()) = tokio::join!(house.save(), let_go);
        assert_eq!(set.note, None);
        let scratch = house.scratch(&set).await;
        let client = house.cluster.admin(&scratch.database).await.unwrap();
        assert_eq!(read(&client).await, before);
        assert_eq!(before[500..504], [(501, 501, false), (502, 1, false), (503, 1, false), (504, 504, true)]);
    });
}

/// Which part a row of a partitioned table is in depends on the numbers of an enum's values, which another database counts anew;
/// and a constraint may look into another table, whose rows must be there first.
#[test]
fn rows_that_move_to_another_part_are_the_same_rows_and_constraints_find_what_they_look_for() {
    runtime().block_on(async {
        let house = House::new(50).await;
        let owner = house.owner().await;
        owner
            .batch_execute(
                "CREATE TYPE mood AS ENUM ('a', 'b', 'c', 'd', 'e', 'f', 'g');
                 CREATE TABLE parted (m mood, n int) PARTITION BY HASH (m);
                 CREATE TABLE hp0 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 0);
                 CREATE TABLE hp1 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 1);
                 INSERT INTO parted SELECT (enum_range(NULL::mood))[1 + n % 7], n FROM generate_series(1, 2000) n;
                 CREATE TABLE a_large (n int); INSERT INTO a_large SELECT generate_series(1, 50000);
                 CREATE FUNCTION known(int) RETURNS bool STABLE LANGUAGE sql AS 'SELECT EXISTS (SELECT FROM public.a_large WHERE n = $1)';
                 CREATE FUNCTION known_to(int, int) RETURNS bool STABLE LANGUAGE sql AS 'SELECT public.known($1)';
                 CREATE OPERATOR public.==> (LEFTARG = int, RIGHTARG = int, FUNCTION = known_to);
                 CREATE TABLE small (of int CHECK (of OPERATOR(public.==>) 0)); INSERT INTO small VALUES (42); ANALYZE",
            )
            .await
            .unwrap();
        let parallel = Parallel { above: ByteSize(0), jobs: 3 };
        let backup = Backup { policy: BackupPolicy { parallel, ..BackupPolicy::default() }, ..house.backup() };
        for change in ["SELECT 1", "ALTER TABLE small DROP CONSTRAINT small_of_check; ALTER TABLE small ADD CHECK (known(of))"] {
            owner.batch_execute(change).await.unwrap();
            let set = backup.run(&Control::default()).await.unwrap();
            assert_eq!(set.artifact.format, DumpFormat::Custom, "one after the other, as pg_dump orders them");
            for _ in 0..2 {
                house.drop(&house.scratch(&set).await).await;
            }
        }
    });
}

/// "Odoo's zip format in and out." `reference`, Health and upgrades: "`dump.sql` + `manifest.json` + `filestore/ab/<sha1>`".
#[test]
fn an_estate_leaves_as_odoos_zip_file_and_comes_back_from_one() {
    runtime().block_on(async {
        let house = House::new(50).await;
        let client = house.estate.connect().await.unwrap();
        client
            .batch_execute(
                "CREATE TABLE ir_module_module (id serial, name text, latest_version text, state text);
                 INSERT INTO ir_module_module (name, latest_version, state) VALUES ('base', '17.0.1.3', 'installed'),
                 ('sale', '17.0.1.0', 'installed'), ('crm', NULL, 'uninstalled');
                 CREATE EXTENSION pg_trgm; COMMENT ON TABLE res_partner IS 'it''s; ours';
                 INSERT INTO res_partner (name, note) VALUES (E'tab\\there', E'line\\nline \\\\. end;');
                 CREATE FUNCTION twice(i int) RETURNS int BEGIN ATOMIC SELECT i * 2; END",
            )
            .await
            .unwrap();
        house.attach(6, 0).await;
        house.save().await;
        let before = exact(&client).await;
        let file = house.directory.path().join("acme.zip");
        let repository = Arc::new(house.repository());
        let exported =
            export(&repository, &RestorePoint::Latest, &house.server(), &file, &Control::default()).await.unwrap();
        assert_eq!(exported.files, 6);
        let error = export(&repository, &RestorePoint::Latest, &house.server(), &file, &Control::default()).await;
        assert!(error.unwrap_err().to_string().contains("is there already"));
        // As Python, in which Odoo is written, sees it.
        let script = "import json,sys,zipfile; z=zipfile.ZipFile(sys.argv[1]); assert z.testzip() is None; \
                      m=json.loads(z.read('manifest.json')); print(m['odoo_dump'], m['major_version'], m['version_info'], \
                      sorted(m['modules']), len([n for n in z.namelist() if n.startswith('filestore/')]))";
        let output = Command::new("python3").args(["-c", script]).arg(&file).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text.trim(), "1 17.0 [17, 0] ['base', 'sale'] 6", "{}", String::from_utf8_lossy(&output.stderr));

        let import = |database: &str, identity| Import {
            restore: Restore { database: database.into(), owner: Some("acme_owner".into()), ..house.restore() },
            file: file.clone(),
            identity,
        };
        let error = import("acme", Identity::Moved).run(&Control::default()).await.unwrap_err();
        assert!(error.to_string().contains("database acme is there already"), "{error}");
        let moved = import("moved", Identity::Moved).run(&Control::default()).await.unwrap();
        assert_eq!(moved.files, 6);
        let there = house.cluster.connect("acme_owner", "odoo", "moved").await.unwrap();
        assert_eq!(exact(&there).await, before);
        let query = "SELECT twice(21), obj_description('res_partner'::regclass), \
                     (SELECT note FROM res_partner WHERE name LIKE E'tab\\t%')";
        let row = there.query_one(query, &[]).await.unwrap();
        assert_eq!((row.get::<_, i32>(0), row.get::<_, String>(1).as_str()), (42, "it's; ours"));
        assert_eq!(row.get::<_, String>(2), "line\nline \\. end;");
        let uuid = "SELECT value FROM ir_config_parameter WHERE key = 'database.uuid'";
        let original: String = client.query_one(uuid, &[]).await.unwrap().get(0);
        assert_eq!(there.query_one(uuid, &[]).await.unwrap().get::<_, String>(0), original);
        let identity = Identity::Copied { base_url: Some("https://copy.example.com".into()), keep_integrations: false };
        import("copied", identity).run(&Control::default()).await.unwrap();
        let copy = house.cluster.connect("acme_owner", "odoo", "copied").await.unwrap();
        assert_ne!(copy.query_one(uuid, &[]).await.unwrap().get::<_, String>(0), original);
        let active = "SELECT count(*) FROM ir_mail_server WHERE active AND smtp_host <> 'invalid'";
        assert_eq!(copy.query_one(active, &[]).await.unwrap().get::<_, i64>(0), 0);

        // A file from somebody else is nobody's program and nobody's path.
        let hostile = house.directory.path().join("hostile.zip");
        for (sql, name, expected) in [
            ("SELECT 1;\n\\! touch /tmp/cofferdam-was-here\n", "filestore/aa/x", "is a command for psql"),
            ("CREATE ROLE intruder SUPERUSER;\n", "filestore/aa/x", "superuser"),
            ("COPY (SELECT 1) TO PROGRAM 'touch /tmp/cofferdam-was-here';\n", "filestore/aa/x", "external program"),
            ("RESET ROLE; CREATE DATABASE intruder;\n", "filestore/aa/x", "CREATE DATABASE"),
            ("SELECT 'unfinished\n", "filestore/aa/x", "ends inside a statement"),
        ] {
            let script = "import sys,zipfile; z=zipfile.ZipFile(sys.argv[1],'w'); \
                          z.writestr('dump.sql', sys.argv[2]); z.writestr(sys.argv[3], 'x')";
            let made = Command::new("python3").args(["-c", script]).arg(&hostile).args([sql, name]).status().unwrap();
            assert!(made.success());
            let import = Import { file: hostile.clone(), ..import("bad", Identity::Moved) };
            let error = import.run(&Control::default()).await.unwrap_err();
            assert!(error.to_string().contains(expected), "{sql}: {error}");
        }
        let script = "import sys,zipfile; z=zipfile.ZipFile(sys.argv[1],'w'); z.writestr('dump.sql', 'SELECT 1;\\n'); \
                      z.writestr('filestore/../../escaped', 'x'); z.writestr('filestore/ab/good', 'x')";
        assert!(Command::new("python3").args(["-c", script]).arg(&hostile).status().unwrap().success());
        let import = Import { file: hostile, ..import("bad", Identity::Moved) };
        assert_eq!(import.run(&Control::default()).await.unwrap().files, 1);
        assert!(!house.directory.path().join("escaped").exists());
        assert!(!Path::new("/tmp/cofferdam-was-here").exists());
        let query = "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database WHERE datname ~ '^(acme|bad|copied|moved)'";
        let admin = house.cluster.admin("postgres").await.unwrap();
        let all: String = admin.query_one(query, &[]).await.unwrap().get(0);
        assert_eq!(all, "acme bad copied moved", "nothing half-loaded stays");
    });
}

/// "Every request sees old or new, none fails; revert the same."
#[test]
fn a_swap_through_the_gateway_under_load_fails_nobody() {
    runtime().block_on(async {
        let console = "  console:\n    admins: [{ role: chief, password: chief-secret }]\n";
        let site = Site::start_with(SiteOptions { postgres: console.into(), ..SiteOptions::default() }).await;
        let directory = tempfile::tempdir().unwrap();
        let estate = Estate::furnish(&site.cluster, "acme_db", &directory.path().join("filestore"), 50).await.unwrap();
        let admin = estate.connect().await.unwrap();
        admin
            .batch_execute(
                "GRANT ALL ON ALL TABLES IN SCHEMA public TO odoo; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO odoo",
            )
            .await
            .unwrap();
        estate.attach(&admin, b"an attachment").await.unwrap();
        let mut server = Server::new("127.0.0.1", site.cluster.port(), SUPERUSER.0, Some(Secret::new(SUPERUSER.1)));
        server.programs = Some(binaries().unwrap());
        let store = Arc::new(Directory::new(directory.path().join("repository")));
        let through = Server { port: site.address().port(), ..server.clone() };
        let backup = Backup {
            tenant: Slug::parse("acme").unwrap(),
            // The dump waits its turn at the gateway, with a login that the gateway knows.
            dump_through: Some(Server {
                user: "odoo".into(),
                password: Some(Secret::new("odoo-secret")),
                ..through.clone()
            }),
            server: server.clone(),
            database: "acme_db".into(),
            filestore: estate.filestore.clone(),
            store: store.clone(),
            key: RepositoryKey::new(KEY).unwrap(),
            policy: BackupPolicy::default(),
        };
        let set = backup.run(&Control::default()).await.unwrap();
        assert_eq!(set.consistency, Consistency::Fenced);
        admin.batch_execute("UPDATE res_partner SET name = 'new'").await.unwrap();
        drop(admin);

        let stop = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let (stop, port) = (Arc::clone(&stop), site.address().port());
                tokio::spawn(async move {
                    let client =
                        cofferdam_testkit::postgres::connect(port, "odoo", "odoo-secret", "acme_db").await.unwrap();
                    let mut seen = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
                        let query = "SELECT string_agg(DISTINCT name, ',') FROM res_partner WHERE id < 3";
                        let rows = client.simple_query(query).await.unwrap();
                        let name = rows.iter().find_map(|row| match row {
                            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                            _ => None,
                        });
                        client.batch_execute("COMMIT").await.unwrap();
                        let name = name.unwrap();
                        if seen.last() != Some(&name) {
                            seen.push(name);
                        }
                    }
                    seen
                })
            })
            .collect();
        let restore = Restore {
            tenant: Slug::parse("acme").unwrap(),
            server,
            database: "acme_db".into(),
            owner: None,
            filestores: directory.path().join("filestore"),
            store,
            key: RepositoryKey::new(KEY).unwrap(),
            gateway: Some(GatewayConsole::new(
                Server { user: "chief".into(), password: Some(Secret::new("chief-secret")), ..through },
                "cofferdam",
            )),
            parallel: Parallel::default(),
        };
        tokio::time::sleep(Duration::from_millis(200)).await;
        let swapped = restore.run(&RestorePoint::Latest, &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let reverted = restore.revert(&swapped.previous.unwrap(), &Control::default()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            // New, then the old state, then new again: never both, never an error.
            assert_eq!(worker.await.unwrap(), ["new", "Partner 1,Partner 2", "new"]);
        }
        eprintln!("paused for {:?} ms and {:?} ms", swapped.paused_ms.unwrap(), reverted.paused_ms.unwrap());
    });
}

fn pgbackrest(directory: &Path, cluster: &Cluster) -> PgBackRest {
    let repository = directory.join("physical");
    PgBackRest {
        program: "/usr/bin/pgbackrest".into(),
        stanza: "shared".into(),
        repository: vec![
            format!("--repo1-path={}", repository.display()),
            format!("--log-path={}", repository.display()),
        ],
        cluster: vec![
            format!("--pg1-path={}", cluster.data().display()),
            format!("--pg1-port={}", cluster.port()),
            format!("--pg1-socket-path={}", cluster.socket_directory().display()),
            format!("--pg1-user={}", SUPERUSER.0),
        ],
        backup_options: ["--compress-type=lz4", "--repo1-bundle", "--repo1-retention-full=2", "--archive-timeout=30"]
            .map(str::to_owned)
            .to_vec(),
        locks: repository.join("locks"),
    }
}

/// `reference`, Backup: "One tenant to a point in time … `--type=time --db-include=T` into scratch …
/// `ignore_invalid_pages=on` recovers, and the warnings must be classified."
#[test]
fn one_tenant_goes_back_to_a_second_before_a_mistake_and_its_neighbours_notice_nothing() {
    runtime().block_on(async {
        let directory = tempfile::Builder::new().prefix("cofferdam-pitr-").tempdir().unwrap();
        let physical = directory.path().join("physical");
        std::fs::create_dir_all(physical.join("locks")).unwrap();
        open_to_everybody(directory.path());
        let archive = format!(
            "archive_command = 'pgbackrest --no-config --stanza=shared --repo1-path={0} --pg1-path=\"$(pwd)\" \
             --lock-path={0}/locks --log-path={0} --log-level-file=off --compress-type=lz4 archive-push %p'",
            physical.display()
        );
        // Trust on the socket: pgBackRest connects as the superuser.
        let settings =
            vec!["archive_mode = on".into(), "wal_level = replica".into(), archive, "autovacuum = off".into()];
        let options = ClusterOptions { auth: "trust", settings, ..ClusterOptions::default() };
        let cluster = Cluster::start_with(&options).unwrap();
        let filestores = directory.path().join("filestore");
        let mut estates = Vec::new();
        for name in ["acme", "beta", "core"] {
            estates.push(Estate::create(&cluster, name, &filestores, 300).await.unwrap());
        }
        let [acme, beta, core] = &estates[..] else { unreachable!() };
        let stanza = pgbackrest(directory.path(), &cluster);
        {
            let stanza = stanza.clone();
            blocking(move || {
                stanza.create_stanza().unwrap();
                stanza.backup(BackupKind::Full).unwrap();
            })
            .await;
        }
        let in_beta = beta.connect().await.unwrap();
        let kept = beta.attach(&in_beta, b"written after the backup of the cluster").await.unwrap();
        // Neighbours write, vacuum and drop meanwhile: the log then speaks of pages that are not restored.
        let (in_acme, in_core) = (acme.connect().await.unwrap(), core.connect().await.unwrap());
        for client in [&in_acme, &in_core] {
            client.batch_execute("DELETE FROM account_move_line WHERE id % 2 = 0").await.unwrap();
            client.batch_execute("VACUUM").await.unwrap();
            client.batch_execute("CREATE TABLE more AS SELECT generate_series(1, 2000) i").await.unwrap();
        }
        drop(in_core);
        in_beta.batch_execute("UPDATE res_partner SET note = 'just before'").await.unwrap();
        let before = exact(&in_beta).await;
        let now: f64 =
            in_beta.query_one("SELECT extract(epoch FROM clock_timestamp())::float8", &[]).await.unwrap().get(0);
        let at = jiff::Timestamp::from_microsecond((now * 1e6) as i64).unwrap();
        in_beta.batch_execute("SELECT pg_sleep(1.1)").await.unwrap();
        in_beta.batch_execute("DROP TABLE account_move_line; DELETE FROM ir_attachment").await.unwrap();
        let admin = cluster.admin("postgres").await.unwrap();
        admin.batch_execute("DROP DATABASE core WITH (FORCE)").await.unwrap();
        in_acme.batch_execute("INSERT INTO more SELECT generate_series(1, 100)").await.unwrap();
        let in_acme_before = in_acme.query_one("SELECT count(*) FROM more", &[]).await.unwrap().get::<_, i64>(0);
        admin.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        cofferdam_tests::eventually(async || {
            let query = "SELECT last_archived_time > to_timestamp($1) FROM pg_stat_archiver";
            admin.query_one(query, &[&(now + 1.0)]).await.unwrap().get::<_, Option<bool>>(0) == Some(true)
        })
        .await;
        drop(in_beta);

        let mut server = Server::new("127.0.0.1", cluster.port(), SUPERUSER.0, Some(Secret::new(SUPERUSER.1)));
        server.programs = Some(binaries().unwrap());
        let restore = Restore {
            tenant: Slug::parse("beta").unwrap(),
            server,
            database: "beta".into(),
            owner: None,
            filestores: filestores.clone(),
            store: Arc::new(Directory::new(directory.path().join("logical"))),
            key: RepositoryKey::new(KEY).unwrap(),
            gateway: None,
            // As a large one: rows first, what stands on them by several programs.
            parallel: Parallel { above: ByteSize(0), jobs: 2 },
        };
        let recovery = |at| Recovery {
            engine: Arc::new(stanza.clone()),
            database: "beta".into(),
            at,
            programs: Some(binaries().unwrap()),
            place: None,
        };
        let recovered = recovery(at).run(&Control::default()).await.unwrap();
        eprintln!("{recovered:?}");
        assert!(recovered.foreign_pages > 0, "the log speaks of pages of the neighbours, and they were told apart");
        drop(recovered);
        let restored = restore.to_time(&recovery(at), &RestoreMode::InPlaceSwap, &Control::default()).await.unwrap();
        let in_beta = beta.connect().await.unwrap();
        assert_eq!(exact(&in_beta).await, before, "beta is exactly what it was");
        assert_eq!(restored.files, 1);
        assert_eq!(beta.missing(&beta.filestore).await.unwrap(), Vec::<String>::new(), "{kept}");
        let in_acme_now = in_acme.query_one("SELECT count(*) FROM more", &[]).await.unwrap().get::<_, i64>(0);
        assert_eq!(in_acme_now, in_acme_before, "acme has noticed nothing");

        // In the future, before the first backup, and where a segment is missing: refused before anything is restored.
        let refused = async |at| restore.to_time(&recovery(at), &RestoreMode::Scratch, &Control::default()).await;
        let error = refused(jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1)).await.unwrap_err();
        assert!(error.to_string().contains("the log is archived up to about"), "{error}");
        let error = refused(at - jiff::SignedDuration::from_hours(1)).await.unwrap_err();
        assert!(error.to_string().contains("no backup of the cluster was complete before"), "{error}");
        let window = blocking({
            let stanza = stanza.clone();
            move || stanza.window().unwrap()
        })
        .await;
        assert!(window.contains(at) && window.gaps.is_empty(), "{window:?}");
        let removed = remove_a_segment(&physical, &admin).await;
        let error = refused(jiff::Timestamp::now()).await.unwrap_err();
        assert!(error.to_string().contains(&format!("segment {removed} of the log is missing")), "{error}");
        let window = blocking(move || stanza.window().unwrap()).await;
        assert!(window.gaps.iter().any(|gap| gap.reason.contains(&removed)), "{window:?}");
    });
}

/// Everything in a database that a mistake could change, as one number per table.
async fn exact(client: &tokio_postgres::Client) -> Vec<String> {
    let mut found = Vec::new();
    for table in ["account_move_line", "res_partner", "ir_attachment", "ir_config_parameter"] {
        let query = format!("SELECT count(*) || ' ' || md5(string_agg(t::text, '|' ORDER BY id)) FROM {table} t");
        found.push(client.query_one(&query, &[]).await.unwrap().get(0));
    }
    found
}

/// Removes the newest archived segment but one, after there are two more.
async fn remove_a_segment(repository: &Path, admin: &tokio_postgres::Client) -> String {
    let mut segments = Vec::new();
    for _ in 0..2 {
        admin.batch_execute("SELECT txid_current(); SELECT pg_switch_wal()").await.unwrap();
        let known = segments.len();
        cofferdam_tests::eventually(async || {
            segments.clear();
            let mut stack = vec![repository.join("archive/shared")];
            while let Some(next) = stack.pop() {
                for entry in std::fs::read_dir(next).into_iter().flatten().flatten() {
                    let name = entry.file_name().into_string().unwrap();
                    if entry.path().is_dir() {
                        stack.push(entry.path());
                    } else if name.len() > 60 && name.as_bytes()[24] == b'-' {
                        segments.push((name, entry.path()));
                    }
                }
            }
            segments.sort();
            segments.len() > known.max(1)
        })
        .await;
    }
    let (name, path) = &segments[segments.len() - 2];
    std::fs::remove_file(path).unwrap();
    name[..24].to_owned()
}

/// PostgreSQL and pgBackRest run as another account when the tests run as root.
fn open_to_everybody(directory: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let mut stack = vec![directory.to_owned()];
    while let Some(next) = stack.pop() {
        std::fs::set_permissions(&next, std::fs::Permissions::from_mode(0o777)).unwrap();
        stack.extend(std::fs::read_dir(&next).unwrap().flatten().map(|e| e.path()).filter(|p| p.is_dir()));
    }
}
