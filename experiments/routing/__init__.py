"""A simulated fleet of engine replicas, and the policies that choose among them."""
