"""Programs that try to get out of the sandbox, or to break it (X1), and how each must end.

A program prints ESCAPED when something worked that must not; most of them carry on when the system refuses them, so
"passed" says that they were refused and ended in peace. `{folder}` is a folder of the host that everyone may write to,
`{port}` a server of the host's on 127.0.0.1, `{pid}` the host's process.
"""

from __future__ import annotations

TRY = """
def attempt(action, *errors):
    try:
        action()
    except (errors or OSError):
        return
    print("ESCAPED")
"""

LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(result):
    if result >= 0:
        print("ESCAPED")
"""

# name: (how it ends, the program)
PROGRAMS: dict[str, tuple[str, str]] = {
    "connects to a server": ("passed", TRY + """
import socket
attempt(lambda: socket.create_connection(("127.0.0.1", {port}), 1))
"""),
    "sends a datagram": ("passed", TRY + """
import socket
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port})))
"""),
    "asks a name server": ("passed", TRY + """
import socket
attempt(lambda: socket.getaddrinfo("example.com", 80))
"""),
    "listens": ("passed", TRY + """
import socket
attempt(lambda: socket.create_server(("127.0.0.1", 0)))
"""),
    "connects to an abstract socket": ("passed", TRY + """
import socket
attempt(lambda: socket.socket(socket.AF_UNIX).connect("\\0llmkit-test-{port}"))
"""),
    "reads /etc/passwd": ("passed", TRY + "attempt(lambda: open('/etc/passwd').read())"),
    "lists the home": ("passed", TRY + "import os\nattempt(lambda: os.listdir(os.path.expanduser('~root')))"),
    "reads a file of the host": ("passed", TRY + "attempt(lambda: open('{folder}/secret').read())"),
    "lists the root": ("passed", TRY + "import os\nattempt(lambda: os.listdir('/'))"),
    "climbs up": ("passed", TRY + "attempt(lambda: open('../../../../../../..{folder}/secret').read())"),
    "reads /proc": ("passed", TRY + """
for name in ("self/environ", "1/environ", "{pid}/environ", "self/maps", "mounts"):
    attempt(lambda: open("/proc/" + name, "rb").read())
"""),
    "reads the environment": ("passed", """
import os
if set(os.environ) - {{"PYTHONHASHSEED", "LC_ALL", "PYTHONUTF8", "LC_CTYPE"}}:
    print("ESCAPED")
"""),
    "writes to the host": ("passed", TRY + """
import os
for path in ("{folder}/left", "/left", "/usr/lib/left", os.path.dirname(os.__file__) + "/left.py", "/dev/left"):
    attempt(lambda: open(path, "w").write("x"))
"""),
    "writes through a link": ("passed", TRY + """
import os
os.symlink("{folder}/left", "link")
attempt(lambda: open("link", "w").write("x"))
attempt(lambda: os.link(os.__file__, "hard"))
"""),
    "changes the standard library": ("passed", TRY + """
import os, random
attempt(lambda: os.chmod(random.__file__, 0o777))
attempt(lambda: os.remove(random.__file__))
attempt(lambda: os.rename(random.__file__, "random.py"))
"""),
    "forks for ever": ("passed", """
import os
children = 0
for _ in range(1000):
    try:
        if os.fork() == 0:
            os._exit(0)
        children += 1
    except OSError:
        pass
if children:
    print("ESCAPED")
"""),
    "starts threads for ever": ("passed", """
import threading, time
try:
    for _ in range(1000):
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
    print("ESCAPED")
except RuntimeError:
    pass
"""),
    "takes 10 GB": ("memory", "x = 'a' * 10**10"),
    "takes memory bit by bit": ("memory", "x = []\nwhile True:\n    x.append(bytearray(1 << 20))"),
    "computes a huge number": ("timeout", "x = 7\nwhile True:\n    x = x * x"),
    "writes a file of 10 GB": ("crash", """
with open("big", "wb") as f:
    for _ in range(10_000):
        f.write(bytes(1 << 20))
print("ESCAPED")
"""),
    "fills the folder with files": ("crash", """
for i in range(100_000):
    open(str(i), "w").close()
print("ESCAPED")
"""),
    "fills the folder by many files": ("crash", """
for i in range(100):
    with open(str(i), "wb") as f:
        f.write(bytes(1 << 20))
print("ESCAPED")
"""),
    "opens files for ever": ("crash", "files = [open('/dev/null') for _ in range(10_000)]\nprint('ESCAPED')"),
    "floods its output": ("output", "while True:\n    print('x' * 1000)"),
    "floods the errors": ("output", "import os\nwhile True:\n    os.write(2, b'x' * 1000)"),
    "runs for ever": ("timeout", "while True:\n    pass"),
    "sleeps": ("timeout", "import time\ntime.sleep(1000)"),
    "ignores every signal": ("timeout", """
