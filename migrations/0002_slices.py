"""Slices become rows, so that several workers share one run."""

from typing import Any

UP = """
CREATE TABLE slice (
    run_id      bigint NOT NULL REFERENCES run,
    after       bigint NOT NULL,
    up_to       bigint NOT NULL,
    told_first  bigint[] NOT NULL DEFAULT '{}',
    attempts    integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    tries_left  smallint NOT NULL DEFAULT 6 CHECK (tries_left >= 0),
    error       text,
    due_at      timestamptz DEFAULT now() + interval '3 seconds',
    PRIMARY KEY (run_id, after),
    CONSTRAINT slice_range CHECK (after < up_to)
);
ALTER TABLE run ADD COLUMN slices_left integer NOT NULL DEFAULT 0 CHECK (slices_left >= 0);
ALTER TABLE run ALTER COLUMN due_at DROP NOT NULL, ALTER COLUMN due_at SET DEFAULT now() + interval '3 seconds';

-- What was half done goes on where it stopped: the rest of it is one slice.
INSERT INTO slice (run_id, after, up_to, tries_left, due_at)
SELECT id, walked_to, 9223372036854775807,
    CASE WHEN state = 'failed' THEN 0 ELSE 6 END,
    CASE WHEN state <> 'failed' THEN now() END
FROM run
WHERE state <> 'succeeded'
AND walked_to > 0;
UPDATE run SET slices_left = 1, state = CASE WHEN state = 'failed' THEN state ELSE 'running' END
WHERE state <> 'succeeded'
AND walked_to > 0;
UPDATE run SET due_at = NULL WHERE state IN ('succeeded', 'failed') OR slices_left > 0;

ALTER TABLE run DROP COLUMN walked_to;
"""

DOWN = """
ALTER TABLE run ADD COLUMN walked_to bigint NOT NULL DEFAULT 0;
UPDATE run SET due_at = now() WHERE due_at IS NULL;
ALTER TABLE run ALTER COLUMN due_at SET NOT NULL, ALTER COLUMN due_at SET DEFAULT now() + interval '10 seconds';
ALTER TABLE run DROP COLUMN slices_left;
DROP TABLE slice;
"""
"""Runs that are shared out in slices when the schema goes back begin anew there, and count again whom they counted."""


def up(migrator: Any, db: Any) -> None:
    db.execute_sql(UP)


def down(migrator: Any, db: Any) -> None:
    db.execute_sql(DOWN)
