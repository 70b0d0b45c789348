"""Programs of a model in their sandbox: ten that are right, and what else they may try."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_lightning.errors import ConfigError, RewardError
from grpo_lightning.rewards import CodeReward, code, sandbox
from grpo_lightning.rewards.code import program_of
from grpo_lightning.rewards.sandbox import Limits, SandboxError, finish, handed_over, start, why_not

needs_namespaces = pytest.mark.skipif(
    why_not() is not None, reason=f"no sandbox on this machine: {why_not()}; CodeReward refuses to run"
)
pytestmark = needs_namespaces


def completion(program):
    return f"Let me think.\n```python\nprint('first try')\n```\nBetter:\n```python\n{program}\n```\nDone."


def score(program, *tests, **options):
    given = {"seconds": 3.0, "parallel": 2, **options}
    return CodeReward(**given)([completion(program)], tests=[list(tests)])[0]


def run(program, **limits):
    """Runs a program as a script in the sandbox; returns how it ended and what it wrote."""
    bounds = Limits(**{"seconds": 3.0, **limits})
    process = start(program, [], bounds, stdout=subprocess.PIPE)
    outcome = finish(process, bounds, process.stdout.fileno())
    return outcome.status, outcome.output.decode()


# --- right programs score right ---

HEALTHY = {
    "add": ("def add(a, b):\n    return a + b", ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]),
    "in place": (
        "def sort(xs):\n    xs.sort()",
        ["xs = [3, 1, 2]\nsort(xs)\nassert xs == [1, 2, 3]", "d = [0]\nassert sort(d) is None"],
    ),
    "floats": (
        "import math\ndef area(r):\n    return math.pi * r * r",
        ["import math\nassert math.isclose(area(2), 4 * math.pi)", "assert area(1e999) == float('inf')"],
    ),
    "class": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n"
        "    def push(self, x):\n        self.items.append(x)\n        return self\n"
        "    def pop(self):\n        return self.items.pop()\n"
        "    def __len__(self):\n        return len(self.items)",
        [
            "s = Stack()\ns.push(1).push({'a': (2, 3)})\nassert len(s) == 2\nassert s.pop() == {'a': (2, 3)}",
            "assert Stack().items == []",
            "try:\n    Stack().pop()\nexcept IndexError:\n    pass\nelse:\n    1 / 0",
        ],
    ),
    "generator": (
        "def primes(n):\n    for i in range(2, n):\n        if all(i % j for j in range(2, i)): yield i",
        ["assert list(primes(12)) == [2, 3, 5, 7, 11]", "assert 5 in primes(12)"],
    ),
    "recursion, big numbers": (
        "import sys\nsys.setrecursionlimit(9999)\ndef fact(n):\n    return n * fact(n - 1) if n else 1",
        ["assert fact(2000) % 1999 == 0", "assert len(str(fact(1500))) == 4115"],
    ),
    "containers": (
        "from collections import Counter\n"
        "def f(s):\n    return set(s), frozenset(s), dict(Counter(s)), s.encode()",
        ["assert f('aab') == ({'a', 'b'}, frozenset('ab'), {'a': 2, 'b': 1}, b'aab')"],
    ),
    "dataclass, typing": (
        "from dataclasses import dataclass\nfrom typing import List\n@dataclass\nclass P:\n    x: int\n"
        "class Solution:\n    def two(self, nums: List[int], t: int) -> P:\n"
        "        return P(next(i for i, n in enumerate(nums) if n == t))",
        ["assert Solution().two([4, 5, 6], 6).x == 2"],
    ),
    "humaneval": (
        "def below(xs, t):\n    return all(x < t for x in xs)",
        ["def check(candidate):\n    for t in (100, 20, 5):\n        assert candidate([1, 2, 4], t)\n"
         "    assert not candidate([1, 20, 4], 5)\ncheck(below)"],
    ),
    "script": (
        "import sys\nif __name__ == '__main__':\n    n = int(input())\n    for line in sys.stdin:\n"
        "        print(sum(map(int, line.split())) * n, ' ')\n",
        [{"input": "2\n1 2\n3 4\n", "output": "6\n14"}, {"input": "1\n5\n", "output": "5"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_ordinary_programs_pass_their_tests(name):
    program, tests = HEALTHY[name]
    assert score(program, *tests) == 1.0


def test_the_share_of_tests_or_all_of_them():
    program = "def f(x):\n    return x if x < 3 else 0"
    tests = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3", {"input": "", "output": ""}]
    assert score(program, *tests) == 0.75
    assert score(program, *tests, all_or_nothing=True) == 0.0
    assert score(program, *tests[:2], all_or_nothing=True) == 1.0


def test_many_rows_at_once_and_equal_ones_once(monkeypatch):
    ran = []
    judged = code.asserts_passed
    monkeypatch.setattr(code, "asserts_passed", lambda *a: ran.append(a) or judged(*a))
    good, bad = completion("def f(): return 1"), completion("def f(): return 2")
    message = [{"role": "assistant", "content": good}]
    tests = [["assert f() == 1"]] * 5 + [[], None]
    scores = CodeReward(parallel=2)(
        [good, bad, message, "no code at all", "```python\n```", good, good], tests
    )
    assert scores == [1.0, 0.0, 1.0, 0.0, 0.0, None, None]
    assert len(ran) == 3


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```py\na\nb\n```\n```python\nc\n```", "c\n"),
        ("```python\na = '```'\n```", "a = '```'\n"),
        ("```\na\n```", None),
        ("```python\nnever closed", None),
        ("", None),
    ],
)
def test_the_program_is_the_last_block(text, program):
    assert program_of(text) == program


@pytest.mark.parametrize("tests", [3, [3], [{"input": "a"}], [{"input": 1, "output": "b"}], [["a"]]])
def test_what_is_no_test_is_refused(tests):
    if tests == 3:
        tests = [None, {"in": "a"}]
    with pytest.raises(ConfigError, match="a row of the column 'tests' has"):
        CodeReward()([completion("a = 1")], tests=[tests])


@pytest.mark.parametrize(
    "option", [{"seconds": 0}, {"memory_mb": 1}, {"parallel": 0}, {"seconds": float("nan")}]
)
def test_options_out_of_range(option):
    with pytest.raises(ConfigError, match=f"code_reward {next(iter(option))} is "):
        CodeReward(**option)


# --- programs that try to pass without being right ---

CHEATS = {
    "exits early": "import sys\nsys.exit(0)",
    "exits hard": "import os\nos._exit(0)",
    "exits hard when called": "import os\ndef f(x):\n    os._exit(0)",
    "exits when called": "def f(x):\n    raise SystemExit(0)",
    "equal to everything": "class A:\n    __eq__ = lambda *_: True\ndef f(x):\n    return A()",
    "a number equal to everything": (
        "class A(int):\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef f(x):\n    return A()"
    ),
    "a tuple of such": "class A:\n    __eq__ = lambda *_: True\ndef f(x):\n    return [A()]",
    "patches builtins": (
        "import builtins\nbuiltins.AssertionError = builtins.Exception = BaseException\n"
        "builtins.print = builtins.len = builtins.abs = lambda *a: 0\n"
        "abs = len = isinstance = lambda *a: -1\n"
        "def f(x):\n    return 1.5"
    ),
    "shadows builtins": "abs = lambda x: -1\nlen = isinstance = abs\ndef f(x):\n    return 1.5",
    "writes verdicts": (
        "import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'1' * 100)\n"
        "    except OSError:\n        pass\n"
        "def f(x):\n    return None"
    ),
    "answers by itself": (
        "import os, json\nfor fd in range(3, 64):\n    try:\n"
        "        os.write(fd, b'{\"value\": {\"f\": 3, \"AssertionError\": 0}}\\n' * 100)\n"
        "    except OSError:\n        pass\nos._exit(0)"
    ),
    "reads the tests": (
        "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, str) and 'assert f' in o]\n"
        "def f(x):\n    return 42 if found else None"
    ),
    "ctypes in its own interpreter": (
        "import ctypes, sys\ndef f(x):\n    ctypes.memset(id(3) + 24, 0, 4)\n    return 42 if 3 == 0 else 0"
    ),
    "prints the marker": "print('1' * 100)\nprint('passed')\ndef f(x):\n    print('1')",
    "a value without end": "def f(x):\n    return 'x' * (1 << 25)",
    "loops for ever": "def f(x):\n    while True: pass",
    "raises an error of its own": "def f(x):\n    raise AssertionError",
    "no such name": "g = 1",
    "does not parse": "def f(x:",
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_do_not_pass(name):
    tests = ["assert f(3) == 42", "x = f(4)\nassert x == 43", "assert abs(f(5) - 44) < 1e-6"]
    assert score(CHEATS[name], *tests, seconds=1.5) == 0.0


def test_a_cheat_that_ends_takes_no_verdict_back():
    program = "import os\ndef f(x):\n    if x == 2:\n        os._exit(0)\n    return x"
    assert score(program, *[f"assert f({i}) == {i}" for i in range(4)]) == 0.5


@pytest.mark.parametrize(
    "program", ["print('5')\nraise SystemExit(1)", "import os\nos._exit(0)", "print(5, 5)"]
)
def test_scripts_are_judged_by_output_and_status(program):
    assert score(program, {"input": "", "output": "5"}) == 0.0
    assert score("print(5)", {"input": "", "output": "5"}) == 1.0


# --- the attacks: each program says what it could do ---


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            "import socket\n"
            "def tries(family, address):\n"
            "    try:\n"
            "        s = socket.socket(family, socket.SOCK_STREAM); s.settimeout(1); s.connect(address)\n"
            "        print('connected to', address)\n"
            "    except OSError as e: print('no')\n"
            f"tries(socket.AF_INET, ('127.0.0.1', {port}))\n"
            "tries(socket.AF_INET, ('1.1.1.1', 53))\n"
            "tries(socket.AF_INET6, ('::1', 53))\n"
            "tries(socket.AF_VSOCK, (2, 1))\n"
            "tries(socket.AF_UNIX, '\\0/tmp/.X11-unix/X0')\n"
        )
        assert run(program) == (0, "no\n" * 5)
        with socket.create_connection(("127.0.0.1", port)):
            pass  # the server was there


def test_no_abstract_socket_of_the_machine():
    name = f"\0grpo-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        program = f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})\nprint('in')"
        assert run(program) == (1, "")


@pytest.fixture
def secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    file = tmp_path / "id_rsa"
    file.write_text("a-secret")
    file.chmod(0o644)
    return file


def test_no_secrets(secret):
    places = [str(secret), str(Path.home() / ".ssh"), "/etc/passwd", "/proc/1/environ", "/proc/self/environ",
              f"/proc/{os.getpid()}/environ", "/root/.bashrc", "/work", "/home", "/sys", str(Path(__file__)),
              str(Path.cwd() / "pyproject.toml"), "../../../../../etc/passwd"]  # fmt: skip
    program = (
        "import os\n"
        f"for place in {places}:\n"
        "    for link in (place, '/tmp/link'):\n"
        "        try:\n"
        "            if link != place: os.symlink(place, link)\n"
        "            print(place, os.listdir(link) if os.path.isdir(link) else open(link).read())\n"
        "        except OSError: pass\n"
        "        if link != place: os.unlink(link)\n"
        "prefix = os.path.dirname(os.path.dirname(os.path.dirname(os.__file__)))\n"
        "print(sorted({*os.listdir(prefix)} - {'bin', 'lib', 'lib64'}))\n"
        "print(sorted(os.environ))\n"
        "print([k for k, v in os.environ.items() if 'secret' in v])\n"
    )
    assert run(program) == (0, "[]\n['HOME', 'LANG', 'PATH', 'TMPDIR']\n[]\n")


def test_no_way_back_through_descriptors_or_proc(secret):
    program = (
        "import os\n"
        "kinds = []\n"
        "for fd in range(3, 1024):\n"
        "    try: os.fstat(fd); kinds.append(fd)\n"
        "    except OSError: pass\n"
        "def no(f, *a):\n"
        "    try: f(*a); print('could', f.__name__, a)\n"
        "    except (OSError, AttributeError): pass\n"
        "for fd in kinds: no(os.fchdir, fd)\n"
        "no(os.chroot, '/tmp'); no(os.listdir, '/proc/1'); no(os.open, '/proc/1/root', 0)\n"
        "no(os.mknod, '/tmp/disk', 0o60666, os.makedev(8, 0))\n"
        "no(os.setuid, 0); no(os.setgid, 0)\n"
        "print(kinds, os.listdir('/proc'), os.getuid() > 0, os.getppid())\n"
    )
    assert run(program) == (0, "[] [] True 1\n")


SYSTEM_CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def tries(name, *arguments):
    if libc.syscall(*arguments) != -1: print('could', name)
x86 = os.uname().machine == 'x86_64'
def number(a, b): return ctypes.c_long(a if x86 else b)
tries('unshare user', number(272, 97), 0x10000000)
tries('unshare mount', number(272, 97), 0x20000)
tries('clone', number(56, 220), 0x10000000 | 17, 0, 0, 0, 0)
tries('mount', number(165, 40), b'tmpfs', b'/tmp', b'tmpfs', 0, 0)
tries('umount', number(166, 39), b'/tmp', 0)
tries('ptrace', number(101, 117), 16, 1, 0, 0)
tries('memfd', number(319, 279), b'x', 0)
tries('shmget', number(29, 194), 0, 1 << 20, 0o1600)
tries('keyctl', number(250, 219), 0, -3, 0)
tries('io_uring', number(425, 425), 8, ctypes.create_string_buffer(200))
tries('bpf', number(321, 280), 0, 0, 0)
tries('perf', number(298, 241), 0, 0, 0, 0, 0)
tries('setns', number(308, 268), 0, 0)
tries('clone3', number(435, 435), 0, 0)
print(open('/tmp/x', 'w').write('end'))
"""


