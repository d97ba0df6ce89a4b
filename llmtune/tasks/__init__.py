"""What differs from task to task: a file each, and the registry of all of them."""
