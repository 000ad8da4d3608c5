"""What this package wants to reach on an H100, each beside the line of a csv that says where it is: the table "Targets"
of docs/benchmarks.md, which tables.py fills."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    what: str
    most: float  # as the column has it: a share is 0.01, not 1
    unit: str  # "ms", "GiB", "s", "x" or "%"
    source: tuple[str, str, str, str]  # family, case, name and column, as in the sources of a text


DPO = ("preference", "DPO, 4 pairs x 1024, V=128256, H=4096, bfloat16", "DPOLoss")
LONG = "DPO, 16 pairs x 8192 (8192 and 256 used), V=128256, H={}, bfloat16"
ENTROPY = "cross-entropy, 8192 tokens, V=128256, H={}, bfloat16"
ONE_WAY = {1024: 43, 768: 32, 384: 22, 256: 15, 128: 8, 64: 6}
BOTH_WAYS = {1024: 62, 768: 50}
ALONE = {
    **dict.fromkeys(("MNRL", "MNRL + hard negatives", "CoSENT", "AnglE"), 1.05),
    **dict.fromkeys(("Triplet", "CosineSimilarity"), 1.10),
    **dict.fromkeys(("OnlineContrastive", "BatchHardTriplet"), 1.05),
}


def exact() -> Iterator[Target]:
    yield Target("a DPO margin near its reference is off by", 1e-3, "%", (*DPO, "value_error / value_mean"))
    yield Target("DPO, 4 pairs x 1,024 tokens, V=128,256, H=4096", 56, "ms", (*DPO, "ms"))
    yield Target("the same, to its four products", 1.12, "x", (*DPO, "floor_ratio"))
    grpo = ("preference", "GRPO, 4 pairs x 1024, V=128256, H=4096, bfloat16", "GRPOLoss", "floor_ratio")
    yield Target("GRPO, 8 completions of 1,024 tokens, V=128,256, H=4096, to its three products", 1.05, "x", grpo)
    wide = ("preference", "DPO, 8 pairs x 1024, V=151936, H=2048, bfloat16", "DPOLoss", "ms")
    yield Target("DPO, 8 pairs x 1,024 tokens, V=151,936, H=2048", 72, "ms", wide)
    logps = ("token-losses", "log-probabilities, 16384 tokens, V=151936, H=2048, bfloat16", "linear_logps", "ms")
    yield Target("linear_logps, 16,384 tokens, V=151,936, H=2048", 68, "ms", logps)
    of_user = ("token-losses", ENTROPY.format(2048), "loss_fn, row-wise", "floor_ratio")
    yield Target("cross-entropy by a loss_fn, V=128,256, H=2048, to its products", 1.25, "x", of_user)
    for width, most in {2048: 19.5, 4096: 40}.items():
        statistics = ("token-losses", ENTROPY.format(width), "TokenStatistics, grouped", "ms")
        yield Target(f"cross-entropy by TokenStatistics, V=128,256, H={width}", most, "ms", statistics)
    for told, name, widths in (("", "InfoNCE", ONE_WAY), (", both directions", "symmetric InfoNCE", BOTH_WAYS)):
        for width, most in widths.items():
            source = ("contrastive", f"{name} 65536x{width}, bfloat16", "CF.info_nce", "ms")
            yield Target(f"InfoNCE, 65,536 x {width}{told}", most, "ms", source)
    for scale in (20, 50, 100):
        source = ("contrastive", f"near duplicates, *InfoNCE, scale {scale} *", "ours", "most gradient_error")
        yield Target(f"gradients of InfoNCE on near duplicates, scale {scale}, are off by", 3e-3, "%", source)
    chunks = ("token-losses", "weight gradient, *", "loss_fn, * chunks / torch, one product", "most gradient_error")
    yield Target("error of a weight gradient in 1, 8 and 64 chunks, to that of one product", 2, "x", chunks)


def never_slower() -> Iterator[Target]:
    for loss, most in ALONE.items():
        source = ("small", f"alone, {loss}, *x768, float32", "ours", "most floor_ratio")
        yield Target(f"{loss}, 16 to 4,096 rows x 768, to sentence-transformers", most, "x", source)
    head = ("small", "head, DPO, *", "ours", "most floor_ratio")
    yield Target("DPO of 1 to 8 pairs, to TRL's fused head", 1.05, "x", head)
    logps = ("small", "head, log-probabilities without gradients, 2048 *", "ours", "floor_ratio")
    yield Target("linear_logps without gradients, 2,048 tokens, to TRL's", 1.0, "x", logps)
    for loss in ("MNRL", "CoSENT", "Triplet"):
        source = ("small @ cpu-x86-64", f"alone, {loss}, 16x32, float32", "ours", "floor_ratio")
        yield Target(f"{loss}, 16 rows x 32, two CPU cores, to sentence-transformers", 1.2, "x", source)
    for where, family in {"": "small", " on a CPU": "small @ cpu-x86-64"}.items():
        source = (family, "first call, *", "ours", "most first_s")
        yield Target(f"the first call of a loss{where}, up to 1,024 rows", 0.1, "s", source)
    for loss in ("MNRL", "CoSENT"):
        source = ("small", f"step, {loss}, *", "ours", "most floor_ratio")
        yield Target(f"a training step of a small encoder, {loss}, to sentence-transformers", 1.0, "x", source)


def the_rest() -> Iterator[Target]:
    five = "Matryoshka (1024, 512, 256, 128, 64) over InfoNCE 65536x1024, bfloat16"
    source = ("contrastive", five, "MatryoshkaLoss", "floor_ratio")
    yield Target("Matryoshka of five widths over InfoNCE, to the widest alone", 2.2, "x", source)
    jsd = ("distillation", "JSD and CE, 8192 tokens, V=128256, H=2048 from 4096, bfloat16", "JSDLoss", "floor_ratio")
    yield Target("JSD and CE, V=128,256, to its four products", 1.35, "x", jsd)
    pair = ("preference", LONG.format(2048), "DPOLoss / TRL fused head", "ms")
    yield Target("a pair of 8,192 tokens beside 15 of 256, to TRL's fused head", 0.8, "x", pair)
    for width in (2048, 1024):
        source = ("preference", LONG.format(width), "DPOLoss", "peak_gib")
        yield Target(f"the same, H={width}, above the inputs", 1.2, "GiB", source)
    for most, unit, column in ((30, "ms", "ms"), (0.6, "GiB", "peak_gib")):
        head = ("sparse", "SPLADE, 100% active, 256 texts x 256, *", "CF.splade_pool", column)
        yield Target("a SPLADE head, 256 texts x 256 tokens, V=30,522", most, unit, head)
    ranks = ("swap-ranks @ nvidia-h200", "gathered InfoNCE, 2 x 32768x768, bfloat16", "ours", "ms")
    yield Target("gathered InfoNCE, two H200s, 2 x 32,768 rows x 768", 18, "ms", ranks)


TARGETS = {"Exact, and quick": exact, "Never slower": never_slower, "The rest": the_rest}
