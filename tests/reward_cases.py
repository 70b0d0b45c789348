"""Reward functions that worker processes import."""

import os
import subprocess
import sys
import time


def lengths(completions, log_metric, log_extra, **_):
    log_metric("calls", 1)
    log_metric("completions", len(completions))
    log_extra("pid", [os.getpid()] * len(completions))
    return [float(len(c)) for c in completions]


async def async_lengths(completions, **_):
    return [float(len(c)) for c in completions]


def some(completions, **_):
    return [None if c == "none" else 1.0 for c in completions]


def sleeps(completions, **_):
    if "sleep" in completions:
        time.sleep(1000)
    return [0.0] * len(completions)


def spins_without_letting_go(completions, **_):
    if "spin" in completions:
        10**10**10
    return [0.0] * len(completions)


def leaves_a_child(completions, **_):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(completions[0], "w") as file:
        file.write(str(child.pid))
    time.sleep(1000)


def allocates(completions, **_):
    return [float(len(bytearray(40 << 30)))] * len(completions)


def dies(completions, **_):
    os._exit(7)


def raises(completions, **_):
    raise KeyError("gold")


def environment(completions, **_):
    return [float(name in os.environ) for name in completions]


def prints(completions, **_):
    print("a word of the reward function")
    return [0.0] * len(completions)
