"""Free memory and bf16 support of this machine."""

import os


def available_bytes() -> int | None:
    """Main memory that is available, None if the system does not report it."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def computes_in_bf16() -> bool:
    """Whether the processor has bf16 instructions; False if the system does not report it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return any(not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(line.split()) for line in lines)
    except OSError:
        return False
