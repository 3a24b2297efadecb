"""Drivers: one module per driver, and nothing else (underscored modules are what two share)."""
