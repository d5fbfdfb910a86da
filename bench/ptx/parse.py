"""PTX text -> kernels: parameters, shared memory, and instructions with their operands."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_LABEL = re.compile(r"([$\w.]+):(?!:)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.S)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+"  # its type
    r"(?:\.ptr\s+)?(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?"  # of what it points to
    r"([\w$]+)(?:\[(\d+)\])?\s*$"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_ADDRESS = re.compile(r"\[\s*([^\s+\-\]]+)\s*([+-]?)\s*([^\]\s]*)\s*\]$")
_THREADS = re.compile(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_NUMBER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d+)U?$")


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Negated:
    """A predicate's opposite."""

    name: str


@dataclass(frozen=True)
class Number:
    """An immediate: an integer, or the bits of a float."""

    value: int


@dataclass(frozen=True)
class Special:
    """%tid.x and the like."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Number
    offset: int


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


Operand = Register | Negated | Number | Special | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """`guard`: None where the instruction is not predicated."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | Negated | None
    text: str


@dataclass(eq=False)
class Kernel:
    name: str
    parameters: list[tuple[str, str]]  # (name, type)
    registers: dict[str, str]  # type of each register: pred, b8, b16, b32, b64
    shared: dict[str, int]  # address of each variable in shared memory
    shared_size: int  # of those whose size is known
    threads: int | None = None  # of a program, where the code says so
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index into code


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX module by name."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*$", "", text, flags=re.M)
    text = re.sub(r"^\s*\.section\b.*?\{.*?\n?\s*\}", "", text, flags=re.M | re.S)
    module_shared = _SHARED.findall(text[: m.start()] if (m := _ENTRY.search(text)) else "")
    return {m[1]: _kernel(m, text, module_shared) for m in _ENTRY.finditer(text)}


def _kernel(entry: re.Match[str], text: str, module_shared: list[tuple[str, str, str]]) -> Kernel:
    parameters = []
    for declared in filter(None, map(str.strip, entry[2].split(","))):
        found = _PARAMETER.match(" ".join(declared.split()))
        if found is None:
            raise ValueError(f"no parameter: {declared!r}")
        if found[3]:
            raise NotImplementedError(f"a parameter that is a struct: {declared!r}")
        parameters.append((found[2], found[1]))
    kernel = Kernel(entry[1], parameters, {}, {}, 0)
    if threads := _THREADS.search(entry[3]):
        kernel.threads = math.prod(int(n) for n in threads.groups() if n)
    body = _matching(text, entry.end())
    variables = [*module_shared, *_SHARED.findall(body)]
    variables.sort(key=lambda variable: not variable[2])  # those of no size lie behind all others
    for align, name, size in variables:
        kernel.shared_size = -(-kernel.shared_size // int(align)) * int(align)
        kernel.shared[name] = kernel.shared_size
        kernel.shared_size += int(size or 0)
    _statements(kernel, body)
    return kernel


def _matching(text: str, start: int) -> str:
    """From behind an opening brace to the closing one."""
    depth, i = 1, start
    while True:
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[start:i]
        i += 1


def _statements(kernel: Kernel, body: str) -> None:
    scopes: list[dict[str, str]] = [{}]  # what registers and labels of an inner scope are called outside
    opened, i = 0, 0
    while i < len(body):
        if body[i].isspace() or body[i] == ";":
            i += 1
        elif body[i] == "{":
            opened += 1
            i += 1
            inside = _LABEL.findall(_matching(body, i))
            scopes.append({label: f"{label}@{opened}" for label in inside})
        elif body[i] == "}":
            scopes.pop()
            i += 1
        elif label := _LABEL.match(body, i):
            kernel.labels[_inner(label[1], scopes)] = len(kernel.code)
            i = label.end()
        else:
            end = body.index(";", i)
            statement = " ".join(body[i:end].split())
            i = end + 1
            if declared := _REGISTERS.match(statement):
                _declare(kernel, declared[1], declared[2], scopes[-1] if len(scopes) > 1 else None)
            elif not statement.startswith("."):
                kernel.code.append(_instruction(kernel, statement, scopes))


def _declare(kernel: Kernel, kind: str, names: str, scope: dict[str, str] | None) -> None:
    """`scope`: of the braces around, None outside of all."""
    if kind != "pred":
        size = re.fullmatch(r"[bsuf](8|16|32|64)", kind)
        if size is None:
            raise NotImplementedError(f".reg .{kind} {names}")
        kind = f"b{size[1]}"
    for declared in map(str.strip, names.split(",")):
        many = re.fullmatch(r"(%?\w+)<(\d+)>", declared)
        for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [declared]:
            if scope is not None:
                scope[name] = f"{name}@{len(kernel.registers)}"
            kernel.registers[_inner(name, [scope or {}])] = kind


def _instruction(kernel: Kernel, statement: str, scopes: list[dict[str, str]]) -> Instruction:
    guard: Register | Negated | None = None
    rest = statement
    if statement.startswith("@"):
        predicate, rest = statement[1:].split(None, 1)
        given = _operand(kernel, predicate, scopes)
        if not isinstance(given, Register | Negated):
            raise ValueError(f"no predicate: {statement!r}")
        guard = given
    name, _, arguments = rest.partition(" ")
    first, *modifiers = name.split(".")
    operands = tuple(_operand(kernel, part, scopes) for part in _split(arguments))
    return Instruction(first, tuple(modifiers), operands, guard, statement)


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[last:i].strip())
            last = i + 1
    rest = text[last:].strip()
    return [*parts, rest] if rest else parts


def _inner(name: str, scopes: list[dict[str, str]]) -> str:
    return next((scope[name] for scope in reversed(scopes) if name in scope), name)


def _operand(kernel: Kernel, text: str, scopes: list[dict[str, str]]) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(kernel, part, scopes) for part in _split(text[1:-1])))
    if text.startswith("["):
        found = _ADDRESS.match(text)
        if found is None:
            raise ValueError(f"no address: {text!r}")
        base, sign, offset = found.groups()
        moved = int(offset, 0) if offset else 0
        at = _operand(kernel, base, scopes)
        if not isinstance(at, Register | Symbol | Number):
            raise ValueError(f"no address: {text!r}")
        return Address(at, -moved if sign == "-" else moved)
    if "|" in text:
        return Vector(tuple(_operand(kernel, part.strip(), scopes) for part in text.split("|")))
    inner = _inner(text.lstrip("!"), scopes)
    if inner in kernel.registers:
        return Negated(inner) if text.startswith("!") else Register(inner)
    if text.startswith("%"):
        return Special(text)
    if re.match(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$", text):
        return Number(int(text[2:], 16))
    if _NUMBER.match(text):
        return Number(int(text.rstrip("U"), 0))
    return Symbol(inner)
