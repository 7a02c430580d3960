"""The contract between operator and EPP: the messages, and the Plan that both judge alike.

What both processes do at their start is here, too: memory.py.
"""
