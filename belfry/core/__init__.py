"""What every room stands on: database, Redis, migrations, locks, logging, errors. It knows nothing of messages."""
