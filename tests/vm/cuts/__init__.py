"""Power cuts and disks that fail: what a real machine makes of them, and every state in between."""
