"""The EPP's end of the control channel: dial, identify, apply programs, report.

Losing the operator does not affect serving. Programs are judged in codec/control.py,
put into force by app.py and kept by adapters/lastgood.py.
"""

from __future__ import annotations

from forebay_epp.adapters.control.client import ControlClient, Identity
from forebay_epp.adapters.control.dialling import Dial
from forebay_epp.adapters.control.slots import Slots

__all__ = ["ControlClient", "Dial", "Identity", "Slots"]
