"""The storage agent: one per node. Registers model directories, keeps copies on the node's SSD, leases them to instances."""
