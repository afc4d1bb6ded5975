"""Cores, free memory and bf16 support of this machine, and the signals by which it ends a process."""

import os
import signal
import tempfile
from multiprocessing import util
from pathlib import Path

from caco_fast.errors import UserError

# Requests to stop: Ctrl-C, torchrun, SLURM, and a terminal that is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

# A socket's path has at most 103 bytes on macOS and 107 on Linux, of which multiprocessing adds 33 to the folder.
SOCKET_FOLDER_BYTES = 70

# The quota of CPU time of a container and its period, in control groups of version 2 and 1.
CPU_QUOTAS = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def cores() -> int:
    """CPU cores that this process may use: those of its affinity, or fewer if its container has a quota."""
    try:
        found = len(os.sched_getaffinity(0))
    except AttributeError:
        # macOS has no affinity.
        found = os.cpu_count() or 1
    return max(1, int(min([found, *_quotas()])))


def cores_of_rank() -> int:
    """The share of a rank in `cores`, if all ranks on this machine may use the same ones."""
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores() // max(1, int(local_ranks) if local_ranks.isdecimal() else 1))


def _quotas() -> list[float]:
    """The CPU time of a second that each quota allows to this process, in seconds."""
    found = []
    for files in CPU_QUOTAS:
        try:
            quota, period = map(float, " ".join(Path(file).read_text() for file in files).split())
        except (OSError, ValueError):
            # No such file, or the word "max" in it.
            continue
        # Version 1 writes -1 for no quota.
        if quota > 0 and period > 0:
            found.append(quota / period)
    return found


def make_socket_folder() -> None:
    """Make the folder of multiprocessing's sockets where their paths are short enough: in TMPDIR, or else in /tmp.

    Call it before the first worker process starts, which keeps the folder for its own sockets.
    """
    usual = tempfile.gettempdir()
    try:
        if len(os.fsencode(usual)) > SOCKET_FOLDER_BYTES:
            tempfile.tempdir = "/tmp"
        util.get_temp_dir()
    except OSError as error:
        place, reason = error.filename or tempfile.tempdir, error.strerror or error
        raise UserError(
            f"TMPDIR: {place} can't be written ({reason}); set TMPDIR to a short path of a folder"
        ) from None
    finally:
        tempfile.tempdir = usual


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
