"""PTX of the Hopper kernel for few rows of x: the whole of a program, as one text that the tests run in an emulator.

At few rows the bound should be how fast packed bytes come in, so a weight may cost few instructions:

Two codes a look-up. A table in shared memory maps a byte, two codes, to two 16-bit values: half a load a weight, where
byte permutes take two instructions of a pipe that issues every other clock. Every lane has a copy of the table in a
bank of its own (32 copies of 256 words, 256 bytes apart so that one byte permute makes an address): no lane waits.

Weights never leave registers. They are the left operand of the tensor cores (W x^T). A thread loads 16 bytes of codes,
columns 16 t .. 16 t + 15 of byte row g (lane = 4 g + t). Rows g and g + 8 of mma's left tile [16, 16] are the byte
row's low and high nibbles, rows o and o + O / 2 of W. In a sum the order of columns is free: a 32-bit word of codes is
a thread's four columns of one mma, and its x is the same 16 columns of row g of x, as they lie in memory.

Scales meet sums, not weights: four multiply-adds a thread for 16 rows of W and 64 columns.

Weights that meet one x may share a launch: tiles of all of them are numbered through, and a program takes the pointers
of the weight that its tile is of.

A program takes BYTE_ROWS byte rows and a range of columns, of which each warp takes every eighth (or sixteenth) GROUP.
Registers of codes are loaded anew as soon as they were used, so that a warp's next group comes in while it computes.
The warps' sums are added through shared memory. Programs that share a tile's columns are one cluster: each sends what
its warps make to the shared memory of the first, which adds these in order, so that results are the same on every run,
and no second kernel follows.
"""

from collections.abc import Sequence

from pallas_kernels.nf4_matmul.mosaic.decode import assembly
from pallas_kernels.nf4_matmul.mosaic.few_rows_program import (
    BYTE_ROWS,
    CHUNK,
    CHUNKS,
    GROUP,
    SUMS,
    TABLE_BYTES,
    TILES,
    Program,
)

BLOCK_TILES = 2  # tiles between two branches, see _multiply
X_WORDS = 16  # registers of x: both chunks of one tile of x, or one chunk of two
# operands of the text, in this order: 32-bit whole numbers, pointers, and four pointers of each weight
SHARED, BEGIN, END, X, ABSMAX_MAP, OUT = (f"${k}" for k in range(6))


def _pointers(weight: int) -> list[str]:
    """Of a weight: codes, absmax, nested_absmax, offset."""
    return [f"${6 + 4 * weight + k}" for k in range(4)]


def text(program: Program) -> str:
    """The program, see the module's docstring; operands as listed above."""
    lines = [
        *_registers(program),
        *_thread(program),
        *_chosen_weight(program),
        *_indices(program),
        "setp.lt.u32 more, column, end;",
        *_load_scales(program),
        *[line for chunk in range(CHUNKS) for line in _load_codes(program, chunk)],
        *[line for chunk in range(_x_chunks(program)) for line in _load_x(program, chunk)],
        *_fill_shared(program),
        "bar.sync 0;",
        "@!more bra done;",
        "loop:",
        *_expand_scales(program),
        "mov.u32 part_column, column;",
        f"add.u32 column, column, {program.warps * GROUP};",
        f"add.u32 scale_column, scale_column, {program.warps * GROUP};",
        f"add.u64 codes_at, codes_at, {program.warps * GROUP};",
        *[f"add.u64 x_at{n}, x_at{n}, {2 * program.warps * GROUP};" for n in range(program.x_tiles)],
        "setp.lt.u32 more, column, end;",
        *_load_scales(program),
        *[line for chunk in range(CHUNKS) for line in _multiply(program, chunk)],
        "@more bra loop;",
        "done:",
        *_store(program),
    ]
    return "\n".join(["{", *lines, "}"])


def _x_chunks(program: Program) -> int:
    """Chunks of x in registers."""
    return CHUNKS // program.x_tiles


