"""Our PS-style baseline: workers that train one task at a time, and sharded parameter servers. See README.md."""
