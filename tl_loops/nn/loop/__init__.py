"""What happens around the core blocks: the mechanisms of a loop, and the run that calls them."""
