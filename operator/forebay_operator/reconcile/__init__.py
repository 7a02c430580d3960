"""Turns changed objects into programmed EPPs and correct statuses: two loops over one store.

planner.py plans what has changed and programs EPPs; statuses.py computes `.status`, and writing.py
writes it where it differs. deletion.py notifies EPPs of a deleted pool.
"""