def test_system_calls_that_lead_out_are_denied():
    assert run(SYSTEM_CALLS) == (0, "3\n")


def test_a_filter_does_not_let_another_architecture_pass():
    """32-bit calls have numbers of their own: int 0x80 with 1 would be exit."""
    program = (
        "import ctypes, mmap, os\n"
        "code = bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3])  # mov eax, getpid; int 0x80; ret\n"
        "m = mmap.mmap(-1, 4096, prot=7)\nm.write(code)\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "print(f() == os.getpid())\n"
    )
    if os.uname().machine != "x86_64":
        pytest.skip("the machine code is x86_64's")
    status, out = run(program)
    assert (status, out) in {
        (128 + signal.SIGSYS, ""),
        (128 + signal.SIGSEGV, ""),
    }  # no 32-bit calls: a fault


def processes():
    return {int(p) for p in os.listdir("/proc") if p.isdigit()}


def nothing_left(before, seconds=5):
    """Whether every process that runs in a sandbox has gone: those of user ids that sandboxes take."""

    def left():
        out = []
        for pid in processes() - before:
            try:
                if os.stat(f"/proc/{pid}").st_uid >= 1_000_000_000:
                    out.append(pid)
            except OSError:
                continue
        return out

    until = time.monotonic() + seconds
    while left() and time.monotonic() < until:
        time.sleep(0.05)
    return not left()


