"""What Linux offers to lock a process up, called through ctypes: namespaces, mounts, capabilities, Landlock, seccomp.

Standard library alone, as it runs inside the cage. Nothing here decides anything: `child` does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import struct

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 38, 47
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: object) -> int:
    """A function of libc. Raises OSError with its name."""
    result = int(getattr(_libc, name)(*args))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(number: int, *args: object) -> int:
    """A system call that libc has no function for. Raises OSError."""
    result = int(_libc.syscall(ctypes.c_long(number), *args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"syscall {number}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """Leaves the namespaces named."""
    _call("unshare", ctypes.c_int(flags))


def setns(fd: int, kind: int) -> None:
    """Enters a namespace."""
    _call("setns", ctypes.c_int(fd), ctypes.c_int(kind))


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    texts = [None if t is None else os.fsencode(t) for t in (source, target, kind, data)]
    try:
        _call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    except OSError as e:
        raise OSError(e.errno, f"mount {source} at {target}: {os.strerror(e.errno or 0)}") from None


def change_root(folder: str) -> None:
    """Makes a mounted folder the root, and lets go of the old one."""
    os.chdir(folder)
    number = {"x86_64": 155, "aarch64": 41}.get(platform.machine())
    if number is None:
        raise OSError(f"pivot_root on {platform.machine()} is not known here")
    _syscall(number, b".", b".")  # the old root now lies over the new one, in the same place
    _call("umount2", b".", ctypes.c_int(_MNT_DETACH))
    os.chdir("/")


def prctl(option: int, *args: int) -> None:
    padded = [*args, 0, 0, 0, 0][:4]
    _call("prctl", ctypes.c_int(option), *(ctypes.c_ulong(a) for a in padded))


def die_with_parent() -> None:
    """SIGKILL when the thread that forked this process ends."""
    prctl(_PR_SET_PDEATHSIG, 9)


def set_dumpable(on: bool) -> None:
    """Whether others of this user may look at the process, and whose its files in /proc are."""
    prctl(_PR_SET_DUMPABLE, int(on))


def no_new_privileges() -> None:
    """No execve gives more rights than there are; Landlock and seccomp ask for it."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def bound_capabilities() -> None:
    """None can be gained from now on; those that there are stay."""
    for capability in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break  # beyond the last that this kernel knows; without CAP_SETPCAP there are none to drop
    with contextlib.suppress(OSError):
        prctl(_PR_CAP_AMBIENT, 4)  # PR_CAP_AMBIENT_CLEAR_ALL


def drop_capabilities() -> None:
    """All of them."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", header, struct.pack("=6I", *[0] * 6))


# --- Landlock --------------------------------------------------------------------------------------------------------

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ = 0b1100  # READ_FILE, READ_DIR


def landlock_version() -> int:
    """Of the kernel; 0: it has none."""
    try:
        return _syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def landlock(version: int, read: list[str], write: list[str]) -> None:
    """From now on files can be read below some folders and written below others only; no TCP, no signals outward."""
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # how many rights to files this version knows
    files = (1 << rights) - 1
    network = 0b11 if version >= 4 else 0  # bind and connect
    scopes = 0b11 if version >= 6 else 0  # abstract sockets and signals
    attributes = struct.pack("=QQQ", files, network, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for folders, allowed in ((read, _READ), (write, files & ~1)):  # nothing is executed anywhere
            for folder in folders:
                fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
                try:
                    rule = struct.pack("=Qi", allowed if os.path.isdir(folder) else allowed & 0b110, fd)
                    _syscall(_LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
                finally:
                    os.close(fd)
        _syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


# --- seccomp ---------------------------------------------------------------------------------------------------------

# System calls that no program here needs, and through which kernels have been attacked: (x86_64, aarch64), -1: none.
_DENIED = {
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, -1), "ioperm": (173, -1), "create_module": (174, -1),
    "init_module": (175, 105), "delete_module": (176, 106), "finit_module": (313, 273), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "acct": (163, 89),
    "quotactl": (179, 60), "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "personality": (135, 92), "modify_ldt": (154, -1),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "lookup_dcookie": (212, 18),
    "fanotify_init": (300, 262), "vhangup": (153, 58), "mbind": (237, 235), "move_pages": (279, 239),
    "migrate_pages": (256, 238), "set_mempolicy": (238, 237), "memfd_secret": (447, 447),
    "landlock_restrict_self": (446, 446), "socket": (41, 198),
}  # fmt: skip
_CLONE, _CLONE3, _FORK, _VFORK = (56, 220), (435, 435), (57, -1), (58, -1)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NAMESPACES = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ERROR, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EPERM, _EAGAIN, _ENOSYS = 1, 11, 38


def seccomp_is_known() -> bool:
    """Whether the system calls of this machine are in the table above."""
    return platform.machine() in _ARCHITECTURES


@functools.cache
def seccomp_filter(may_fork: bool) -> bytes:
    """What `seccomp` applies: the calls of the table fail with EPERM.

    clone may make no namespaces, or nothing at all; clone3, whose flags a filter cannot see, doesn't exist; sockets of
    no kind are made; and another architecture's calls end the process.
    """
    column, architecture = _ARCHITECTURES[platform.machine()]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if column == 0:
        program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]  # x32
    for numbers in _DENIED.values():
        if numbers[column] >= 0:
            program += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ERROR | _EPERM)]
    program += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERROR | _ENOSYS)]
    if not may_fork:
        for numbers in (_CLONE, _FORK, _VFORK):
            program += [(_EQUAL, 0, 1, numbers[column] & 0xFFFFFFFF), (_RETURN, 0, 0, _ERROR | _EAGAIN)]
    program += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, _NAMESPACES)]
    program += [(_RETURN, 0, 0, _ERROR | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def seccomp(code: bytes) -> None:
    """Applies a filter to this process and all that it starts, for good."""
    instructions = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    buffer = ctypes.create_string_buffer(header, len(header))
    prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(buffer))
