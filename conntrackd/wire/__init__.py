"""Header readers: functions (bytes, offset) -> int, and the checksums."""