def test_a_fork_bomb():
    before = processes()
    most = []
    done = threading.Event()

    def count():
        while not done.wait(0.05):
            most.append(len(processes() - before))

    counter = threading.Thread(target=count)
    counter.start()
    status, _ = run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", seconds=2.0)
    done.set()
    counter.join()
    assert status == 124
    assert max(most) < 60  # 16 of the bomb, and what else starts on this machine
    assert nothing_left(before)


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10 << 30)\nprint('had it')",
        "x = []\nwhile True: x.append(bytearray(10 << 20))",
        # each below the limit of one process, together above it
        "import os, time\nfor _ in range(12):\n    if os.fork() == 0: break\n"
        "x = bytearray(b'x') * (300 << 20)\ntime.sleep(2)\nprint('had it')",
    ],
    ids=["at once", "bit by bit", "by many"],
)
def test_memory(program):
    before = free_memory()
    least = []
    done = threading.Event()

    def look():
        while not done.wait(0.02):
            least.append(free_memory())

    looker = threading.Thread(target=look)
    looker.start()
    status, out = run(program, seconds=10.0)
    done.set()
    looker.join()
    assert status == (123 if "fork" in program else 1)
    assert out == ""
    assert before - min(least) < 4 << 30


def free_memory():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def test_a_write_of_1_gb():
    program = (
        "import os\nfor where in ('/', '/usr/lib', os.path.dirname(os.__file__), '/tmp'):\n"
        "    n = 0\n"
        "    try:\n"
        "        for i in range(40):\n"
        "            with open(f'{where}/file{i}', 'wb') as f:\n"
        "                for _ in range(25): n += f.write(bytes(1 << 20))\n"
        "    except OSError: pass\n"
        "    print(where, n >> 20)\n"
        "    assert where == '/tmp' or os.statvfs(where).f_flag & os.ST_RDONLY\n"
    )
    status, out = run(program, seconds=20.0)
    assert status == 0
    written = dict(line.split() for line in out.splitlines())
    assert int(written.pop("/tmp")) <= 33
    assert set(written.values()) == {"0"}


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(1e6)", "10 ** 10 ** 10"])
def test_an_endless_loop(program):
    began = time.monotonic()
    assert run(program, seconds=1.0)[0] in (124, 1)
    assert time.monotonic() - began < 5