def _registers(program: Program) -> list[str]:
    return [
        ".reg .pred more, is_past, is_row;",
        ".reg .b32 thread, lane, warp, row, quad, lane_bytes, column, part_column, end, byte_row, scale_column;",
        ".reg .b32 scale_row, cell, index, at, chunk, byte, pair, unused, shifted, low, high, address;",
        f".reg .b32 code<{4 * TILES * CHUNKS}>, x<{X_WORDS}>, scale_code<{TILES}>, a<4>;",
        ".reg .b32 numbered, split, tile, half, first_out;",
        ".reg .b64 codes, absmax, nested_absmax, offset_at, codes_at, global_at, x_at<2>;",
        f".reg .f32 zero, offset, value, part<8>, sum<{program.sums}>, low_scale, high_scale;",
        f".reg .f32 scale<{TILES}>, nested<{TILES}>;",
        ".reg .b16 rounded;",
    ]


def _chosen_weight(program: Program) -> list[str]:
    """The pointers of the weight that has this tile, and `_place`."""
    pointers = zip(*[_pointers(k) for k in range(len(program.out_features))], strict=True)
    names = ("codes", "absmax", "nested_absmax", "offset_at")
    lines = [
        line for name, values in zip(names, pointers, strict=True) for line in _by_weight(program, "b64", name, values)
    ]
    return [*lines, *_place(program)]


