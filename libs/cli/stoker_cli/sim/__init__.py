"""`stoker sim`: policies compared on clusters that are simulated."""
