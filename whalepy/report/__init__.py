"""The answer of a dry run for people and tools: terminal, JSON, one page, and a trace. No torch, no process."""
