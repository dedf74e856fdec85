"""What every script needs and no reader of the method must read."""