def test_killing_the_parent():
    program = (
        "import os, signal, time\n"
        f"for pid in (1, os.getppid(), {os.getpid()}, {os.getppid()}):\n"
        "    for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP, signal.SIGUSR1):\n"
        "        try: os.kill(pid, s)\n"
        "        except OSError: pass\n"
        "time.sleep(0.2)\n"
        "print('still here')\n"
        "try: os.kill(-1, signal.SIGKILL)\n"
        "except OSError: pass\n"
    )
    assert run(program) == (0, "still here\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_an_output_flood(stream):
    began = time.monotonic()
    program = f"import sys\nwhile True: sys.{stream}.write('x' * 65536)"
    status, out = run(program, seconds=2.0)
    assert status != 0
    assert len(out) <= Limits().output
    assert time.monotonic() - began < 8


def test_a_daemon_is_not_left_behind():
    before = processes()
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)\n"
        "time.sleep(0.2)\nprint('done')"
    )
    assert run(program) == (0, "done\n")
    assert nothing_left(before)


def test_one_program_does_not_see_another():
    """Each has a /tmp of its own."""
    assert run("open('/tmp/note', 'w').write('x')\nprint('wrote')") == (0, "wrote\n")
    assert run("import os\nprint(os.listdir('/tmp'))") == (0, "[]\n")


