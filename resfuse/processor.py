"""The processor's name, for reports and results."""

from __future__ import annotations

import platform


def processor_name() -> str:
    """The processor's model, as the operating system names it."""
    try:
        with open("/proc/cpuinfo") as lines:
            found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        found = ""
    return found or platform.processor() or platform.machine()
