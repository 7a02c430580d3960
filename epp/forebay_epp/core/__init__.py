"""Flow control as a pure function of calls and time.

No I/O, no clock, no logging, no randomness of its own: every entry point takes `now` (monotonic
seconds) and the random source is passed in, so the same calls give the same decisions.
"""
