"""The product: disks, snapshots of them, and the state on disk that goes with both."""