import signal
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
"""),
    "a regular expression without end": ("timeout", "import re\nre.match('(a+)+$', 'a' * 64 + 'b')"),
    "catches everything": ("timeout", """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""),
    "kills its parent": ("passed", """
import os
for pid in (os.getppid(), 1, {pid}, -1):
    for number in (2, 9, 15):
        try:
            os.kill(pid, number)
        except OSError:
            pass
"""),
    "kills itself": ("crash", "import os\nos.kill(os.getpid(), 9)"),
    "aborts": ("crash", "import os\nos.abort()"),
    "reads address 0": ("crash", "import ctypes\nctypes.string_at(0)"),
    "runs out of stack": ("crash", "def f():\n    f()\nf()"),
    "runs a shell": ("passed", TRY + """
import os, subprocess
attempt(lambda: os.execv("/bin/sh", ["sh", "-c", "true"]))
attempt(lambda: subprocess.run(["/bin/ls"]))
attempt(lambda: os.posix_spawn("/bin/ls", ["ls"], {{}}))
"""),
    "runs a program of its own": ("passed", TRY + """
import os
open("x", "w").write("#!/bin/sh\\n")
os.chmod("x", 0o755)
attempt(lambda: os.execv("./x", ["x"]))
"""),
    "traces another process": ("passed", LIBC + """
refused(libc.ptrace(16, os.getppid(), 0, 0))
refused(libc.ptrace(0, 0, 0, 0))
"""),
    "mounts": ("passed", LIBC + """
refused(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None))
refused(libc.mount(b"proc", b"/tmp", b"proc", 0, None))
refused(libc.umount2(b"/tmp", 2))
refused(libc.chroot(b"/tmp"))
"""),
    "makes namespaces": ("passed", LIBC + """
for flag in (0x10000000, 0x20000, 0x40000000):
    refused(libc.unshare(flag))
"""),
    "becomes another user": ("passed", TRY + """
import os
attempt(lambda: os.setuid(0))
attempt(lambda: os.setgid(0))
attempt(lambda: os.setgroups([0]))
"""),
    "raises its limits": ("passed", TRY + """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
    attempt(lambda: resource.setrlimit(kind, (1 << 40, 1 << 40)), OSError, ValueError)
"""),
    "makes a device": ("passed", TRY + """
import os, stat
attempt(lambda: os.mknod("disk", 0o600 | stat.S_IFBLK, os.makedev(254, 0)))
attempt(lambda: os.mknod("memory", 0o600 | stat.S_IFCHR, os.makedev(1, 1)))
"""),
    "odd system calls": ("passed", LIBC + """
for number in (321, 298, 425, 323, 250, 248, 304, 438, 310):  # bpf, perf, io_uring, userfaultfd, keys, handles, ...
    if libc.syscall(number, 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != 1:
        print("ESCAPED")
"""),
    "32-bit system calls": ("crash", LIBC + "libc.syscall(0x40000000 + 39)\nprint('ESCAPED')"),
    "changes the clock": ("passed", TRY + "import time\nattempt(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))"),
    "looks for open files": ("passed", """
import os
for fd in range(4, 256):
    try:
        os.fstat(fd)
        print("ESCAPED")
    except OSError:
        pass
"""),
    "speaks for the judge": ("crash", """
import json, os
for fd in range(3, 64):
    try:
        for kind in ("ready", "pass", "done"):
            os.write(fd, (json.dumps(["", kind, ""]) + "\\n").encode())
    except OSError:
        pass
os._exit(0)
"""),
    "leaves before the tests": ("crash", "import sys\nsys.exit(0)"),
    "leaves hard before the tests": ("crash", "import os\nos._exit(0)"),
    "leaves in a test": ("crash", "import os\nclass X(int):\n    def __eq__(self, other):\n        os._exit(0)\nX(1) == 1"),
    "raises what isn't an exception": ("crash", "raise KeyboardInterrupt"),
    "closes everything": ("crash", "import os\nos.closerange(0, 100)\nos._exit(0)"),
    "does not compile": ("crash", "def f(:"),
    "holds a NUL": ("crash", "x = '\\0' + eval('1\\0')"),
    "nests too deep": ("crash", "x = " + "[" * 1000 + "]" * 1000),
    "changes built-ins": ("crash", "import builtins, os, json\nbuiltins.print = os.write = json.loads = builtins.open = None"),
}  # fmt: skip
