"""The processes of a run, as a test sees them."""

from __future__ import annotations

import signal

import psutil


def workers() -> list[psutil.Process]:
    """The ranks and agents among this process's descendants."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("forerun.executors" in word for word in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def kill_rank(rank: int) -> None:
    """End a rank as the kernel would, without a word."""
    for process in workers():
        try:
            words, environment = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if "forerun.executors.worker" in words and environment["RANK"] == str(rank):
            process.send_signal(signal.SIGKILL)
