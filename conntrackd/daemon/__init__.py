"""Everything that touches the operating system: loop, queues, rules, links, control socket, log."""
