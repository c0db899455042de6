"""rq-dashboard at /rq, for admins."""
