"""A simulated model server: continuous batching in virtual time, and a vLLM-compatible HTTP face.

It imports nothing else of forebay, so it can also stand behind other endpoint pickers.
"""
