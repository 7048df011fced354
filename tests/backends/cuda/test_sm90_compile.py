"""The sm_90a kernels as nvcc compiles them: resources, instructions, and the order of instructions that order memory.
Needs no GPU."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import sm90

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
FLAGS = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a"]
# The fp16 kernels come from the same templates. The test of the built extension looks at them too.
KERNELS = ("forward_bf16", "backward_bf16", "decode")
THREADS, REGISTERS = 384, 65536
COUNT = {"forward_bf16": 9, "backward_bf16": 9, "decode": 8}
"""The number of kernels in each file. Forward and backward: three ranks times three plans. decode: four numbers of rows
times two types."""
MOST = {"forward": 232, "backward": 232, "decode": REGISTERS // THREADS // 8 * 8}
"""The registers that a consumer thread may use: the number that setmaxnreg takes, or that of the launch bound."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc"),
    pytest.mark.timeout(600),  # the first test compiles every kernel
]


@functools.cache
def nvcc_version() -> tuple[int, int]:
    """Return the version of nvcc."""
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", said).groups()
    return int(major), int(minor)


def _compiled(job: tuple[str, str]) -> tuple[Path, str]:
    """Return the .cubin or .ptx file of a kernel file, and the messages of ptxas. It is compiled once for each
    content of the sources and each nvcc."""
    name, kind = job
    sources = sorted([*sm90.SM90.iterdir(), *sm90.SM90.parent.glob("keep_mask.*"), sm90.ROOT / "csrc" / "philox.h"])
    content = b"".join(path.read_bytes() for path in sources) + " ".join(map(str, nvcc_version())).encode()
    digest = hashlib.sha256(content).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"lora_kernels_tests_{digest}")
    source = next(path for path in (sm90.SM90 / f"{name}.cu", sm90.SM90.parent / f"{name}.cu") if path.exists())
    target, log = folder / f"{name}.{kind}", folder / f"{name}.{kind}.log"
    if not log.exists():
        folder.mkdir(exist_ok=True)
        target_flags = [*FLAGS, "-cubin", "-Xptxas=-v"]
        flags = target_flags if kind == "cubin" else ["-std=c++17", "-O3", "-arch=compute_90a", "-ptx"]
        command = [NVCC, *flags, str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        log.write_text(done.stdout + done.stderr)
    return target, log.read_text()


@functools.cache
def cubins() -> dict[str, tuple[Path, str]]:
    """Return what `_compiled` returns, by the name of the kernel file."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KERNELS, pool.map(_compiled, [(name, "cubin") for name in KERNELS]), strict=True))


def cuobjdump() -> str | None:
    """Return the path of cuobjdump, from the CUDA toolkit or from Triton's wheel, or None."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.submodule_search_locations:
        found = shutil.which("cuobjdump", path=Path(triton.submodule_search_locations[0], "backends", "nvidia", "bin"))
    return found


@functools.cache
def sass(name: str) -> dict[str, dict[int, str]]:
    """Return the instructions of every kernel of a file: kernel name → address → instruction."""
    text = subprocess.run([cuobjdump(), "-sass", cubins()[name][0]], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, dict[int, str]] = {}
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            kernels[match[1]] = body = {}
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            body[int(match[1], 16)] = match[2]
    return kernels


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_fit_the_register_file_and_do_not_spill(name: str) -> None:
    log = cubins()[name][1]
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(usage) == COUNT[name], log
    assert set(usage) == {("0", "0", "0")}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == COUNT[name]
    assert max(registers) * THREADS <= REGISTERS


@pytest.mark.parametrize("name", KERNELS)
def test_ptxas_keeps_wgmma_asynchronous_and_setmaxnreg(name: str) -> None:
    """ptxas warns with C7508 where it ignores setmaxnreg, and with C7510 to C7514 where it serialises wgmma."""
    assert re.findall(r"C75\d\d[^\n]*|warning[^\n]*", cubins()[name][1]) == []


@pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump: install the CUDA toolkit or Triton")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_use_the_instructions_of_hopper_and_no_local_memory(name: str) -> None:
    part = name.split("_")[0]
    kernels = sass(name)
    assert len(kernels) == COUNT[name]
    for kernel, body in kernels.items():
        text = "\n".join(body.values())
        wanted = ["HGMMA", "UTMALDG", "SYNCS"] + (["UTMASTG", "STSM", "USETMAXREG"] if part != "decode" else [])
        assert [op for op in wanted if not re.search(rf"\b{op}\b", text)] == [], kernel
        assert not re.search(r"\b(LDL|STL|HMMA)\b", text), kernel
        assert max(map(int, re.findall(r"\bR(\d+)\b", text))) < MOST[part], kernel
        pairs = "ELi2EEEv" in kernel  # CLUSTER is the last template parameter
        assert bool(re.search(r"\bUTMALDG\.2D\.MULTICAST\b", text)) == pairs, kernel
        assert text.count("UCGABAR_ARV") == text.count("UCGABAR_WAIT") == 2 * pairs, kernel  # at both ends


@pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump: install the CUDA toolkit or Triton")
@pytest.mark.parametrize("name", ["forward_bf16", "backward_bf16"])
def test_a_producer_uses_no_register_that_it_has_given_up(name: str) -> None:
    """The producer's threads keep 40 registers each and the consumers' take 232, which a multiprocessor has. No path
    that starts at setmaxnreg.dec uses a register beyond those 40."""
    assert REGISTERS >= 128 * 40 + 256 * 232
    for kernel, body in sass(name).items():
        (start,) = (at for at, instruction in body.items() if "USETMAXREG.DEALLOC" in instruction)
        assert body[start].endswith(f" {40:#x}")
        follows = dict(itertools.pairwise(body))
        seen, todo, most = set(), [start], 0
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            most = max(most, *map(int, re.findall(r"\bR(\d+)\b", body[at])), 0)
            if jump := re.search(r"\b(BRA|CALL)\b.* (0x[0-9a-f]+)", body[at]):
                todo.append(int(jump[2], 16))
            goes_on = body[at].startswith("@") or not re.match(r"BRA|EXIT|RET", body[at])
            todo += [follows[at]] if goes_on and at in follows else []
        assert len(seen) > 200, kernel
        assert most < 40, kernel


@pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump: install the CUDA toolkit or Triton")
@pytest.mark.parametrize("name", ["forward_bf16", "backward_bf16"])
def test_main_loops_keep_the_tensor_cores_busy(name: str) -> None:
    """A stage of a y or dx tile is four wgmmas in a row, and then a wait for those of the stage before.

    No instruction in the loop waits for memory. Only wgmma touches the accumulators: any other instruction that read or
    wrote them would have to wait for the wgmmas in flight."""
    for kernel, body in sass(name).items():
        columns, rank = re.search(r"Li(\d+)ELi(\d+)ELi", kernel).groups()
        mma = [at for at, op in body.items() if re.match(rf"HGMMA\.64x{columns}x16\.", op)]
        loops: dict[int, list[str]] = {}  # the smallest loop around each four wgmmas, by the address of the first
        for end, op in body.items():
            jump = re.search(r"\bBRA (0x[0-9a-f]+)", op)
            start = int(jump[1], 16) if jump else end
            held = [at for at in mma if start <= at <= end]
            if len(held) == 4:
                inside = [body[at] for at in body if start <= at <= end]
                loops[held[0]] = min(loops.get(held[0], inside), inside, key=len)
        plain = 0
        for loop in loops.values():
            text = "\n".join(loop)
            if columns == rank and "FENCE.VIEW.ASYNC" in text:
                continue  # This loop masks an h or da tile, which has as many columns as a y or dx tile.
            plain += 1
            waits = re.findall(r"WARPGROUP\.\S+(?: gsb0, \w+)?", text)
            assert waits == ["WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE gsb0, 0x1"], kernel
            assert not re.search(r"\b(MEMBAR|LDG|LDS|STG|STS|BAR|ERRBAR|CCTL)\b", text), kernel
            first = int(re.search(r"HGMMA\S+ R(\d+)", text)[1])
            accumulators = {f"R{first + i}" for i in range(int(columns) // 2)}
            others = "\n".join(op for op in loop if not op.startswith("HGMMA"))
            assert not accumulators & set(re.findall(r"\bR\d+\b", others)), kernel
        # A forward has a loop over K, and one over the rank where a stage of it has four steps. A backward has a loop
        # with dropout and one without.
        assert plain >= (2 if name.startswith("backward") else 1), kernel


ORDERING = re.compile(
    r"ld\.acquire\.gpu|red\.release\.gpu|atom\.acq_rel\.gpu|fence\.proxy\.async|membar|fence\.acq_rel|bar\.sync|stmatrix|st\.global"
    r"|st\.shared\.v4|wgmma\.mma_async|cp\.async\.bulk\.tensor\.2d\.shared|cp\.async\.bulk\.tensor\.2d\.global"
)
FENCE = {"membar", "fence.acq_rel"}
LOAD, STORE = "cp.async.bulk.tensor.2d.shared", "cp.async.bulk.tensor.2d.global"


class Flow:
    """A graph of a PTX kernel: its lines, which of them order memory, and which line can follow which."""

    def __init__(self, text: str):
        lines = [line.strip() for line in text.splitlines()]
        labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\$L\w+:", line)}
        self.ops = [match[0] if (match := ORDERING.search(line)) else None for line in lines]
        self.after: list[list[int]] = [[] for _ in lines]
        self.before: list[list[int]] = [[] for _ in lines]
        for i, line in enumerate(lines):
            branch = re.match(r"(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$L\w+);", line)
            falls = not re.match(r"(bra|ret|exit|trap)\b", line) and i + 1 < len(lines)
            for target in ([labels[branch[2]]] if branch else []) + ([i + 1] if falls else []):
                self.after[i].append(target)
                self.before[target].append(i)

    def find(self, op: str) -> list[int]:
        """Return the lines that hold `op`."""
        return [i for i, each in enumerate(self.ops) if each == op]

    def nearest(self, start: int, edges: list[list[int]], skip: frozenset[str] = frozenset()) -> dict[str, list[int]]:
        """Return the instructions that each path along `edges` (`after` or `before`) meets first from `start`, and
        their lines. Instructions in `skip` do not count."""
        found: dict[str, list[int]] = {}
        seen, todo = set(), list(edges[start])
        while todo:
            i = todo.pop()
            if i in seen:
                continue
            seen.add(i)
            op = self.ops[i]
            if op is None or op in skip:
                todo += edges[i]
            else:
                found.setdefault(op, []).append(i)
        return found

    def is_preceded(self, i: int, *ops: set[str]) -> bool:
        """Return whether every path back from line i meets one of ops[0] first, then one of ops[1], and so on."""
        for j, wanted in enumerate(ops):
            found = self.nearest(i, self.before)
            if not found or not set(found) <= wanted:
                return False
            if j + 1 < len(ops):
                return all(self.is_preceded(each, *ops[j + 1 :]) for places in found.values() for each in places)
        return True


def test_the_mask_kernel_stores_16_bytes_at_a_time() -> None:
    """A thread stores a group of eight elements at once, and the kernel uses no local memory."""
    target, log = _compiled(("keep_mask", "ptx"))
    assert log == ""
    text = target.read_text()
    assert len(re.findall(r"st\.global\S*\.v4\.\w32", text)) == 1
    assert ".local" not in text


@functools.cache
def flows(name: str) -> list[Flow]:
    """Return the graph of every kernel of a file."""
    kernels = re.split(r"\.entry ", _compiled((name, "ptx"))[0].read_text())[1:]
    assert len(kernels) == COUNT[name]
    return [Flow(kernel) for kernel in kernels]


@pytest.mark.parametrize("name", ["forward_bf16", "backward_bf16"])
def test_flags_are_acquired_before_the_loads_behind_them(name: str) -> None:
    """A proxy fence follows the acquire of a flag, before any TMA load. TMA then sees the ordinary stores of another
    block, which go through another proxy."""
    for flow in flows(name):
        acquires = flow.find("ld.acquire.gpu")
        assert acquires
        for i in acquires:
            assert set(flow.nearest(i, flow.after, frozenset({"ld.acquire.gpu"}))) == {"fence.proxy.async"}


@pytest.mark.parametrize("name", ["forward_bf16", "backward_bf16"])
def test_flags_are_released_after_the_stores_before_them(name: str) -> None:
    """Each thread stores, then runs membar and a proxy fence. After a barrier, one thread releases the flag for all."""
    for flow in flows(name):
        releases = flow.find("red.release.gpu")
        assert len(releases) == 2  # after a narrow tile, and after a conversion
        for i in releases:
            assert flow.is_preceded(i, {"bar.sync"}, {"fence.proxy.async"}, FENCE)


@pytest.mark.parametrize("name", ["forward_bf16", "backward_bf16"])
def test_tickets_go_round_in_order_for_both_blocks_of_a_cluster(name: str) -> None:
    """A thread that has read a ticket arrives at the barrier of block 0 with release: by a fence, or before CUDA 12.8
    on the arrival. The thread that writes the next ticket waits there with acquire, and so does a thread that reads
    a ticket sent by another block. All of these are at cluster scope, because the default scope, the block, is too
    narrow."""
    fenced = nvcc_version() >= (12, 8)
    kernels = re.split(r"\.entry ", _compiled((name, "ptx"))[0].read_text())[1:]
    for kernel in kernels:
        pairs = "ELi2EEEv" in kernel.split("(")[0]
        lines = [line.strip() for line in kernel.splitlines() if re.match(r"\s*(fence|mbarrier|RETRY)", line)]
        arrive = f"mbarrier.arrive.{'relaxed' if fenced else 'release'}.cluster"
        arrivals = [i for i, line in enumerate(lines) if line.startswith(arrive)]
        assert len(arrivals) == 2 * pairs  # one of the consumers, one of the second producer
        fences = {lines[i - 1] for i in arrivals if fenced}
        assert fences <= {"fence.release.sync_restrict::shared::cta.cluster;"}
        acquires = [line for line in lines if "mbarrier.try_wait.parity.acquire.cluster" in line]
        assert len(acquires) == 3 * pairs  # for a ticket: consumers, second producer; for room: first producer


def test_decode_publishes_after_its_stores() -> None:
    for flow in flows("decode"):
        releases = flow.find("red.release.gpu")
        assert len(releases) == 2  # after h, and after a conversion
        assert sum(flow.is_preceded(i, {"bar.sync"}, FENCE) for i in releases) == 1
        assert sum(flow.is_preceded(i, {"bar.sync"}, {"fence.proxy.async"}, FENCE) for i in releases) == 1


@pytest.mark.parametrize("name", ["forward_bf16", "backward_bf16"])
def test_ordinary_stores_to_shared_memory_are_fenced_before_the_async_proxy_reads_them(name: str) -> None:
    for flow in flows(name):
        for store in ("stmatrix", "st.shared.v4"):
            stores = flow.find(store)
            assert stores
            for i in stores:
                fences = flow.nearest(i, flow.after, frozenset({store}))
                assert set(fences) == {"fence.proxy.async"}
                for fence in fences["fence.proxy.async"]:
                    assert set(flow.nearest(fence, flow.after)) == {"bar.sync"}


@pytest.mark.parametrize(("name", "sums"), [("backward_bf16", 2), ("decode", 1)])
def test_parts_are_counted_after_they_are_stored_and_read_after_they_are_counted(name: str, sums: int) -> None:
    for flow in flows(name):
        counts = [i for i in flow.find("atom.acq_rel.gpu") if flow.is_preceded(i, {"bar.sync"}, FENCE, {"st.global"})]
        assert len(counts) == sums  # The one that is left counts the blocks that have exited.
        for i in counts:
            barriers = flow.nearest(i, flow.after)
            assert set(barriers) == {"bar.sync"}
            assert FENCE & set(flow.nearest(barriers["bar.sync"][0], flow.after))


@pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump: install the CUDA toolkit or Triton")
def test_the_built_extension_holds_every_kernel() -> None:
    """The extension in this tree holds every kernel of both types, and none of them uses local memory."""
    built = sorted((sm90.ROOT / "lora_kernels").glob("_cuda*.so"))
    if not built:
        pytest.skip("lora_kernels._cuda is not built in place")
    if built[0].stat().st_mtime < max(path.stat().st_mtime for path in sm90.SM90.iterdir()):
        pytest.skip("lora_kernels._cuda is older than its sources: build it again")
    command = [cuobjdump(), "--dump-resource-usage", built[0]]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"Function \S*(?:pass|decode)_kernel\S*:\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    usage = re.findall(pattern, text)
    assert len(usage) == 2 * (9 + 9 + 4)
    assert {(stack, local) for _, stack, local in usage} == {("0", "0")}
    assert max(int(registers) for registers, _, _ in usage) * THREADS <= REGISTERS
