"""Price one decode step of DeepSeek-R1 at EP320 as a library: what it does, and how long it takes on three machines.

    python scripts/price_a_step.py

No device is needed: the step is traced with shapes.
"""

from cmjax.checkpoint.configs import find_config
from cmjax.perf.hardware import hardware
from cmjax.perf.layout import Layout
from cmjax.perf.price import Pricing, price
from cmjax.perf.work import total


def main() -> None:
    config = find_config("deepseek-r1").config
    for name in ("ascend-910", "ascend-950dt", "gb200"):
        machine = hardware(name)
        layout = Layout(
            config=config,
            phase="decode",
            ep_size=320,
            batch=48,
            context=4096,
            drafts=1,
            microbatches=2,
            balance=machine.balance,
        )
        works = []
        for stage in layout.counts():
            tokens = layout.tokens // 2 if stage.lane else layout.tokens
            works.append(stage.expected(layout.expected(tokens)).times(stage.calls))
        whole = total(works)
        step = price(layout, machine, Pricing(check_memory=False))
        print(
            f"{step.layer * 1e6:7.0f} us a layer on {name}: {whole.flops / 1e12:.1f} TFLOP, "
            f"{whole.memory_bytes / 1e9:.0f} GB of memory, {whole.sent_bytes / 1e6:,.0f} MB sent, "
            f"step {step.seconds * 1e3:.1f} ms, {48 * 1.7 / step.seconds:,.0f} tokens/s of a device"
        )


if __name__ == "__main__":
    main()
