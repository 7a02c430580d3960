"""Shares: how the EPPs of a pool divide its slots among them.

`allocation` says how many slots each EPP should have, `ledger` who holds which and what to send.
"""
