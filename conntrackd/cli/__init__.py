"""The command line. It speaks to the daemon through api.py only."""
