"""What touches the disk and the database on behalf of the storage agent."""
