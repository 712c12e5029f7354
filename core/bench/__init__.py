"""What `core-serve bench` measures: an engine, a server, the machine under them, and where the time goes."""
