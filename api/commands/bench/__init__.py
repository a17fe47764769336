"""Benchmarks: a server under load, and the engine without one."""
