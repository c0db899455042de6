"""The keys of all advisory locks, so that no two purposes share one. Each spells "bel" and a letter in ASCII."""

PARTITION_LOCK = 0x62656C70
"""belp: one worker maintains partitions."""
CLEANUP_LOCK = 0x62656C63
"""belc: one worker deletes old rows."""
SWEEP_LOCK = 0x62656C66
"""belf: one worker sweeps."""
MIGRATION_LOCK = 0x62656C6D
"""belm: one process migrates."""
MESSAGE_LOCK = 0x62656C67
"""belg, a class of locks with one for each message: a work item shares the lock of its message, a change of the message
holds it exclusively.

Locks on the message's row would not do: PostgreSQL lets later sharers pass a waiting exclusive locker, so the slices of
a large fan-out would keep an edit waiting to their end. Advisory locks are granted in order.
"""
