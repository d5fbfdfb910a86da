"""Every kernel compiled for sm_80, sm_90 and sm_100 without a GPU: no spills, wide accesses, tensor cores.

`bench/aot.py` compiles in a process of its own, since the tests themselves run kernels under the interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from spikedecoder.kernels import _launch

SCRIPT = Path(__file__).parent.parent / "bench" / "aot.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("aot", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot"] = module
    sys.path.insert(0, str(SCRIPT.parent))  # for the rows beside it
    spec.loader.exec_module(module)
    return module


aot = load_script()
aot_code, aot_rows = sys.modules["aot_code"], sys.modules["aot_rows"]
OPERATORS = sorted({row.operator for row in aot.rows()})


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def compile_for(targets: tuple[int, ...], folder: Path, *arguments: str) -> list[dict[str, Any]]:
    result = folder / "aot.json"
    flags = [flag for target in targets for flag in ("--target", str(target))]
    done = run("--json", str(result), *flags, *arguments)
    assert result.exists(), done.stderr
    return json.loads(result.read_text())


def check(compiled: list[dict[str, Any]]) -> None:
    wrong = [
        f"{c['kernel']} ({c['call']}, {c['dtype']}, {c['size']}, sm_{c['target']}): {c['faults']}"
        for c in compiled
        if c["faults"]
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_compile_well_for_hopper(tmp_path: Path) -> None:
    """Two calls of each operator."""
    compiled = compile_for((90,), tmp_path, "--first", "2")
    assert sorted({c["operator"] for c in compiled}) == OPERATORS
    check(compiled)
    counted = {c["kernel"] for c in compiled if c["instructions"]}
    assert counted >= {"lif_forward", "lif_backward", "norm_lif_forward", "norm_lif_backward"}


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, aot.triton.__version__.split(".")[:2])) < (3, 9),
    reason="older ones spill on sm_80 and sm_100",
)
def test_all_kernels_compile_well_for_all_targets(tmp_path: Path) -> None:
    """What docs/kernels.md does not show as it is now, each call for one of the targets in turn.

    `python bench/aot.py` compiles each call for each target, and writes the page.
    """
    check(compile_for(aot.TARGETS, tmp_path, "--spread", "--changed"))


def test_only_what_changed_is_compiled_again(tmp_path: Path) -> None:
    """What is on the page has each call and target, without a fault, or is compiled."""

    def launch(source: str = "a", dtype: torch.dtype = torch.float32, T: int = 4, **options: int) -> Any:
        kernel = types.SimpleNamespace(__name__="k", cache_key=source)
        return _launch.Launch(kernel, (1,), {"x_ptr": torch.empty(4, dtype=dtype), "T": T}, options)

    changed = launch("b"), launch(dtype=torch.bfloat16), launch(T=8), launch(num_warps=8)
    numbers = {aot.made_of(each, 90, ()) for each in (launch(), *changed)}
    numbers |= {aot.made_of(launch(), 80, ()), aot.made_of(launch(), 90, ("no spill",))}
    assert len(numbers) == 1 + len(changed) + 2 and aot.made_of(launch(), 90, ()) in numbers
    page = tmp_path / "kernels.md"
    good, bad = example(made_of="0123456789"), example(made_of="abcdef0123", local=8)
    page.write_text(aot.table([good, bad]))
    assert aot.on_the_page(page) == {"0123456789"}

    only = "--only", "pack_spikes,binarize"
    compiled = compile_for((90,), tmp_path, *only)
    assert len(compiled) == len({c["made_of"] for c in compiled}) == 4
    for c in compiled:
        c.pop("faults")
    page.write_text(aot.table([aot.Compiled(**c) for c in compiled[1:]]))
    again = compile_for((90,), tmp_path, *only, "--changed", "--page", str(page))
    assert [c["made_of"] for c in again] == [compiled[0]["made_of"]]


@pytest.mark.slow
def test_every_case_passes_the_compilers_types() -> None:
    """The interpreter lets pass what the compiler refuses, such as a name with two types."""
    done = run("--cases", "--types-only", "--target", "90")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 500


def example(**changes: Any) -> Any:
    values = {
        "operator": "lif", "call": "forward", "dtype": "bf16", "size": "", "kernel": "k", "target": 90,
        "needs": (*aot_rows.ROUNDED, *aot_rows.DOT), "registers": 40, "shared": 0, "local": 0, "moved": 0.0,
        "opcodes": {"LDG.E.128": 4, "LDG.E.LTC128B.128": 1, "STG.E.128": 4, "HGMMA.64x64x16.F32.BF16": 2},
        "capped": False, "serial": False, "loop": None, "instructions": {}, "made_of": "0123456789",
    }  # fmt: skip
    return aot.Compiled(**{**values, **changes})


def test_the_reader_sees_what_is_wrong() -> None:
    good = example()
    assert aot.faults(good) == [] and good.widths("LDG") == [128] and good.tensor_core == ["HGMMA"]
    narrow = example(
        opcodes={"LDG.E.64": 1, "LDG.E.LTC128B": 1, "LDG.E.U16": 1, "STG.E": 1, "HMMA.16816.F32": 1}
    )
    assert narrow.widths("LDG") == [16, 32, 64]
    assert aot.faults(narrow) == ["widest load is 64 bits", "widest store is 32 bits"]
    assert any("spills" in fault for fault in aot.faults(example(local=8)))
    few = {"capped": True, "opcodes": {**good.opcodes, "LDL.LU": 2}}
    assert aot.faults(example(local=aot_code.CAPPED, **few)) == []
    assert any("spills" in fault for fault in aot.faults(example(local=aot_code.CAPPED + 8, **few)))
    assert any(
        "one rounding" in fault for fault in aot.faults(example(opcodes={**good.opcodes, "FFMA.FTZ": 1}))
    )
    assert any("waits for the one before" in fault for fault in aot.faults(example(serial=True)))
    assert any("shared memory" in fault for fault in aot.faults(example(shared=300 * 1024)))
    assert any("spills" in fault for fault in aot.faults(example(opcodes={**good.opcodes, "LDL.LU": 2})))
    assert any(
        "tensor-core" in fault
        for fault in aot.faults(example(opcodes={"LDG.E.128": 1, "STG.E.128": 1, "IADD3": 9}))
    )


LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   FFMA R0, R1, R2, R3 ;
        /*0028*/                   SHFL.BFLY PT, R4, R5, 0x1, 0x1f ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/               @P0 EXIT ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""


def test_instructions_are_counted_as_often_as_loops_go_round() -> None:
    """Each of 3 programs walks 36 rows 2 at a time, each in 4 pieces of T."""
    launch = types.SimpleNamespace(
        kernel=types.SimpleNamespace(__name__="norm_lif_backward"), grid=(3, 1), options={"num_warps": 2},
        arguments={"T": 8, "CHUNK": 2, "rows": 36, "BLOCK_R": 2, "x_ptr": torch.empty(8, 36, 4)},
    )  # fmt: skip
    counted = aot.aot_sass.per_element(LISTING, launch)
    share = 3 * 64 / (8 * 36 * 4)  # threads an element
    rows = 6
    want = {"float": 4 * rows, "shuffle": 4 * rows, "global": rows + 1, "shared": rows, "other": 5 * rows + 3}
    assert {kind: n / share for kind, n in counted.items() if n} == pytest.approx(want)
    total = sum(counted.values())
    assert aot.faults(example(instructions=counted, needs=(f"at most {int(total) + 1} instructions",))) == []
    many = example(instructions=counted, needs=(f"at most {int(total)} instructions",))
    assert aot.faults(many) == [f"{total:.1f} instructions an element, {int(total)} are enough"]
    assert f"| {total:.1f} |" in aot.aot_sass.table([many], 1.0)


def test_products_are_counted_in_the_loop_that_has_them() -> None:
    line = "        /*0020*/                   FFMA R0, R1, R2, R3 ;"
    code = LISTING.replace(line, line.replace("FFMA R0", "HGMMA.64x128x16.F32.BF16 R24, R88") + "\n" + line)
    found = aot.aot_sass.product_loop(code, 8)
    assert found == (4, 2 * 64 * 128 * 16) and aot.aot_sass.product_loop(LISTING, 8)[1] == 0
    text = aot.aot_sass.product_table([example(loop=(8, *found)), example()])
    assert text.splitlines()[2:] == ["| k | forward | bf16 |  | 8 | 4 | 8 | 262144 | 128 |"]


def test_every_operator_of_the_backend_is_compiled() -> None:
    modules = {path.stem for path in (SCRIPT.parent.parent / "kernels").glob("[!_]*.py")}
    assert modules == set(OPERATORS)
