"""What `bench/aot.py` keeps of a kernel's machine code, and where it is not what its row needs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spikedecoder.kernels._launch import SHARED_MEMORY

CAPPED = 64  # bytes of local memory, at the most, where registers are as many as were measured to be fastest
OPCODES = re.compile(r"\b((?:FFMA|LDG\.E|LDGSTS|STG\.E|LDL|STL)[.\w]*|(?:[HIQ]G?|UTC\w*)MMA\b(?:\.\w+)*)")
_WITHOUT_PRODUCT = (
    "scan_segments",
    "pack_kernel",
    "lif_forward",
    "norm_lif_forward",
    "moments_of_rows",
    "add_parts",
)  # kernels beside those with the product


@dataclass
class Compiled:
    """One kernel of a row on one target."""

    operator: str
    call: str
    dtype: str
    size: str
    needs: tuple[str, ...]
    kernel: str
    target: int
    registers: int
    shared: int
    local: int
    opcodes: dict[str, int]
    moved: float
    capped: bool  # asks for so many registers: with more, or fewer elements a thread, it was slower
    serial: bool  # every wgmma waits for the one before
    loop: (
        tuple[int, int, int] | None
    )  # warps, instructions, products; of spike_linear's kernels on sm_90 alone
    instructions: dict[str, float]  # an element, by kind; of the neurons' kernels on sm_90 alone
    made_of: str  # a number of all that decides it, and its faults

    def widths(self, *names: str) -> list[int]:
        """Widths in bits of the global accesses whose opcode starts with one of `names`."""
        found = set()
        for opcode in self.opcodes:
            if opcode.startswith(names):
                widths = [int(w) for w in re.findall(r"\.[US]?(16|32|64|128|256)\b", opcode)]
                found.add(max(widths, default=8 if re.search(r"\.[US]8\b", opcode) else 32))
        return sorted(found)

    @property
    def tensor_core(self) -> list[str]:
        return sorted({re.sub(r"\..*", "", o) for o in self.opcodes if "MMA" in o})

    @property
    def spills(self) -> int:
        return self.local + sum(n for o, n in self.opcodes.items() if o.startswith(("LDL", "STL")))


def beyond_memory(shared: int, target: int) -> list[str]:
    limit = SHARED_MEMORY[target]
    return [f"{shared} bytes of shared memory, a program has {limit}"] if shared > limit else []


def faults(c: Compiled) -> list[str]:
    """Where the compiled code is not what its row needs; empty if it is."""
    wrong = []
    wrong += beyond_memory(c.shared, c.target)
    if "no spill" in c.needs and (c.local > CAPPED if c.capped else c.spills):
        wrong.append(f"spills: {c.local} bytes of local memory")
    if "no FFMA" in c.needs and any(opcode.startswith("FFMA") for opcode in c.opcodes):
        wrong.append("multiplies and adds with one rounding, so that spikes depend on the compiler")
    if c.serial:
        wrong.append("every product waits for the one before (C7515 of ptxas)")
    most = min((int(n.split()[2]) for n in c.needs if n.endswith(" instructions")), default=0)
    if most and c.instructions and (count := sum(c.instructions.values())) > most:
        wrong.append(f"{count:.1f} instructions an element, {most} are enough")
    few = c.kernel == "add_parts"  # of what it reads it writes one in the number of parts
    for kind, names in (("load", ("LDG", "LDGSTS")), ("store", ("STG",))):
        least = max((int(n.split("-")[0]) for n in c.needs if n.endswith(f"-bit {kind}s")), default=0)
        widest = max(c.widths(*names), default=0)
        if widest < least and not (few and kind == "store"):
            wrong.append(f"widest {kind} is {widest} bits")
    if "tensor core" in c.needs and not c.tensor_core and c.kernel not in _WITHOUT_PRODUCT:
        wrong.append("no tensor-core instruction")
    return wrong
