"""A script: becomes the first process of new namespaces and runs a command there that it does not trust.

`python -I -S sandbox_init.py '{"command": [...], "seconds": ..., ...}'`, see `sandbox.py`. Inside there is
no network, no /proc, no device but null, zero and random, nothing writable but a small /tmp, and of the
machine's files only Python and the shared libraries. It ends with the command's exit status; 128 + n after
signal n; 124 when the time is over, 123 when the memory is. What it cannot set up it says on stderr, where
the command cannot write.

Root takes a user id that nothing else has; any other user a user namespace.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time

NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""mount, cgroup, uts, ipc, pid, net"""
NEW_USER = 0x10000000
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
PDEATHSIG, DUMPABLE, CAPBSET_DROP, NO_NEW_PRIVS, SECCOMP = 1, 4, 24, 38, 22
STAGE = "/sys"
"""where the new root is put together: exists everywhere, and nothing in it is needed"""
TICK_S = 0.02
TIME_OVER, MEMORY_OVER, FAILED = 124, 123, 125

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """Calls a function of libc; raises OSError with its name."""
    given = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*given) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}{tuple(a for a in arguments if a is not None)}: {os.strerror(error)}")


def mount(source, target, kind, flags, data=None):
    call("mount", source, target, kind, ctypes.c_ulong(flags), data)


def become_user_of_namespace():
    """Enters a user namespace in which this user is nobody."""
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", NEW_USER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)


def bind(path, spec):
    """Shows a path of the machine in the new root, for reading."""
    inside = STAGE + path
    if os.path.islink(path):
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        os.symlink(os.readlink(path), inside)
        return
    if os.path.isdir(path):
        os.makedirs(inside, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        os.close(os.open(inside, os.O_CREAT))
    mount(path, inside, None, BIND | REC)
    device = path.startswith("/dev/")
    attributes = (ctypes.c_uint64 * 4)(NOSUID | (0 if device else RDONLY | NODEV), 0, 0, 0)
    number = ctypes.c_long(spec["calls"]["mount_setattr"])
    call("syscall", number, AT_FDCWD, inside, AT_RECURSIVE, attributes, ctypes.c_size_t(32))


def enter_new_root(spec):
    """Makes the new root the only one; returns a descriptor of /proc, which the command does not get."""
    mount(None, "/", None, REC | PRIVATE)
    mount("tmpfs", STAGE, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    shown = []
    for path in sorted(spec["readable"]):
        if not any(path.startswith(f"{other}/") for other in shown) and os.path.lexists(path):
            bind(path, spec)
            shown.append(path)
    for name in ("null", "zero", "random", "urandom"):
        bind(f"/dev/{name}", spec)
    for name in ("tmp", "proc"):
        os.makedirs(f"{STAGE}/{name}", exist_ok=True)
    mount("tmpfs", f"{STAGE}/tmp", "tmpfs", NOSUID | NODEV, f"size={spec['disk']},nr_inodes=2k,mode=1777")
    mount("proc", f"{STAGE}/proc", "proc", NOSUID | NODEV)
    proc = os.open(f"{STAGE}/proc", os.O_RDONLY)
    call("umount2", f"{STAGE}/proc", DETACH)
    mount(None, STAGE, None, REMOUNT | RDONLY | NOSUID | NODEV, "size=1m,mode=755")
    os.chdir(STAGE)
    call("syscall", ctypes.c_long(spec["calls"]["pivot_root"]), ".", ".")
    call("umount2", ".", DETACH)
    os.chdir("/tmp")
    return proc


class Row(ctypes.Structure):
    """One instruction of a filter."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("yes", ctypes.c_uint8),
        ("no", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class Filter(ctypes.Structure):
    """A filter as the kernel takes it."""

    _fields_ = (("length", ctypes.c_ushort), ("rows", ctypes.POINTER(Row)))


def forbid(rows):
    """Installs a filter of system calls, for good."""
    made = Filter(len(rows), (Row * len(rows))(*map(tuple, rows)))
    call("prctl", SECCOMP, 2, ctypes.byref(made), 0, 0)


def limit(spec):
    """Sets what one process may use."""
    seconds = int(spec["seconds"]) + 1
    own = {
        "CPU": seconds,
        "AS": spec["memory"],
        "FSIZE": spec["disk"],
        "NOFILE": spec["files"],
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    if spec["sandboxed"]:  # of a user id that has other processes it would count those as well
        own["NPROC"] = spec["processes"]
    for name, value in own.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def run_command(spec, user):
    """Replaces this process by the command."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    limit(spec)
    if spec["sandboxed"]:
        for capability in range(64):
            libc.prctl(CAPBSET_DROP, capability, 0, 0, 0)
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
        forbid(spec["filter"])
    null = os.open("/dev/null", os.O_WRONLY)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    stderr = os.dup(2)
    os.dup2(null, 2)
    os.set_inheritable(stderr, False)
    try:
        os.execve(spec["command"][0], spec["command"], environment)
    except OSError as error:
        os.write(stderr, f"{spec['command'][0]}: {error}".encode())
        os._exit(FAILED)


def resident(proc):
    """Returns the bytes of memory that the processes of this namespace have, this one left out."""
    pages = 0
    for name in os.listdir(proc):
        if name.isdigit() and name != "1":
            try:
                file = os.open(f"{name}/statm", os.O_RDONLY, dir_fd=proc)
            except OSError:  # it has ended
                continue
            with contextlib.suppress(OSError, IndexError):
                pages += int(os.read(file, 200).split()[1])
            os.close(file)
    return pages * resource.getpagesize()


def watch(child, spec, proc):
    """Waits for the command, and for its time and memory to be over; returns the status to end with."""
    until = time.monotonic() + spec["seconds"]
    while True:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return FAILED
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            if pid == 0:
                break
        if time.monotonic() > until:
            return TIME_OVER
        if proc is not None and resident(proc) > spec["memory"]:
            return MEMORY_OVER
        signal.sigtimedwait({signal.SIGCHLD}, TICK_S)


def first_process(spec):
    """Sets up the namespaces from inside and watches the command; everything ends with this process."""
    call("prctl", PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    call("prctl", DUMPABLE, 0, 0, 0, 0)
    proc, user = None, None
    if spec["sandboxed"]:
        user = spec["user"] if os.geteuid() == 0 and not spec["user_namespace"] else None
        proc = enter_new_root(spec)
    else:
        os.chdir(spec["folder"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # with a handler the command could send it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        run_command(spec, user)
    status = watch(child, spec, proc)
    if not spec["sandboxed"]:
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
    return status


def main():
    """Makes the namespaces and waits for their first process."""
    spec = json.loads(sys.argv[1])
    call("prctl", PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if spec["sandboxed"]:
        spec["user"] = 1_000_000_000 + os.getpid()
        spec["user_namespace"] = os.geteuid() != 0
        if spec["user_namespace"]:
            become_user_of_namespace()
        call("unshare", NEW_NAMESPACES)
    first = os.fork()
    if first == 0:
        guarded(lambda: first_process(spec))
    for descriptor in (0, 1, *spec["descriptors"]):
        os.close(descriptor)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF)


def guarded(run):
    """Ends the process with what `run` returns; says what failed."""
    try:
        status = run()
    except Exception as error:
        os.write(2, f"{error}".encode())
        status = FAILED
    os._exit(status)


if __name__ == "__main__":
    guarded(main)
