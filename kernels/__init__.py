"""The engine's operations on tensors, one file each: the torch function that defines it first, faster forms below.

A kernel knows tensors, pages and ranges. It knows nothing of requests, of who owns a page, or of tokens' meaning.
"""
