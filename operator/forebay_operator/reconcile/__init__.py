"""From changed objects to programmed EPPs and true statuses: two loops over one store.

planner.py plans what has changed and programs EPPs; statuses.py says what `.status` should be, and
writing.py writes it where it differs. deletion.py tells EPPs of a deleted pool.
"""
