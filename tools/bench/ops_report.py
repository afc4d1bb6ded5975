"""The figures of `ops.py` from the samples of its workers, and their table.

Legend: R query and key rows, K bank rows, C channels.
"""

from collections.abc import Callable
from typing import Any

from ops_work import DENSE, LIST_OPERATIONS, LOOP, PARTS
from ops_worker import COMPILED, TILED_BF16, Row

from caco_fast.benchmarking import spread

# FLOP in units of R K C, and the least bytes in units of K C and of R C: each input read, each output written once.
BANK_WORK = {"bank_attend": (4, 2, 6), "bank_select": (2, 2, 2), "bank_step": (4, 18, 2), "bank": (10, 22, 10)}
# Bytes of an element. The EMA reads 8 and writes 4. LARS reads 8 for the norms, then 12, and writes 8.
LIST_BYTES = {"ema_update": 12, "lars_step": 28}
TEXT_COLUMNS = ("operation", "size", "variant", "not measured")
# Only next to the ceilings of a GPU do rates say something.
RATE_COLUMNS = ("than compiled", "than tiled", "of linear in K", "GFLOP/s", "of cuBLAS", "GB/s", "of copy", "host ms")


def figures(row: Row, limits: dict[str, float]) -> Row:
    """Medians, percentiles and rates in place of samples."""
    result = {name: value for name, value in row.items() if name != "samples"}
    if "error" in row:
        return result
    samples = row["samples"]
    result |= timed(row["operation"], row["size"], samples["whole"], limits)
    result |= {f"{name}_ms": spread(samples[name], 4) for name in ("host", "processor") if name in samples}
    parts = [part for part in PARTS if part in samples]
    if parts:
        result["parts"] = {part: timed(part, row["size"], samples[part], limits) for part in parts}
    return result


def timed(operation: str, size: dict[str, int], samples: list[float], limits: dict[str, float]) -> Row:
    """Milliseconds and rates, and their shares of the card's."""
    ms = spread(samples, 4)
    flop, traffic = work_of(operation, size)
    found = {"ms": ms, "gb_per_s": round(traffic / ms["median"] / 1e6, 1)}
    if flop:
        found["gflop_per_s"] = round(flop / ms["median"] / 1e6, 1)
    if limits:
        found["share_of_copy"] = round(found["gb_per_s"] / limits["copy_gb_per_s"], 4)
        if flop:
            found["share_of_cublas"] = round(found["gflop_per_s"] / 1000 / limits["cublas_bf16_tflop_per_s"], 4)
    return found


def work_of(operation: str, size: dict[str, int]) -> tuple[int, int]:
    """(FLOP, least bytes) of one call"""
    if operation in LIST_OPERATIONS:
        return 0, LIST_BYTES[operation] * size["elements"]
    flop, bank_bytes, row_bytes = BANK_WORK[operation]
    r, k, c = size["R"], size["K"], size["C"]
    return flop * r * k * c, (bank_bytes * k + row_bytes * r) * c


def table(record: dict[str, Any]) -> str:
    """The result as a Markdown table. A column without entries is left out.

    A single operation or size is named in the caption.
    """
    settings, machine, rows = record["settings"], record["machine"], record["results"]["rows"]
    operations, sizes = {row["operation"] for row in rows}, {label(row["size"]) for row in rows}
    columns = columns_of(rows)
    if not settings["gpu"]:
        for head in RATE_COLUMNS:
            columns.pop(head)
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    caption = []
    for head, found in (("operation", operations), ("size", sizes)):
        if len(found) == 1:
            caption.append(found.pop())
            columns.pop(head, None)
    where = settings["gpu"] or f"{settings['device']}: {machine['cpu']}, {settings['threads']} threads"
    caption.append(f"{where}, torch {record['versions']['torch']}")
    if settings["base"]:
        caption.append(f"base {settings['base']}")
    for name, unit in (("cublas_bf16_tflop_per_s", "bf16 product, Tflop/s"), ("copy_gb_per_s", "copy, GB/s")):
        if name in record["results"]["ceilings"]:
            caption.append(f"{unit}: {record['results']['ceilings'][name]:.0f}")
    lines = ["; ".join(caption), "", f"| {' | '.join(columns)} |"]
    lines.append("|" + "".join("---|" if head in TEXT_COLUMNS else "--:|" for head in columns))
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in zip(*columns.values()))])


