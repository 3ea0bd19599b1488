"""The policy: a ruleset compiled from the configuration, and the matching of new connections against it."""
