"""Forecasts made by hand, with round figures: what the reports are tried on."""

from __future__ import annotations

from dataclasses import replace

from whalepy.planner.forecast import (
    Alternative,
    Breakdown,
    DeviceForecast,
    Forecast,
    Held,
    LinkForecast,
    ModulePart,
    Span,
    StageForecast,
    Subject,
)

GIB, MIB = 2**30, 2**20
LAYERS = 16


def spans(forward_s: float, gradient_s: float, *, layers: int = LAYERS, start_s: float = 0.0) -> tuple[Span, ...]:
    """Layers forward, then backward at twice the time, gradients of four layers at a time behind them, the update."""
    found: list[Span] = []
    now = start_s
    for layer in range(layers):
        found.append(Span(now, now + forward_s, "forward", f"model.layers.{layer}"))
        now += forward_s
    free = now
    for layer in reversed(range(layers)):
        found.append(Span(now, now + 2 * forward_s, "backward", f"model.layers.{layer}"))
        now += 2 * forward_s
        if layer % 4 == 0:
            free = max(free, now)
            found.append(Span(free, free + gradient_s, "gradient", f"gradients of model.layers.{layer}-{layer + 3}"))
            free += gradient_s
    end = max(now, free)
    found.append(Span(end, end + 0.02, "optimizer", "AdamW"))
    return tuple(sorted(found, key=lambda span: span.start_s))