def columns_of(rows: list[Row]) -> dict[str, list[str]]:
    """Heads and cells."""
    timed_rows = [row for row in rows if "ms" in row]

    def compared(name: str, form: Callable[[Any, Any], str], *variants: str) -> Callable[[Row], str]:
        """A cell that sets a figure of a peer in relation to the row's."""
        peers = {key_of(row): row for row in timed_rows if row["variant"] in variants}

        def cell(row: Row) -> str:
            peer = peers.get(key_of(row), {})
            return form(peer[name], row[name]) if peer.get(name) and row.get(name) is not None else ""

        return cell

    def faster(*variants: str) -> Callable[[Row], str]:
        return compared("ms", lambda peer, own: f"{peer['median'] / own['median']:.1f} x", *variants)

    def of_linear(row: Row) -> str:
        """The time of a bank row, over that in the smallest bank of the same work."""
        like = [other for other in timed_rows if row in timed_rows and same_but_bank(row, other)]
        least = min(like, key=lambda other: other["size"]["K"], default=row)
        if least["size"] == row["size"]:
            return ""
        of_bank_row = [found["ms"]["median"] / found["size"]["K"] for found in (row, least)]
        return f"{of_bank_row[0] / of_bank_row[1]:.2f}"

    def of_part(part: str) -> Callable[[Row], str]:
        return lambda row: f"{row['parts'][part]['ms']['median']:.3g}" if "parts" in row else ""

    def number(name: str, form: str, scale: float = 1) -> Callable[[Row], str]:
        return lambda row: form.format(row[name] * scale) if row.get(name) is not None else ""

    def times(name: str, digits: int = 4) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            if name not in row:
                return ""
            median, low, high = (f"{row[name][at]:.{digits}g}" for at in ("median", "p20", "p80"))
            return f"{median} ({low}-{high})"

        return cell

    heads: dict[str, Callable[[Row], str]] = {
        "operation": lambda row: row["operation"],
        "size": lambda row: label(row["size"]),
        "variant": lambda row: row["variant"],
        **{f"{part.removeprefix('bank_')} ms": of_part(part) for part in PARTS},
        "ms (p20-p80)": times("ms"),
        "faster": faster(DENSE, LOOP),
        "than compiled": faster(COMPILED),
        "than tiled": faster(TILED_BF16),
        "of linear in K": of_linear,
        "base ms (p20-p80)": times("base_ms"),
        "x base (p20-p80)": times("times_base", 3),
        "extra MiB": number("extra_bytes", "{:.1f}", 2**-20),
        "of the memory": compared("extra_bytes", lambda peer, own: f"1/{peer / max(own, 1):.0f}", DENSE, LOOP),
        "host ms": lambda row: f"{row['host_ms']['median']:.2g}" if "host_ms" in row else "",
        "aten calls": number("aten_calls", "{}"),
        "GFLOP/s": number("gflop_per_s", "{:,.0f}"),
        "of cuBLAS": number("share_of_cublas", "{:.0f} %", 100),
        "GB/s": number("gb_per_s", "{:,.0f}"),
        "of copy": number("share_of_copy", "{:.0f} %", 100),
        "other positives": number("other_positives", "{}"),
        "not measured": lambda row: row.get("error") or row.get("base_error", ""),
    }
    return {head: [cell(row) for row in rows] for head, cell in heads.items()}


def key_of(row: Row) -> tuple[str, str]:
    return row["operation"], label(row["size"])


def same_but_bank(row: Row, other: Row) -> bool:
    sizes = [{name: n for name, n in found["size"].items() if name != "K"} for found in (row, other)]
    named = [(found["operation"], found["variant"]) for found in (row, other)]
    return sizes[0] == sizes[1] and named[0] == named[1] and "K" in row["size"]


def label(size: dict[str, int]) -> str:
    """R 512, K 65536, C 256, or 166 tensors, 32,429,120 elements"""
    return ", ".join(f"{name} {n}" if name in "RKC" else f"{n:,} {name}" for name, n in size.items())