def test_what_is_handed_over_cannot_be_written():
    with handed_over("x = 1") as descriptor:
        with pytest.raises(PermissionError):
            os.write(descriptor, b"y")
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 1 << 30)
        assert os.pread(descriptor, 10, 0) == b"x = 1"


def test_a_sandbox_ends_with_the_process_that_has_started_it():
    before = processes()
    script = (
        "import subprocess\nfrom grpo_lightning.rewards.sandbox import *\n"
        "program = 'import time\\nprint(1, flush=True)\\ntime.sleep(1000)'\n"
        "p = start(program, [], Limits(seconds=900.0), stdout=subprocess.PIPE)\n"
        "print(p.stdout.readline().decode(), flush=True)\nimport time\ntime.sleep(1000)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert child.stdout.readline() == b"1\n"
    child.kill()
    child.wait()
    assert nothing_left(before)


# --- where it breaks, and for whom ---


def test_a_sandbox_that_breaks_later_is_an_error_and_no_score(monkeypatch):
    reward = CodeReward(parallel=1)

    def breaks(*_):
        raise SandboxError("no space left")

    monkeypatch.setattr(code, "asserts_passed", breaks)
    with pytest.raises(RewardError, match="could not be set up: no space left"):
        reward([completion("a = 1")], tests=[["assert a"]])


def test_a_set_up_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(sandbox, "_LIBRARIES", ())
    monkeypatch.setattr(sandbox.sys, "base_prefix", "/nowhere")
    with pytest.raises(SandboxError, match=r"python.*No such file"):
        run("print(1)")


def test_a_user_without_privileges_has_the_same_sandbox(tmp_path):
    python = shutil.which("python3", path="/usr/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, to become somebody else, and a Python that everybody may read")
    if subprocess.run(
        [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False
    ).returncode:
        pytest.skip("the machine's own Python is older than 3.11")
    shutil.copytree(
        Path(sandbox.__file__).parents[1], "/tmp/grpo-everybody/grpo_lightning", dirs_exist_ok=True
    )
    script = (
        "import sys; sys.path.insert(0, '/tmp/grpo-everybody')\n"
        "from grpo_lightning.rewards import CodeReward\n"
        "c = '```python\\n{}\\n```'.format\n"
        "bomb = 'import os\\ndef f():\\n    n = 0\\n    try:\\n        while n < 100:\\n"
        "            if os.fork() == 0: os.read(0, 1); import time; time.sleep(100)\\n"
        "            n += 1\\n    except OSError: pass\\n    return n'\n"
        'escape = \'import os\\ndef f(): return os.listdir("/proc") + os.listdir("/tmp") + [os.getuid()]\'\n'
        "r = CodeReward(parallel=1, seconds=3)\n"
        "print(r([c('def f(): return 1'), c(bomb), c(escape)],"
        " [['assert f() == 1'], ['assert 0 < f() < 16'], ['assert f() == [65534]']]))\n"
    )
    try:
        done = subprocess.run(
            [python, "-c", script], capture_output=True, text=True, check=False, user=65534, group=65534,
            extra_groups=[], cwd="/",
        )  # fmt: skip
    finally:
        shutil.rmtree("/tmp/grpo-everybody")
    if "does not allow" in done.stderr:
        pytest.skip(f"users may not make namespaces here: {done.stderr[-300:]}")
    assert done.stdout == "[1.0, 1.0, 1.0]\n", done.stderr