def _place(program: Program) -> list[str]:
    """Byte rows of the weight that has this tile, its first out-feature, and the tile among its own.

    Computed again behind the loop, over which registers are few.
    """
    outs = program.out_features
    return [
        *_by_weight(program, "b32", "half", [out // 2 for out in outs]),
        *_by_weight(program, "b32", "first_out", [sum(outs[:k]) for k in range(len(outs))]),
        *_by_weight(program, "b32", "tile", program.first_tiles[:-1]),
        "sub.u32 tile, numbered, tile;",
    ]


def _thread(program: Program) -> list[str]:
    """Who a thread is, the number of its tile among those of all weights, and its program's in the cluster."""
    return [
        "mov.u32 thread, %tid.x;",
        "shr.u32 warp, thread, 5;",
        "and.b32 lane, thread, 31;",
        f"mov.u32 numbered, {'%clusterid.x' if program.split > 1 else '%ctaid.x'};",
        f"mov.u32 split, {'%cluster_ctarank' if program.split > 1 else '0'};",
    ]


def _by_weight(program: Program, kind: str, name: str, values: Sequence[object]) -> list[str]:
    """A register that holds the value of the weight that has this tile."""
    lines = [f"mov.{kind} {name}, {values[0]};"]
    for first, value in zip(program.first_tiles[1:-1], values[1:], strict=True):
        lines += [f"setp.ge.u32 more, numbered, {first};", f"selp.{kind} {name}, {value}, {name}, more;"]
    return lines


def _indices(program: Program) -> list[str]:
    """Where a lane's first codes, x and scales are."""
    in_features = program.in_features
    lines = [
        "shl.b32 lane_bytes, lane, 2;",
        "shr.u32 row, lane, 2;",
        "and.b32 quad, lane, 3;",
        f"mov.u32 end, {END};",
        f"mad.lo.u32 column, warp, {GROUP}, {BEGIN};",
        f"mad.lo.u32 byte_row, tile, {BYTE_ROWS}, row;",
        "mad.lo.u32 index, quad, 16, column;",
        f"mad.lo.u32 cell, byte_row, {in_features}, index;",
        "mad.wide.u32 codes_at, cell, 1, codes;",
    ]
    for n in range(program.x_tiles):  # rows past the last repeat it and are not stored
        lines += [
            f"add.u32 cell, row, {8 * n};",
            f"min.u32 cell, cell, {program.rows - 1};",
            f"mad.lo.u32 cell, cell, {in_features}, index;",
            f"mad.wide.u32 x_at{n}, cell, 2, {X};",
        ]
    return [
        *lines,
        "and.b32 cell, quad, 1;",
        f"mad.lo.u32 scale_column, cell, {CHUNK}, column;",
        "shr.u32 cell, quad, 1;",
        "mad.lo.u32 cell, cell, half, byte_row;",
        f"mul.lo.u32 scale_row, cell, {in_features // program.block_size};",
        *(["ld.global.nc.f32 offset, [offset_at];"] if program.nested else []),
        "mov.f32 zero, 0f00000000;",
        *[f"mov.f32 sum{k}, zero;" for k in range(program.sums)],
    ]


def _load_codes(program: Program, chunk: int, tiles: Sequence[int] = range(TILES)) -> list[str]:
    """16 bytes a lane of a chunk of the group at codes_at; they are read once, so they need no place in L1."""
    lines = []
    for tile in tiles:
        words = _names("code", 4 * (TILES * chunk + tile), 4)
        offset = tile * 8 * program.in_features + chunk * CHUNK
        lines.append(f"@more ld.global.nc.L1::no_allocate.v4.b32 {words}, [codes_at+{offset}];")
    return lines


def _load_x(program: Program, chunk: int, groups_back: int = 0) -> list[str]:
    """16 values a lane and tile of x, of a chunk of the group at x_at or of the one before, which is sure to be."""
    guard = "" if groups_back else "@more "
    lines = []
    for n in range(program.x_tiles):
        for half in range(2):
            words = _names("x", _x_register(program, chunk, n) + 4 * half, 4)
            offset = 2 * (chunk * CHUNK - groups_back * program.warps * GROUP) + 16 * half
            lines.append(f"{guard}ld.global.nc.v4.b32 {words}, [x_at{n}+{offset}];")
    return lines


def _x_register(program: Program, chunk: int, n: int) -> int:
    return 8 * (program.x_tiles * (chunk % _x_chunks(program)) + n)


def _load_scales(program: Program) -> list[str]:
    """Lane 4 g + t takes of each tile, as it is stored, the scale of chunk t % 2 of row g of half t // 2."""
    lines = [f"shr.u32 at, scale_column, {program.block_size.bit_length() - 1};", "add.u32 at, at, scale_row;"]
    for tile in range(TILES):
        lines.append(f"add.u32 index, at, {8 * tile * (program.in_features // program.block_size)};")
        if program.nested:
            lines += [
                "mad.wide.u32 global_at, index, 1, absmax;",
                f"@more ld.global.nc.u8 scale_code{tile}, [global_at];",
                "shr.u32 index, index, 8;",
                "mad.wide.u32 global_at, index, 4, nested_absmax;",
                f"@more ld.global.nc.f32 nested{tile}, [global_at];",
            ]
        else:
            lines += [
                "mad.wide.u32 global_at, index, 4, absmax;",
                f"@more ld.global.nc.f32 nested{tile}, [global_at];",
            ]
    return lines


def _expand_scales(program: Program) -> list[str]:
    """Scales in float32; the product is rounded before the offset is added, as reference.dequantize_absmax does."""
    lines = []
    for k in range(TILES):
        if program.nested:
            lines += [
                f"mad.lo.u32 at, scale_code{k}, 4, {SHARED};",
                f"ld.shared.f32 value, [at+{TABLE_BYTES}];",
                f"mul.rn.f32 value, value, nested{k};",
                f"add.rn.f32 scale{k}, value, offset;",
            ]
        else:
            lines.append(f"mov.f32 scale{k}, nested{k};")
    return lines


def _fill_shared(program: Program) -> list[str]:
    """Thread b writes the values of byte b, low nibble first, to all 32 banks, and entry b of the map of scales.

    With twice the threads, each writes half of the banks. Neighbours start at different ones, so that their stores do
    not wait for each other.
    """
    names = {"$0": "pair", "$1": "unused", "$2": "byte", "$3": "0"}
    look_up = assembly(program.table, program.dtype)
    for operand, name in names.items():
        look_up = look_up.replace(operand, name)
    entries = 8 // program.x_tiles  # of the row's eight parts of 16 bytes, written by each thread
    lines = [
        "and.b32 row, thread, 255;",
        "and.b32 low, row, 15;",
        "shr.u32 high, row, 4;",
        "mad.lo.u32 byte, high, 256, low;",  # a code in each of two bytes
        look_up,
        f"mad.lo.u32 at, row, 256, {SHARED};",
        "shr.u32 high, thread, 8;",
        f"mad.lo.u32 row, high, {entries}, row;",
    ]
    for k in range(entries):
        lines += [
            f"add.u32 chunk, row, {k};",
            "and.b32 chunk, chunk, 7;",
            "mad.lo.u32 chunk, chunk, 16, at;",
            "st.shared.v4.b32 [chunk], {pair,pair,pair,pair};",
        ]
    if program.nested:
        lines += [
            "and.b32 row, thread, 255;",
            f"mad.wide.u32 global_at, row, 4, {ABSMAX_MAP};",
            "ld.global.nc.f32 value, [global_at];",
            f"mad.lo.u32 at, row, 4, {SHARED};",
            f"st.shared.f32 [at+{TABLE_BYTES}], value;",
        ]
    return lines


def _multiply(program: Program, chunk: int) -> list[str]:
    """Adds a chunk of every tile to the sums, and sends for what its registers hold next.

    Groups are whole: the branches are never taken. They keep ptxas from computing a group at once, with many more
    registers and every load at the end; with more than 128 registers a multiprocessor would hold half the warps.
    """
    lines = []
    for tile in range(TILES):
        if tile % BLOCK_TILES == 0:
            lines += ["setp.ge.u32 is_past, part_column, end;", "@is_past bra done;"]
            lines.append(f"add.u32 part_column, part_column, {CHUNK * BLOCK_TILES // TILES};")
        for word in range(4):
            lines += _decode(f"code{4 * (TILES * chunk + tile) + word}")
            for n in range(program.x_tiles):
                before = _names("part", 4 * n, 4) if word else "{zero,zero,zero,zero}"
                operands = f"{_names('a', 0, 4)}, {_names('x', _x_register(program, chunk, n) + 2 * word, 2)}, {before}"
                lines.append(f"{_product(program)} {_names('part', 4 * n, 4)}, {operands};")
        lines += _load_codes(program, chunk, [tile])
        for half, name in enumerate(("low_scale", "high_scale")):  # from the lane of this row that has this chunk's
            lines.append(f"shfl.sync.idx.b32 {name}, scale{tile}, {chunk + 2 * half}, 0x1c1f, 0xffffffff;")
        for n in range(program.x_tiles):
            for k in range(4):
                scale, total = ("low_scale", "high_scale")[k // 2], f"sum{4 * (program.x_tiles * tile + n) + k}"
                lines.append(f"fma.rn.f32 {total}, part{4 * n + k}, {scale}, {total};")
    following = chunk + _x_chunks(program)
    if following < CHUNKS:
        return lines + _load_x(program, following, groups_back=1)
    return lines + _load_x(program, following - CHUNKS)


def _decode(word: str) -> list[str]:
    """Four bytes of codes -> a0 .. a3, a thread's part of mma's left tile: two columns each, of low, high, low, high.

    A byte names two codes to the table. Shifted by a nibble, codes of neighbouring columns meet in one byte: of low
    nibbles in bytes 0 and 2, of high nibbles in bytes 1 and 3.
    """
    lines = [
        f"shr.u32 shifted, {word}, 4;",
        f"lop3.b32 low, {word}, shifted, 0x0f0f0f0f, 0xe4;",  # the mask's bits of the first, the others of the second
        f"shl.b32 shifted, {word}, 4;",
        f"lop3.b32 high, shifted, {word}, 0x0f0f0f0f, 0xe4;",
    ]
    for byte, source in enumerate(("low", "high", "low", "high")):
        lines += [
            f"prmt.b32 address, {source}, lane_bytes, {0x5504 | byte << 4:#06x};",  # 256 * byte + 4 * lane
            f"add.u32 address, address, {SHARED};",
            f"ld.shared.b32 a{byte}, [address];",
        ]
    return lines


def _product(program: Program) -> str:
    kind = _kind(program)
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"


def _store(program: Program) -> list[str]:
    """Adds the warps' sums and writes the tile: rows of x, halves of W, byte rows.

    mma leaves lane 4 g + t with rows 2 t and 2 t + 1 of x for row g (low nibbles), then for row g + 8 (high nibbles).
    Warp w writes row w of x: runs of 32 out-features, of either half.
    """
    lines = [
        *(_thread(program) if len(program.out_features) > 1 else []),  # as `_place`; of one, ptxas has enough
        f"mad.lo.u32 at, warp, {program.sums * 32}, lane;",
        f"mad.lo.u32 at, at, 4, {SHARED};",
        *[f"st.shared.f32 [at+{SUMS + 128 * k}], sum{k};" for k in range(program.sums)],
        "bar.sync 0;",
        "shr.u32 at, lane, 3;",  # byte row 8 tile + g is this lane's
        "shr.u32 index, warp, 3;",
        f"mad.lo.u32 index, at, {program.x_tiles}, index;",
        "and.b32 at, warp, 1;",
        "mad.lo.u32 index, index, 4, at;",  # the sum's number, of half 0
        "and.b32 at, lane, 7;",
        "shr.u32 row, warp, 1;",
        "and.b32 row, row, 3;",
        "mad.lo.u32 at, at, 4, row;",  # the lane that has it
        "mad.lo.u32 at, index, 32, at;",
        f"mad.lo.u32 at, at, 4, {SHARED};",
        f"setp.lt.u32 is_row, warp, {program.rows};",
    ]
    for half, total in enumerate(("low_scale", "high_scale")):
        lines.append(f"mov.f32 {total}, zero;")
        for warp in range(program.warps):
            offset = SUMS + 128 * (program.sums * warp + 2 * half)
            lines += [f"ld.shared.f32 part0, [at+{offset}];", f"add.rn.f32 {total}, {total}, part0;"]
    return [*lines, *(_add_cluster(program) if program.split > 1 else []), *_write(program)]


def _add_cluster(program: Program) -> list[str]:
    """Program 0 of a cluster adds what the others send to its shared memory, in their order; the others end.

    A program's shared memory may be written by others once it runs: Mosaic lets a cluster's programs wait for each
    other at their start.
    """
    at = program.received_at
    lines = [
        "mad.lo.u32 cell, warp, 64, lane;",
        f"mad.lo.u32 cell, cell, 4, {SHARED};",
        f"mad.lo.u32 index, split, {program.sent_bytes}, cell;",
        "mapa.shared::cluster.u32 address, index, 0;",  # the same place in program 0
        "setp.ne.u32 is_past, split, 0;",
        "and.pred more, is_past, is_row;",
    ]
    for half, total in enumerate(("low_scale", "high_scale")):
        offset = at - program.sent_bytes + 128 * half  # program 1 sends to where all begin
        lines.append(f"@more st.shared::cluster.f32 [address+{offset}], {total};")
    lines += [
        "barrier.cluster.arrive.release.aligned;",
        "barrier.cluster.wait.acquire.aligned;",
        "@is_past bra end_of_program;",
    ]
    for half, total in enumerate(("low_scale", "high_scale")):
        for other in range(program.split - 1):
            offset = at + other * program.sent_bytes + 128 * half
            lines += [f"@is_row ld.shared.f32 part0, [cell+{offset}];", f"add.rn.f32 {total}, {total}, part0;"]
    return lines


def _write(program: Program) -> list[str]:
    """Rounds this warp's row of the tile, if it has one."""
    lines = [
        *_place(program),
        f"mad.lo.u32 cell, tile, {BYTE_ROWS}, lane;",
        "add.u32 cell, cell, first_out;",
        f"mad.lo.u32 index, warp, {sum(program.out_features)}, cell;",
    ]
    for total in ("low_scale", "high_scale"):
        lines += [
            f"mad.wide.u32 global_at, index, 2, {OUT};",
            f"cvt.rn.{_kind(program)}.f32 rounded, {total};",
            "@is_row st.global.b16 [global_at], rounded;",
            "add.u32 index, index, half;",
        ]
    return [*lines, "end_of_program:"]


def _kind(program: Program) -> str:
    return {"bfloat16": "bf16", "float16": "f16"}[program.dtype]


def _names(register: str, first: int, count: int) -> str:
    return "{" + ",".join(f"{register}{first + k}" for k in range(count)) + "}"
