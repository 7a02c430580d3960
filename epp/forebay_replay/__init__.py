"""Replays a load in virtual time: the real flow controller in front of simulated engines.

For comparing what decides (`routing`) under a load (`load`) on hardware (`forebay_sim`), in seconds
instead of minutes and the same each time. Nothing here sleeps, reads a clock or opens a socket.
Deciding does not belong here (forebay_epp.core), nor how an engine works (forebay_sim).
"""
