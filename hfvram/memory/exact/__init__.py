"""The exact engine: the model's own code runs on torch's meta device, and what it allocates becomes a `Timeline`.

Nothing in this package is imported before it is asked for: it needs torch and transformers.
"""
