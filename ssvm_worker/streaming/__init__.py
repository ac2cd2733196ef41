"""Move bytes from a source to several sinks, each byte once. Standard library and ISA-L only."""
