"""Everything that crosses a process: subjects, messages, events. Nothing here does I/O."""

PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 0
"""Minor versions only add fields and enum values; each side ignores what it does not know."""
