"""What Odoo's connection pool and ORM do with psycopg2, in the order in which they do it."""
import io
import os

import psycopg2
from psycopg2.extensions import ISOLATION_LEVEL_AUTOCOMMIT, ISOLATION_LEVEL_REPEATABLE_READ


def borrow(connections, reused):
    """Odoo's ConnectionPool.borrow: reset a used connection, then begin."""
    connection = connections.pop() if connections else psycopg2.connect(application_name="odoo-%d" % os.getpid())
    if reused:
        connection.reset()  # DISCARD ALL
    connection.set_session(isolation_level=ISOLATION_LEVEL_REPEATABLE_READ)
    return connection


pool = []
first = borrow(pool, False)
assert first.get_parameter_status("standard_conforming_strings") == "on"
assert first.get_parameter_status("DateStyle").startswith("ISO")
assert first.server_version >= 90000
with first.cursor() as cr:
    cr.execute("SET SESSION lock_timeout = '15s'")
    cr.execute("CREATE TABLE partner (id serial PRIMARY KEY, name text)")
first.commit()
pool.append(first)

for round in range(5):
    connection = borrow(pool, True)
    with connection.cursor() as cr:
        cr.execute("SHOW transaction_isolation")
        assert cr.fetchone()[0] == "repeatable read"
        cr.execute("SAVEPOINT sp1")
        try:
            cr.execute("INSERT INTO partner (id, name) VALUES (1, 'a'), (1, 'b')")
            raise AssertionError("a duplicate key was accepted")
        except psycopg2.IntegrityError:
            cr.execute("ROLLBACK TO SAVEPOINT sp1")
        cr.execute("INSERT INTO partner (name) VALUES (%s) RETURNING id", ["it's \\ %% tricky; SET x = 1"])
        assert cr.fetchone()[0] > 0
        cr.copy_expert("COPY partner (name) FROM STDIN", io.StringIO("copied 1\ncopied 2\n"))
        out = io.StringIO()
        cr.copy_expert("COPY (SELECT name FROM partner ORDER BY id) TO STDOUT", out)
        assert "copied 2" in out.getvalue()
        cr.execute("CREATE TEMPORARY TABLE scratch (a int) ON COMMIT DROP")
        cr.execute("SELECT 1 FROM partner WHERE id = 1 FOR UPDATE NOWAIT")
    with connection.cursor("named") as cr:
        cr.itersize = 2
        cr.execute("SELECT name FROM partner ORDER BY id")
        assert len(list(cr)) >= 3
    with connection.cursor() as cr:
        cr.execute("SELECT pg_notify('imbus', 'payload')")
    (connection.commit if round % 2 else connection.rollback)()
    pool.append(connection)

# Two transactions at once in one process, as nested cursors do.
a, b = borrow(pool, True), borrow([], False)
with a.cursor() as ca, b.cursor() as cb:
    ca.execute("SELECT count(*) FROM partner")
    cb.execute("SELECT count(*) FROM partner")
    assert ca.fetchone() == cb.fetchone()
a.rollback()
b.rollback()

# The maintenance database, in autocommit, a new connection each time.
for _ in range(3):
    m = psycopg2.connect(dbname="postgres")
    m.set_isolation_level(ISOLATION_LEVEL_AUTOCOMMIT)
    with m.cursor() as cr:
        cr.execute("SELECT datname FROM pg_database WHERE datistemplate = false")
        assert ("acme_db",) in cr.fetchall()
    m.close()
print("all done")
