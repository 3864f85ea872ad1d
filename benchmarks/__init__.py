"""What searching costs, beside a named rival and the floor."""
