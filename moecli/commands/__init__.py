"""One file a command: reads options, calls one layer down, hands a typed result to ui."""
