"""The table of notifications is partitioned by ranges of message ids. What is there becomes the first partition."""

from typing import Any

UP = """
ALTER TABLE notification RENAME TO notification_before;
ALTER INDEX notification_pkey RENAME TO notification_before_pkey;

CREATE TABLE notification (LIKE notification_before INCLUDING ALL) PARTITION BY RANGE (message_id);

CREATE TABLE notification_to_1 PARTITION OF notification FOR VALUES FROM (MINVALUE) TO (1);

DO $$
DECLARE
    first bigint := (SELECT (last_value / 1000000 + 1) * 1000000 FROM message_id_seq);
BEGIN
    EXECUTE format('ALTER TABLE notification_before RENAME TO notification_to_%%s', first);
    EXECUTE format('ALTER INDEX notification_before_pkey RENAME TO notification_to_%%s_pkey', first);
    EXECUTE format('ALTER TABLE notification ATTACH PARTITION notification_to_%%s FOR VALUES FROM (1) TO (%%s)',
        first, first);
    FOR number IN 1..2 LOOP
        EXECUTE format('CREATE TABLE notification_to_%%s PARTITION OF notification FOR VALUES FROM (%%s) TO (%%s)',
            first + number * 1000000, first + (number - 1) * 1000000, first + number * 1000000);
    END LOOP;
END
$$;
"""

DOWN = """
ALTER TABLE notification RENAME TO notification_after;
ALTER INDEX notification_pkey RENAME TO notification_after_pkey;
CREATE TABLE notification (LIKE notification_after INCLUDING ALL);
INSERT INTO notification SELECT * FROM notification_after;
DROP TABLE notification_after;
"""


def up(migrator: Any, db: Any) -> None:
    db.execute_sql(UP)


def down(migrator: Any, db: Any) -> None:
    db.execute_sql(DOWN)
