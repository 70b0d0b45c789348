"""A script: what runs inside the sandboxes of `CodeReward`. Its first argument says as what.

`program FD`: runs the program in the descriptor as a script.
`serve FD IN OUT`: runs it as a module and answers requests for what it has defined.
`judge FD IN OUT VERDICTS`: runs the tests in the descriptor against such a module, which is in another
sandbox. The module answers with plain values, which are rebuilt here: nothing that it has changed in its own
interpreter is here, and the verdicts are written where it cannot write.
"""

import builtins
import json
import os
import sys
import types

LONGEST = 1 << 24
"""characters of one answer"""


def plain(value, keep):
    """Returns `value` as JSON; what is not of a plain type itself is kept and named by a number.

    Types are compared exactly: a subclass may say it is equal to everything.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple, set, frozenset):
        return {kind.__name__: [plain(v, keep) for v in value]}
    if kind is dict:
        return {"dict": [[plain(k, keep), plain(v, keep)] for k, v in value.items()]}
    if kind in (bytes, bytearray):
        return {kind.__name__: list(value)}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    return {"kept": keep(value)}


def rebuilt(given, of_kept):
    """Returns the value that `plain` has made."""
    if not isinstance(given, dict):
        return given
    ((kind, inner),) = given.items()
    if kind == "kept":
        return of_kept(inner)
    if kind == "dict":
        return {rebuilt(k, of_kept): rebuilt(v, of_kept) for k, v in inner}
    if kind == "complex":
        return complex(*inner)
    make = {t.__name__: t for t in (list, tuple, set, frozenset, bytes, bytearray)}[kind]
    return make(rebuilt(v, of_kept) for v in inner)


def read_all(descriptor):
    with os.fdopen(int(descriptor), "rb") as file:
        return file.read().decode()


def opened(reading, writing):
    return os.fdopen(int(reading), encoding="utf-8"), os.fdopen(int(writing), "w", encoding="utf-8")


def send(out, message):
    json.dump(message, out)
    out.write("\n")
    out.flush()


def as_script(code):
    sys.argv = ["program.py"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(read_all(code), "program.py", "exec"), main.__dict__)


def serve(code, reading, writing):
    requests, answers = opened(reading, writing)
    source = read_all(code)
    kept = []

    def keep(value):
        kept.append(value)
        return len(kept) - 1

    module = types.ModuleType("program")
    sys.modules["program"] = module
    exec(compile(source, "program.py", "exec"), module.__dict__)
    names = {
        n: plain(v, keep)
        for n, v in module.__dict__.items()
        if not n.startswith("_") and type(v) is not types.ModuleType
    }
    send(answers, {"value": names})
    operations = {
        "call": lambda x, *args, **kwargs: x(*args, **kwargs),
        "get": getattr,
        "item": lambda x, key: x[key],
        "len": len,
        "list": list,
        "in": lambda x, item: item in x,
        "str": str,
        "repr": repr,
    }
    for line in requests:
        request = json.loads(line)
        arguments = [rebuilt(a, kept.__getitem__) for a in request["args"]]
        keywords = {k: rebuilt(a, kept.__getitem__) for k, a in request["kwargs"].items()}
        try:
            value = operations[request["do"]](kept[request["on"]], *arguments, **keywords)
            answer = {"value": plain(value, keep), "args": [plain(a, keep) for a in arguments]}
        except BaseException as error:  # SystemExit as well: the tests are told
            answer = {"raised": type(error).__name__, "text": str(error)[:1000]}
        send(answers, answer)


class Module:
    """The other side of `serve`."""

    def __init__(self, answers, requests):
        self.answers, self.requests = answers, requests

    def receive(self):
        line = self.answers.readline(LONGEST)
        if not line.endswith("\n"):
            raise EOFError("the program has ended, or answers without end")
        return json.loads(line)

    def names(self):
        return {n: rebuilt(v, self.kept) for n, v in self.receive()["value"].items()}

    def kept(self, number):
        return Kept(self, int(number))

    def ask(self, do, number, args, kwargs):
        given = [plain(a, number_of) for a in args]
        named = {k: plain(a, number_of) for k, a in kwargs.items()}
        send(self.requests, {"do": do, "on": number, "args": given, "kwargs": named})
        answer = self.receive()
        if "raised" in answer:
            kind = getattr(builtins, str(answer["raised"]), RuntimeError)
            is_error = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if is_error else RuntimeError)(answer["text"])
        for mine, theirs in zip(args, answer["args"], strict=False):
            update(mine, rebuilt(theirs, self.kept))
        return rebuilt(answer["value"], self.kept)


def update(mine, theirs):
    """What a function does to a list, a dict or a set that it is given is part of what it does."""
    if type(mine) is not type(theirs):
        return
    if type(mine) is list:
        mine[:] = theirs
    elif type(mine) in (dict, set):
        mine.clear()
        mine.update(theirs)


def number_of(value):
    if type(value) is Kept:
        return object.__getattribute__(value, "_number")
    raise TypeError(f"tests cannot hand a {type(value).__name__} to the program, only plain values")


class Kept:
    """Something of the program that is no plain value: a function, a class, an object; equal to itself."""

    def __init__(self, module, number):
        self._module, self._number = module, number

    def __call__(self, *args, **kwargs):
        return self._module.ask("call", self._number, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._module.ask("get", self._number, (name,), {})

    def __getitem__(self, key):
        return self._module.ask("item", self._number, (key,), {})

    def __len__(self):
        return self._module.ask("len", self._number, (), {})

    def __bool__(self):
        return True

    def __iter__(self):
        return iter(self._module.ask("list", self._number, (), {}))

    def __contains__(self, item):
        return self._module.ask("in", self._number, (item,), {})

    def __str__(self):
        return self._module.ask("str", self._number, (), {})

    def __repr__(self):
        return self._module.ask("repr", self._number, (), {})


def judge(tests, reading, writing, verdicts):
    """Writes 1 or 0 for each test, in order."""
    answers, requests = opened(reading, writing)
    module = Module(answers, requests)
    names = {n: v for n, v in module.names().items() if not hasattr(builtins, n)}
    scope = {**names, "__name__": "tests", "__builtins__": builtins}
    for test in json.loads(read_all(tests)):
        try:
            exec(compile(test, "test.py", "exec"), scope)
            passed = b"1"
        except BaseException:  # a test that exits has not passed either
            passed = b"0"
        os.write(int(verdicts), passed)


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    {"program": as_script, "serve": serve, "judge": judge}[sys.argv[1]](*sys.argv[2:])
