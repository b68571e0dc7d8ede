"""The scheduler: one leads, turns demand into instances on nodes, and keeps what is wanted written in Postgres."""
