"""The ops in plain torch: their definition, the fallback on every device and the oracle of every kernel."""