def memory(peak: int, step_s: float, base: int) -> tuple[tuple[float, int], ...]:
    """Rises to the peak over the forward pass, falls over the backward pass."""
    rise = [(step_s / 3 * k / LAYERS, base + (peak - base) * k // LAYERS) for k in range(LAYERS + 1)]
    fall = [(step_s / 3 * (1 + 2 * k / LAYERS), peak - (peak - base) * k // LAYERS) for k in range(1, LAYERS + 1)]
    return (*rise, *fall)


def held(peak: int) -> tuple[Held, ...]:
    parts = [("activations of model.layers.*", 40), ("optimizer state", 25), ("parameters", 13), ("gradients", 12)]
    found = [Held(name, peak * part // 100) for name, part in [*parts, ("logits", 6), ("a gathered block", 3)]]
    return (*found, Held("inputs", peak - sum(each.bytes for each in found)))


def device(rank: int, kind: str, rows: int, peak: float, room: float, busy_s: float, step_s: float) -> DeviceForecast:
    """`peak` and `room` in GiB."""
    top = int(peak * GIB)
    lanes = spans(0.95 * busy_s / (3 * LAYERS), 0.09 * step_s)
    timeline = memory(top, step_s, top // 3)
    return DeviceForecast(
        rank, kind, 0, 0, (rank,), rows, top, int(room * GIB), busy_s, held(top), timeline, lanes, adds=rows / 75
    )


MODULES = (
    ModulePart("", 1, 1_235_814_400, 3.2e14),
    ModulePart("model.embed_tokens", 1, 262_668_288, 0.0),
    ModulePart("model.layers.*", 16, 973_144_064, 2.6e14),
    ModulePart("model.layers.*.self_attn.q_proj", 16, 67_108_864, 1.8e13, (("weight:0", 2048, (24, 24, 8, 8)),)),
    ModulePart("model.layers.*.self_attn.o_proj", 16, 67_108_864, 1.8e13, (("weight:1", 2048, (24, 24, 8, 8)),)),
    ModulePart("model.layers.*.mlp.down_proj", 16, 268_435_456, 7.2e13),
    ModulePart("lm_head", 1, 262_668_288, 6.9e13),
)


def four_cards() -> Forecast:
    """Two large and two small cards on one bus; the plan is tight and asks for an option that does not run yet."""
    step = 3.42
    plan = "replicate 24:24:8:8, zero 3, recompute selective"
    return Forecast(
        subject=Subject(
            model="LlamaForCausalLM",
            parameters=1_235_814_400,
            trainable=1_235_814_400,
            optimizer="adamw",
            precision="fp16",
            rows=64,
            tokens=2048,
            cluster="2x4090 + 2x2080Ti",
            nodes=1,
            devices=((2, "RTX-4090", 25_756_172_288), (2, "RTX-2080-Ti", 11_539_054_592)),
            link="PCIe 3.0 x16",
            figures="data sheet",
        ),
        strategy=plan,
        verdict="tight",
        step_time_s=step,
        mfu=0.41,
        equal_shares_step_time_s=4.89,
        bound=1.62,
        microbatches=1,
        schedule="none",
        bottleneck=3,
        tightest=3,
        devices=(
            device(0, "RTX-4090", 24, 14.2, 23.5, 2.91, step),
            device(1, "RTX-4090", 24, 14.2, 23.5, 2.91, step),
            device(2, "RTX-2080-Ti", 8, 9.7, 10.6, 3.06, step),
            device(3, "RTX-2080-Ti", 8, 9.8, 10.6, 3.07, step),
        ),
        links=(LinkForecast("inside node 0", 15.75e9, 22_200_000_000, 1.41),),
        stages=(StageForecast(0, (0, 1, 2, 3), ("model", "lm_head"), 1_235_814_400, 3.2e14),),
        breakdown=Breakdown(3.07, 0.12, 0.06, 0.17, gradient_total_s=1.41),
        alternatives=(
            Alternative(plan, step, "tight", 3, int(9.8 * GIB), int(10.6 * GIB), {}, ("zero 3",), "--zero 3"),
            Alternative("the two RTX-4090 alone", 4.1, "fits", 0, int(19.7 * GIB), int(23.5 * GIB), {}),
            Alternative(
                "equal shares 16:16:16:16", 4.89, "no", 2, int(13.7 * GIB), int(10.6 * GIB),
                {2: int(3.1 * GIB), 3: int(3.1 * GIB)}, (), "--shares equal",
            ),
        ),
        assumptions=(
            "RTX-2080-Ti and RTX-4090 in one node: PCIe is taken between them",
            "efficiency of matrix products: 0.55 of the data sheet (Source: docs/efficiency.md)",
        ),
        modules=MODULES,
        annotations='whalepy.annotate(model, {"": whalepy.replicate(4, shares=[24, 24, 8, 8])})\n',
        not_runnable=("zero 3",),
        largest_batch=72,
        longest_sequence=2304,
        fidelity="data-sheet mode is off by 14.2 % (mean), 41 % (worst) on 112 published runs",
        equal_shares_missing_bytes={2: int(3.1 * GIB), 3: int(3.1 * GIB)},
    )  # fmt: skip


def runnable() -> Forecast:
    """The same cards, and a plan that can be run and is saved."""
    known = four_cards()
    plan = replace(known.alternatives[0], not_runnable=(), strategy="replicate 24:24:8:8", verdict="fits")
    return replace(
        known,
        strategy=plan.strategy,
        verdict="fits",
        alternatives=(plan, *known.alternatives[1:]),
        not_runnable=(),
        plan_file="llama.plan",
        equal_shares_missing_bytes={},
    )


def sixty_four() -> Forecast:
    """Eight nodes of eight cards, two types, four stages."""
    known, step = four_cards(), 1.25
    devices = tuple(
        replace(
            device(rank, "A100-SXM4-80GB", 32, 61.2, 79.1, 1.18, step)
            if rank < 32
            else device(rank, "V100-SXM2-32GB", 16, 28.9, 31.7, 1.2 if rank != 40 else 1.21, step),
            node=rank // 8,
            stage=rank // 16,
            coordinates=(rank // 16, rank % 16),
            adds=None,
        )
        for rank in range(64)
    )
    cards = ((32, "A100-SXM4-80GB", 84_974_239_744), (32, "V100-SXM2-32GB", 34_072_559_616))
    asked = replace(known.subject, cluster="4x8xA100-SXM4-80GB + 4x8xV100-SXM2-32GB @ 100Gbit/s", nodes=8)
    asked = replace(asked, devices=cards, rows=1536, link="NVLink inside, 100Gbit/s between nodes")
    plan = "4 stages, replicate 16 by 2:1, 8 microbatches, 1f1b"
    return replace(
        known,
        subject=asked,
        strategy=plan,
        verdict="fits",
        step_time_s=step,
        equal_shares_step_time_s=1.9,
        microbatches=8,
        schedule="1f1b",
        bottleneck=40,
        tightest=32,
        devices=devices,
        links=tuple(LinkForecast(f"node {node}", 12.5e9, 3_100_000_000, 0.25) for node in range(8)),
        stages=tuple(
            StageForecast(
                k, tuple(range(16 * k, 16 * k + 16)), (f"model.layers.{4 * k}-{4 * k + 3}",), 308_953_600, 8e13
            )
            for k in range(4)
        ),
        breakdown=Breakdown(1.0, 0.15, 0.06, 0.04, gradient_total_s=0.2),
        alternatives=tuple(
            Alternative(plan if k == 0 else f"{k + 4} stages", step + 0.1 * k, "fits", 32, 28 * GIB, 31 * GIB, {})
            for k in range(9)
        ),
        modules=(),
        annotations="",
        not_runnable=(),
        largest_batch=2048,
        longest_sequence=None,
        equal_shares_missing_bytes={},
    )


def cpus() -> Forecast:
    """Four processes of one computer, a small model without tokens, two of them at half speed."""
    known, step = runnable(), 0.0421
    rows = (8, 8, 4, 4)
    devices = tuple(
        replace(
            device(rank, "cpu", rows[rank], 2.5 / 1024, 4.0, 0.034 + 0.001 * rank, step),
            adds=(0.31, 0.31, 0.15, 0.15)[rank],
        )
        for rank in range(4)
    )
    asked = replace(known.subject, model="MLP", parameters=2376, trainable=2112, optimizer="sgd", precision="fp32")
    asked = replace(asked, rows=24, tokens=None, cluster="2xcpu + 2xcpu*0.5", devices=((4, "cpu", 4 * GIB),))
    asked = replace(asked, link="gloo", figures="measured")
    peak, room = int(2.5 * MIB), 4 * GIB
    return replace(
        known,
        subject=asked,
        strategy="replicate 8:8:4:4",
        step_time_s=step,
        equal_shares_step_time_s=0.0588,
        mfu=0.031,
        bound=1.5,
        devices=devices,
        links=(LinkForecast("inside node 0", 2e9, 38_016, 0.0021),),
        stages=(StageForecast(0, (0, 1, 2, 3), ("up", "down"), 2376, 1.1e6),),
        breakdown=Breakdown(0.037, 0.003, 0.0, 0.0021, gradient_total_s=0.0021),
        alternatives=(Alternative("replicate 8:8:4:4", step, "fits", 3, peak, room, {}),),
        modules=(ModulePart("up", 1, 1056, 5e5), ModulePart("down", 1, 1320, 5e5)),
        assumptions=(),
        annotations="",
        largest_batch=None,
        longest_sequence=None,
        fidelity="",
        plan_file="",
    )


def nothing_fits() -> Forecast:
    """The four cards with everything kept on every one of them."""
    known = four_cards()
    lacks = {0: int(1.4 * GIB), 1: int(1.4 * GIB), 2: int(14.3 * GIB), 3: int(14.4 * GIB)}
    devices = tuple(
        replace(device(each.rank, each.type, each.batch_share, peak / GIB, room / GIB, each.busy_s, 3.3), adds=None)
        for each, room in ((each, each.memory_capacity_bytes) for each in known.devices)
        for peak in [room + lacks[each.rank]]
    )
    plan = Alternative("replicate 24:24:8:8", 3.3, "no", 3, 25 * GIB, int(10.6 * GIB), lacks)
    return replace(
        known,
        strategy=plan.strategy,
        verdict="no",
        step_time_s=3.3,
        breakdown=Breakdown(3.07, 0.12, 0.06, 0.05, gradient_total_s=1.29),
        devices=devices,
        alternatives=(plan, *known.alternatives[2:]),
        not_runnable=(),
        largest_batch=None,
        longest_sequence=None,
        ways_out=("--zero 3", "--recompute full --batch-size 32"),
    )


EVERY = (four_cards, runnable, sixty_four, cpus, nothing_fits)
