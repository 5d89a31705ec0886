"""JSON schemas on their way to a grammar: checked, rewritten, and reported on keyword by keyword."""
