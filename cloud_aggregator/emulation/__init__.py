"""A fleet on this machine: the same programs and the same protocol, many devices a process."""
