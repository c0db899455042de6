"""Put jobs into RQ's queues, and accept jobs from there."""
