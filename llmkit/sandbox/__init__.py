"""Runs untrusted Python in a cage: `cage.Sandbox` is what others use, `child` and `kernel` run inside."""
