"""Run jobs, supervise the process that runs them, sweep, clean up."""
