"""LISTEN on one connection, NOTIFY on others, as Odoo's bus does."""
import select

import psycopg2
from psycopg2.extensions import ISOLATION_LEVEL_AUTOCOMMIT



def payload(n):
    """As Odoo's bus makes it."""
    return '[["acme_db","res.partner",%d]]' % n


listener = psycopg2.connect(dbname="postgres")
listener.set_isolation_level(ISOLATION_LEVEL_AUTOCOMMIT)
with listener.cursor() as cr:
    cr.execute("LISTEN imbus")
for n in range(3):
    sender = psycopg2.connect(dbname="postgres")
    with sender.cursor() as cr:
        cr.execute("SELECT pg_notify('imbus', %s)", [payload(n)])
    sender.commit()
    sender.close()
    assert select.select([listener], [], [], 10)[0], "no notification arrived"
    listener.poll()
    assert listener.notifies.pop().payload == payload(n)
print("all done")
