"""The block graph: nodes, edges, permissions, drains, and the one way to do I/O on them."""
