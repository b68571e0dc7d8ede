"""Storage agents in virtual time: their whole logic on simulated disks, pools, sources, peers and instances."""
