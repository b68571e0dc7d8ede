"""The `stoker` command line and the local supervisor behind `stoker up`."""
