"""Which system calls a sandboxed program may make, as a filter for Linux's seccomp."""

import platform

# Forbidden although a process without privileges may call them: memory that no limit counts, namespaces of
# its own, other processes, and what kernels have had holes in. Numbers on x86_64 and aarch64.
_DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "personality": (135, 92),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "pidfd_getfd": (438, 438),
}
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NAMESPACES = 0x7E020000
"""flags of clone that make namespaces"""
_AF_UNIX = 1
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""where they stand in what the filter sees"""
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _GIVE = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ALLOW, _NOT_PERMITTED, _NOT_THERE = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026

Row = tuple[int, int, int, int]
"""operation, rows to skip where it holds, where it does not, value"""


def numbers(*names: str) -> dict[str, int]:
    """Returns the numbers of system calls on this machine.

    Raises:
        KeyError: their numbers on this kind of machine are not known.
    """
    column, _ = _ARCHITECTURES[platform.machine()]
    return {name: _DENIED[name][column] for name in names}


def seccomp_filter() -> list[Row]:
    """Returns the filter: what is denied fails with EPERM; numbers of another architecture end the process.

    Raises:
        KeyError: the numbers on this kind of machine are not known.
    """
    column, architecture = _ARCHITECTURES[platform.machine()]
    rows: list[Row] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_GIVE, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),  # x32: other numbers for the same calls
        (_GIVE, 0, 0, _KILL),
    ]
    for denied in _DENIED.values():
        rows += [(_EQUAL, 0, 1, denied[column]), (_GIVE, 0, 0, _NOT_PERMITTED)]
    # The flags of clone3 cannot be looked at; where it is missing, libraries take clone.
    rows += [(_EQUAL, 0, 1, _CLONE3[column]), (_GIVE, 0, 0, _NOT_THERE)]
    rows += [
        (_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, _NAMESPACES),
        (_GIVE, 0, 0, _NOT_PERMITTED),
        (_GIVE, 0, 0, _ALLOW),
    ]
    # AF_VSOCK, for one, reaches the host of a virtual machine from any network namespace.
    rows += [
        (_EQUAL, 0, 3, _SOCKET[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 1, 0, _AF_UNIX),
        (_GIVE, 0, 0, _NOT_PERMITTED),
        (_GIVE, 0, 0, _ALLOW),
    ]
    return rows
