"""What all other rooms stand on: numbers, byte orders, options, errors, torch's private names."""
