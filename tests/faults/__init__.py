"""Product code with a planted fault, started as a process of its own."""
